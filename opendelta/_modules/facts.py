"""Tell two modules of one class apart, by a key for what a run of one of them has told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..names import SLOT
from .holding import is_foreign

R = TypeVar("R")
Key = tuple[Any, ...]
# The attributes of every module, and what accelerate puts around a forward.
IGNORED = frozenset(vars(nn.Module())) | {"forward", "_old_forward", "_hf_hook"}
SIMPLE = {bool, int, float, complex, str, bytes, torch.device}
MOST = 500  # values that are compared in one module
ENTRIES = 4096  # of a cache
_MISSING = object()


class _TooMuch(Exception):
    """A module holds more than can be compared."""


class _Same:
    """An object as a key that equals the key of the same object alone.

    It does not keep the object, if that takes weak references.
    """

    def __init__(self, value: Any) -> None:
        self.number = id(value)
        try:
            self.object: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self.object = lambda: value

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        own = self.object()
        return isinstance(other, _Same) and own is not None and own is other.object()


def facts(module: nn.Module) -> Key | None:
    """Return what tells two modules of one class apart; None: they cannot be compared.

    Numbers, texts and flags are compared by value, also in containers and in objects; all other
    objects, such as functions and buffers, must be the same. The values of parameters and the
    layers on the module do not count.
    """
    try:
        return _of_module(module, iter(range(MOST)))
    except _TooMuch:
        return None


def remembered(cache: MutableMapping[Key, R], key: Key | None, find: Callable[[], R]) -> R:
    """Return what `cache` has under `key`; find it first if it is not there.

    Args:
        key: the result of `facts`, and more; None: nothing is kept.
    """
    if key is None:
        return find()
    found: Any = cache.get(key, _MISSING)
    if found is _MISSING:
        found = find()
        if len(cache) >= ENTRIES:
            cache.clear()
        cache[key] = found
    return found


def _of_module(module: nn.Module, left: Iterator[int]) -> Key:
    own = module.__dict__
    parameters = [name for name, p in module._parameters.items() if p is not None]
    return (
        type(module),
        tuple((k, _known_by(v, module, left)) for k, v in own.items() if k not in IGNORED),
        tuple(parameters),
        tuple((name, _Same(t)) for name, t in module._buffers.items() if t is not None),
        tuple(
            (name, _of_module(child, left))
            for name, child in module._modules.items()
            if child is not None and name != SLOT
        ),
    )


def _known_by(value: Any, owner: nn.Module, left: Iterator[int]) -> Any:
    """Return a key to a value that a module, its `owner`, holds.

    Args:
        left: as many items as there may still be values.
    """
    if next(left, None) is None:
        raise _TooMuch
    if value is None or type(value) in SIMPLE:
        return repr(value)
    if isinstance(value, dict):
        items = [(_known_by(k, owner, left), _known_by(v, owner, left)) for k, v in value.items()]
        return type(value), tuple(items)
    if isinstance(value, list | tuple):
        return type(value), tuple(_known_by(item, owner, left) for item in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_known_by(item, owner, left) for item in value)
    if isinstance(value, MethodType) and value.__self__ is owner:
        return MethodType, _Same(value.__func__)
    if isinstance(value, nn.Module | Tensor | type) or not is_foreign(value):
        return _Same(value)
    try:  # an object may have more than attributes, so it must be the same, too
        return _Same(value), _known_by(getattr(value, "__dict__", None), owner, left)
    except (_TooMuch, RecursionError):
        return _Same(value), None
