"""Find the tensors of a backbone that a file of deltas brings along."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .._deltas.options import DeltaConfig
from ..names import SLOT


def copied(own: Mapping[str, Tensor], keys: Iterable[str], name: str) -> dict[str, Tensor]:
    """Return {key of a tensor in a module that the delta `name` owns: the backbone's tensor}."""
    slot = f".{SLOT}.{name}.module."
    plain = {key: key.replace(slot, ".") for key in keys if slot in key}
    return {key: own[name] for key, name in plain.items() if name in own}


def replaced(backbone: Iterable[str], configs: Iterable[DeltaConfig]) -> set[str]:
    """Return the names of the tensors and modules whose values the file brings along."""
    return {*backbone, *(name for config in configs for name in config.modules_to_save or ())}
