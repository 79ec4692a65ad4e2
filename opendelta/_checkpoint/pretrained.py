"""The folder of deltas beside a model that `save_pretrained` wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._deltas.order import attached_once, handles_of
from .._deltas.pretrained import DELTAS, WRITERS
from .._deltas.state_dict import delta_keys, frames
from .._deltas.state_loading import TRANSLATORS
from .._files import folder as files
from ..errors import UnsavedWarning
from .saving import save
from .source import opened


def _write(model: nn.Module, folder: Path, alone: bool) -> None:
    """Save the attached deltas of `model` into `folder`.

    Args:
        alone: no other file holds the tensors of the backbone that train.
    """
    deltas = handles_of(Backbone.of(model), attached_once(model))
    with warnings.catch_warnings():
        if not alone:
            warnings.simplefilter("ignore", UnsavedWarning)
        save(deltas, folder)


def _of_checkpoint(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Add the deltas beside a plain model that sentence-transformers' trainer loads back.

    It loads a checkpoint as a model of its own, and hands on this model's state dict.
    """
    calls = (frame for frame in frames() if frame.f_code.co_name == "_load_from_checkpoint")
    path = next((call.f_locals.get("checkpoint_path") for call in calls), None)
    folder = Path(path) / DELTAS if path else None
    if folder is None or delta_keys(model, state) or not files.is_ours(folder):
        return state
    with opened(folder, model) as source:
        source.verify()
        return {**state, **{name: stored.read() for name, stored in source.tensors.items()}}


WRITERS.append(_write)
TRANSLATORS.append(_of_checkpoint)
