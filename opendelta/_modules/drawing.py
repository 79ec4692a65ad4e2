"""Random generators that somebody's own code holds, beside those of the process."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch


def as_drawn(values: Iterable[Any]) -> list[Callable[[], Any]]:
    """Return functions that put the generators among `values` back to where they are now."""
    found = map(_as_drawn, values)
    return [put_back for put_back in found if put_back is not None]


def _as_drawn(value: Any) -> Callable[[], Any] | None:
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    bits = value.bit_generator if isinstance(value, numpy.random.Generator) else value
    if isinstance(bits, numpy.random.BitGenerator):
        return functools.partial(setattr, bits, "state", bits.state)
    return None
