"""Read which tensors optimizers hold, and which of them they leave as they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import DeltaError


def held_by(optimizer: Any) -> Counter[int]:
    """Return {id of a tensor: how often the optimizers hold it}."""
    return Counter(id(p) for group in _groups(optimizer) for p in group["params"])


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """Return the groups of one optimizer, or of several in a list."""
    several = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    for each in several:
        if not isinstance(getattr(each, "param_groups", None), list):
            raise DeltaError(
                f"optimizer must be a torch optimizer, or several, not {type(each).__name__}"
            )
    return [group for each in several for group in each.param_groups]


def at_rest_in(optimizer: Any) -> set[int]:
    """Return the ids of the tensors whose learning rate is 0, and was 0 for each scheduler."""
    groups = _groups(optimizer) if optimizer is not None else []
    still = [g for g in groups if g.get("lr", 1) == 0 and not g.get("initial_lr")]  # None: its own
    return {id(p) for group in still for p in group["params"]}
