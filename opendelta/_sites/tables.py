"""Refuse other rows for a table of embeddings, under deltas that were made for those that it has.

transformers models resize in place, and a model around the one with the deltas may do it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from .._modules import tensors
from ..errors import SiteError
from .stack import stack_of

_watched: ContextVar[bool] = ContextVar("watched", default=False)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Refuse nothing: who calls this looks at the tables afterwards, and undoes what is wrong."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def check_rows(module: nn.Module, before: Any, now: Any) -> None:
    """Raise if a table is given another weight than deltas on it are made for."""
    if tensors.is_plain(before) and tensors.is_plain(now) and len(before) != len(now):
        _refuse(module, len(before), len(now))


def counting(base: Any) -> dict[str, property]:
    """Return what a site's class shows of the number of a table's rows, which a resize sets.

    Args:
        base: the class of the module.
    """
    if not issubclass(base, nn.Embedding) or hasattr(base, "num_embeddings"):
        return {}

    def read(self: nn.Module) -> int:
        return self.__dict__["num_embeddings"]

    def write(self: nn.Module, count: int) -> None:
        before: int = self.__dict__.get("num_embeddings", count)
        weight: Any = self._parameters["weight"]
        if bound_by(self) and tensors.is_plain(weight) and len(weight) > before:
            weight.data = weight.data[:before].clone()
        if count != before:
            _refuse(self, before, count)
        self.__dict__["num_embeddings"] = count

    return {"num_embeddings": property(read, write)}


def bound_by(module: nn.Module) -> list[str]:
    """Return the deltas on a table that have a value for each of its rows, unless `watched`."""
    stack = None if _watched.get() else stack_of(module)
    layers = stack.in_order() if stack is not None else ()
    return [name for name, layer in layers if any(rows for rows, _ in layer.made_for)]


def _refuse(module: nn.Module, before: int, now: int) -> None:
    if names := bound_by(module):
        raise SiteError(
            f"{', '.join(names)} on this {type(module).__name__} would not fit a table of {now} "
            f"rows in the place of {before}: resize first, then attach; or detach, resize, and "
            "attach a new delta"
        )
