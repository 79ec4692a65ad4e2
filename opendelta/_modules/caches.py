"""Put a KV cache back as it was, so that a module that fills it can run once more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .calls import every


def found(args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Return the KV caches among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]


class Snapshot:
    """A copy of all that a call may change in its KV caches.

    Args:
        caches: the caches.
        layer: the number of the only layer that changes; None: it is not known.
    """

    def __init__(self, caches: list[Any], layer: Any) -> None:
        held = [part for cache in caches for part in _parts(cache, layer)]
        self.fields = [(part, {**vars(part)}) for part in held]
        self.lists = [
            (value, value.copy())
            for _, own in self.fields
            for value in own.values()
            if isinstance(value, list | dict)
        ]
        tensors = {id(t): t for _, own in self.fields for t in every(Tensor, own)}
        self.tensors = [(tensor, tensor._version, tensor.clone()) for tensor in tensors.values()]

    def restore(self) -> None:
        """Put the caches back, in the same objects and the same memory."""
        for part, own in self.fields:
            vars(part).clear()
            vars(part).update(own)
        for value, items in self.lists:
            value.clear()
            value.extend(items) if isinstance(value, list) else value.update(items)
        for tensor, version, values in self.tensors:
            if tensor._version != version:
                tensor.copy_(values)


def _parts(cache: Any, layer: Any) -> Iterator[Any]:
    """Yield a cache and the parts in it that a layer of a model may change."""
    yield cache
    for value in vars(cache).values():
        if isinstance(value, list):
            one = isinstance(layer, int) and 0 <= layer < len(value)
            yield from (
                item for item in (value[layer : layer + 1] if one else value) if _holds(item)
            )
        elif hasattr(value, "get_seq_length"):
            yield from _parts(value, layer)


def _holds(item: Any) -> bool:
    return hasattr(item, "__dict__") and not isinstance(item, Tensor | type)
