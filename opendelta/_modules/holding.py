"""Find the modules and parameters that an object holds, at any depth."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

from torch import nn

TABLES = ("_modules", "_parameters", "_buffers")
LARGEST = 2**24  # bytes of an array that may count: a larger one is data
SIMPLE = frozenset({bool, int, float, str, bytes, type(None)})


def beside_tables(modules: Iterable[nn.Module]) -> list[Any]:
    """Return what these modules have as attributes that may hold something, but in their tables."""
    own = (item for module in modules for item in module.__dict__.items())
    return [v for key, v in own if key not in TABLES and v is not None and _may_hold(v)]


def _may_hold(value: Any) -> bool:
    if type(value) in SIMPLE:
        return False
    return bool(value) if isinstance(value, dict | list | tuple | set) else True


def held_by(values: Iterable[Any]) -> set[int]:
    """Return the ids of the modules and parameters that these values hold, or are."""
    return {id(value) for value in walk(values) if isinstance(value, nn.Module | nn.Parameter)}


def others_among(values: Iterable[Any], known: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules these values hold at any depth, with those inside, but `known` ones."""
    seen, found, todo = {*map(id, known)}, list[nn.Module](), list(values)
    while todo:
        held = [v for v in walk(todo) if isinstance(v, nn.Module) and id(v) not in seen]
        parts = {id(p): p for module in held for p in module.modules() if id(p) not in seen}
        seen |= parts.keys()
        found += parts.values()
        todo = beside_tables(parts.values())
    return found


def closed_over(values: Iterable[Any]) -> set[int]:
    """Return the ids of the modules and parameters that functions among these values close over."""
    return held_by(value for value in [*walk(values)] if inspect.isfunction(value))


def walk(values: Iterable[Any], simple: bool = False) -> Iterator[Any]:
    """Yield these values and all that they hold, but what is in modules and parameters.

    Args:
        simple: also numbers, texts, and lists and tuples of nothing else.
    """
    taken: Callable[[Iterable[Any]], list[Any]] = list if simple else _telling
    todo, seen = taken(values), set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if not isinstance(value, nn.Module | nn.Parameter):
            todo += taken(held_in(value))


def _telling(values: Iterable[Any]) -> list[Any]:
    """Return these values but numbers, texts, and lists and tuples of nothing else."""
    found = [value for value in values if type(value) not in SIMPLE]
    rows = (tuple, list)
    return [v for v in found if type(v) not in rows or not SIMPLE.issuperset(map(type, v))]


def is_foreign(value: Any) -> bool:
    """True if a value is an object of somebody's own: not of Python's, torch's or our types."""
    ours = ("builtins", "torch", "opendelta", "functools", "collections")
    return type(value).__module__.partition(".")[0] not in ours


def held_in(value: Any) -> Collection[Any]:
    """Return what a container, a callable or an object of somebody's own holds."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | deque):
        return value
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.isfunction(value):
        return _held_by_function(value)
    if isinstance(value, weakref.ref):
        return [value()]
    if inspect.isgenerator(value):
        return [] if value.gi_frame is None else list(value.gi_frame.f_locals.values())
    return _attributes(value) if is_foreign(value) else []


def _held_by_function(function: FunctionType) -> list[Any]:
    """Return what a function closes over, its defaults, and the modules that it names."""
    cells = [c.cell_contents for c in function.__closure__ or () if c != CellType()]
    around = [function.__globals__.get(name) for name in function.__code__.co_names]
    named = [each for each in around if isinstance(each, nn.Module | nn.Parameter)]
    keywords = (function.__kwdefaults__ or {}).values()
    return [*cells, *(function.__defaults__ or ()), *keywords, *named]


def _attributes(value: Any) -> list[Any]:
    own = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return own + [each for each in in_slots(value) if each is not None]


def in_slots(value: Any) -> list[Any]:
    """Return what an object has in each slot of its classes, None where that is nothing."""
    return [_in_slot(slot, value) for slot in slots_of(value)]


def slots_of(value: Any) -> list[MemberDescriptorType]:
    """Return the slots of an object's classes."""
    found = [vars(cls).get(name) for cls in type(value).__mro__ for name in _slots(cls)]
    return [slot for slot in found if isinstance(slot, MemberDescriptorType)]


def _slots(cls: type) -> Collection[str]:
    names = vars(cls).get("__slots__", ())
    return (names,) if isinstance(names, str) else names


def _in_slot(slot: MemberDescriptorType, value: Any) -> Any:
    """Return what an object has in a slot, None if nothing, without a `__getattr__` of its own."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return None
