"""Find what hooks and code of somebody's own reach: objects, containers, variables, and classes."""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections import UserDict, UserList, deque
from collections.abc import Iterable, Iterator
from types import BuiltinMethodType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as of_all
from torch.utils.hooks import RemovableHandle

from .holding import SIMPLE, TABLES, held_in, is_foreign
from .hooks import OTHERS, is_users
from .writing import LIBRARIES, package_of, words_of

DEEP = 8  # steps from a hook or a class to what it keeps: a function, its file's variable, a list
MOST = 10_000  # things that are looked at
FEW = 1_000  # in one value that is new
SHARED = {  # objects of these are what threads and tasks meet in: a waiting one would be lost
    "_queue", "_thread", "asyncio", "concurrent", "multiprocessing", "queue", "threading",
}  # fmt: skip
CACHED = type(functools.cache(lambda: None))
KNOWN = frozenset({*sys.stdlib_module_names, *LIBRARIES, *OTHERS, "numpy"} - {"__main__"})
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
Names = tuple[dict[str, Any], dict[str, Any], set[str]]


def by_hooks(modules: list[nn.Module]) -> dict[int, Any]:
    """Return {id: value} of what users' hooks on modules, on their parameters and on all reach."""
    owners = [(m.__dict__, name) for m in modules for name in HOOKS]
    tables = [own.get(name) for own, name in owners]
    tables += [getattr(of_all, f"_global{name}") for name in HOOKS]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    tables += [getattr(p, name, None) for p in parameters for name in OF_TENSORS]
    hooks: list[Any] = [hook for table in tables if table for hook in table.values()]
    hooks += [own for m in modules if (own := m.__dict__.get("forward")) is not None]  # wrappers
    return {id(value): value for value in _reached(filter(is_users, hooks))}


def by_forwards(modules: list[nn.Module]) -> dict[int, Any]:
    """Return {id: value} of what the forwards of modules of somebody's own reach."""
    classes = dict.fromkeys(cls for kind in {*map(type, modules)} for cls in kind.__mro__)
    own = [module for module in modules if is_own(type(module))]
    return {id(value): value for value in _reached([*filter(is_own, classes), *own])}


def leads_to_stand_in(value: Any) -> bool:
    """True if a value is, or holds, something without values, as a run on shapes computes it."""
    todo, seen = deque([value]), set[int]()
    while todo and len(seen) < FEW:
        value = todo.popleft()
        if type(value) in SIMPLE or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.is_meta or isinstance(value, FakeTensor):
                return True
        elif type(value).__module__.startswith("opendelta._backbone."):
            return True
        elif isinstance(value, nn.Module):
            todo += [*_attributes(value), *value._buffers.values()]
        elif not isinstance(value, type | ModuleType):
            todo += [*held_in(value), *getattr(value, "__dict__", {}).values()]
    return False


def _reached(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield what `roots` hold, the nearest first, without what is inside modules and tensors.

    Of files it is what code names in them.
    """
    todo, seen = deque((root, 0) for root in roots), set[int]()
    while todo and len(seen) < MOST:
        value, depth = todo.popleft()
        if id(value) in seen or type(value) in SIMPLE or isinstance(value, Tensor | ModuleType):
            continue
        of = type(value).__module__.partition(".")[0]
        if of in SHARED and not isinstance(value, threading.local):
            continue
        seen.add(id(value))
        yield value
        if depth < DEEP:
            todo += [(each, depth + 1) for each in [*_inside(value)]]  # threads may change it


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        found = [each for _, had, _ in named(value) for each in had.values()]
        return [*(value.__closure__ or ()), *found, *held_in(value)]
    if isinstance(value, CACHED):
        return [value.__wrapped__, *gc.get_referents(value)]
    if isinstance(value, staticmethod | classmethod):
        return [value.__wrapped__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, UserDict | UserList):
        return [value.data]
    if isinstance(value, BuiltinMethodType):  # such as a generator's
        return [value.__self__]
    if isinstance(value, RemovableHandle):  # a hook may remove itself
        refs = (value.hooks_dict_ref, *value.extra_dict_ref)
        return [table for ref in refs if (table := ref()) is not None]
    if isinstance(value, type):
        return [type(value), *vars(value).values()] if is_own(value) else []
    if isinstance(value, nn.Module):
        return [*_attributes(value), value._buffers]
    called = [type(value).__call__] if is_foreign(value) and callable(value) else []
    return [*called, *held_in(value)]


def _attributes(module: nn.Module) -> list[Any]:
    own = module.__dict__.items()
    return [value for key, value in own if key not in TABLES and "_hooks" not in key]


def named(function: FunctionType) -> list[Names]:
    """Return the variables that the code of a user's function names in its file and in others.

    Returns:
        Of each file its variables, those that the code names, and all names.
    """
    if not is_own(function):
        return []
    names = words_of(function.__code__)  # and texts, as in `globals()["TABLE"]`
    files, loaded = [function.__globals__], sys.modules
    for file in files:  # it grows: a file may name others
        others = [file.get(name, loaded.get(name)) for name in names]
        others = [each for each in others if isinstance(each, ModuleType)]
        new = [vars(each) for each in others if is_own(each)]
        files += [each for each in new if all(each is not known for known in files)]
    return [(file, {n: file[n] for n in names if n in file}, names) for file in files]


def is_own(value: Any) -> bool:
    """True if a function, a class or a file is of nobody whose code is known."""
    of = value.__name__.partition(".")[0] if isinstance(value, ModuleType) else package_of(value)
    return of not in KNOWN
