"""The folder of deltas beside a model that `save_pretrained` wrote."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._deltas.order import attached_once, handles_of
from .._deltas.pretrained import DELTAS, NO_BACKBONE, WITH_DELTAS, WRITERS
from .._deltas.state_dict import delta_keys, frames
from .._deltas.state_loading import TRANSLATORS
from .._files import folder as files
from .._files.reading import read_json
from ..errors import DeltaLoadError, UnsavedWarning, kept_warnings
from .saving import save
from .source import opened


def _write(model: nn.Module, folder: Path, alone: bool) -> None:
    """Save the attached deltas of `model` into `folder`.

    Args:
        alone: no other file holds the tensors of the backbone that train.
    """
    deltas = handles_of(Backbone.of(model), attached_once(model))
    with contextlib.nullcontext() if alone else kept_warnings(UnsavedWarning):
        save(deltas, folder, public=not alone)  # the model beside them may be sent to a hub


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


def has_model(folder: Path) -> bool:
    """True if the folder of deltas `folder` lies beside a whole model of transformers."""
    config = folder.parent / "config.json"
    if folder.name != DELTAS or not config.is_file():
        return False
    facts = read_json(config)
    return "model_type" in facts and facts.get("transformers_weights") != NO_BACKBONE


def check_beside(folder: Path) -> None:
    """Raise if the model beside the folder of deltas `folder` was saved without them, later."""
    if has_model(folder) and not (folder.parent / WITH_DELTAS).is_file():
        raise DeltaLoadError(
            f"the model in {folder.parent} was saved without the deltas beside it, after them: its "
            f"weights may hold them. Remove {folder}; or, if they belong on this model: "
            f"opendelta.load({str(folder)!r}, model)"
        )


WRITERS.append(_write)
TRANSLATORS.append(_of_checkpoint)
