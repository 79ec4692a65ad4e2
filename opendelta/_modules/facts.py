"""Tell two modules of one class apart, by a key for what a run of one of them has told."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..names import SLOT
from .holding import in_slots, is_foreign
from .tensors import is_lazy, shape

R = TypeVar("R")
Key = tuple[Any, ...]
# The attributes of every module, and what accelerate puts around a forward.
IGNORED = frozenset(vars(nn.Module())) | {"forward", "_old_forward", "_hf_hook"}
SIMPLE = {bool, int, float, complex, str, bytes, torch.device}
MOST = 20000  # values that are compared in one module
# Their classes stay as they are.
LIBRARIES = {*sys.stdlib_module_names, "torch", "opendelta"}
ENTRIES = 4096  # of a cache
_MISSING = object()


class _TooMuch(Exception):
    """A module holds more than can be compared."""


@dataclass
class _Look:
    """A look at one module.

    Attributes:
        left: how many more values it may take.
        objects: the ids of those whose values are in the key.
    """

    left: int = MOST
    objects: set[int] = field(default_factory=set)


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
    objects, such as functions and buffers, must be the same. So it is with what a class of somebody
    else's has, which may be replaced. Of parameters, the shapes count and the values do not, nor do
    the layers on the module. What a function reads beside, from globals or from what it closes
    over, is not seen.
    """
    try:
        look, types = _Look(), dict.fromkeys(map(type, parts(module)))
        classes = dict.fromkeys(base for cls in types for base in cls.__mro__ if _is_own(base))
        return _of_module(module, look), tuple(_of_class(each, look) for each in classes)
    except (_TooMuch, RecursionError):
        return None


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those inside, without layers."""
    yield module
    for name, child in module._modules.items():
        if child is not None and name != SLOT:
            yield from parts(child)


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in LIBRARIES


def _of_class(cls: type, look: _Look) -> Key:
    """Return a key to what a class has, but for what Python notes on it."""
    own = vars(cls).items()
    told = ((k, v) for k, v in own if callable(v) or not (k.startswith("__") or k == "_abc_impl"))
    return cls, tuple((k, _known_by(v, cls, look)) for k, v in told)


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


def _of_module(module: nn.Module, look: _Look) -> Key:
    own = module.__dict__
    return (
        type(module),
        tuple((k, _known_by(v, module, look)) for k, v in own.items() if k not in IGNORED),
        tuple((name, _sizes(p)) for name, p in module._parameters.items() if p is not None),
        tuple((name, _Same(t)) for name, t in module._buffers.items() if t is not None),
        tuple(
            (name, _of_module(child, look))
            for name, child in module._modules.items()
            if child is not None and name != SLOT
        ),
    )


def _sizes(parameter: Tensor) -> Key | None:
    return None if is_lazy(parameter) else tuple(shape(parameter))


def _known_by(value: Any, owner: Any, look: _Look) -> Any:
    """Return a key to a value that a module or a class, its `owner`, holds."""
    look.left -= 1
    if look.left < 0:
        raise _TooMuch
    if value is None or type(value) in SIMPLE:
        return repr(value)
    if isinstance(value, dict):
        items = [(_known_by(k, owner, look), _known_by(v, owner, look)) for k, v in value.items()]
        return type(value), tuple(items)
    if isinstance(value, list | tuple):
        return type(value), tuple(_known_by(item, owner, look) for item in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_known_by(item, owner, look) for item in value)
    if isinstance(value, MethodType) and value.__self__ is owner:
        return MethodType, _Same(value.__func__)
    if isinstance(value, nn.Module | Tensor | type) or not is_foreign(value):
        return _Same(value)
    if id(value) in look.objects:
        return _Same(value)
    look.objects.add(id(value))
    held = getattr(value, "__dict__", None), *in_slots(value)
    # An object may have more than attributes, so it must be the same, too.
    return _Same(value), tuple(_known_by(each, owner, look) for each in held)
