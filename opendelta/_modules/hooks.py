"""Let hooks of somebody's own run in a trial, and leave what they keep as it was.

A hook may record activations, count calls, or remove itself. What it changes in the process is put
back: lists and other containers, arrays, attributes of objects and classes, variables of a closure
and of its file. What it prints or writes to a file is not.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import sys
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.utils.hooks import RemovableHandle

from .holding import SIMPLE, TABLES, held_in, is_foreign
from .writing import LIBRARIES, package_of

OTHERS = ("opendelta", "accelerate", "deepspeed")  # what their hooks do is put back by others
BEFORE, AFTER = "_forward_pre_hooks", "_forward_hooks"
DEEP = 4  # steps from a hook to what it keeps: its object, an attribute, a list in a dictionary
MOST = 10_000  # things that are looked at
CONTAINERS = dict | list | set | deque


@contextlib.contextmanager
def putting_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back, at the end, what users' hooks on `modules` and on all modules keep."""
    modules = [*modules]
    hooks: list[Any] = [hook for m in modules for table in _tables(m) for hook in table.values()]
    hooks += [own for m in modules if (own := m.__dict__.get("forward")) is not None]  # wrappers
    hooks += [*of_all._global_forward_pre_hooks.values(), *of_all._global_forward_hooks.values()]
    reached = [*_reached(filter(_is_users, hooks))]
    contents = [(each, _items(each)) for each in map(_contents, reached) if each is not None]
    cells = [(cell, cell.cell_contents) for cell in reached if _is_full(cell)]
    named = [(v.__globals__, _named(v)) for v in reached if isinstance(v, FunctionType)]
    classes = [
        (cls, dict(vars(cls))) for cls in reached if isinstance(cls, type) and _is_users(cls)
    ]
    numpy: Any = sys.modules.get("numpy")
    arrays = [(a, a.copy()) for a in reached if numpy and isinstance(a, numpy.ndarray)]
    try:
        yield
    finally:
        for value, items in contents:
            if [*map(id, _items(value))] != [*map(id, items)]:
                _fill(value, items)
        for cell, was in cells:
            cell.cell_contents = was
        for array, had in arrays:
            array[...] = had
        for cls, before in classes:
            for name in [k for k, v in before.items() if vars(cls).get(k) is not v]:
                setattr(cls, name, before[name])
        for around, before in named:
            around.update({k: v for k, v in before.items() if around.get(k) is not v})


def raising(modules: Iterable[nn.Module], error: BaseException) -> set[CodeType]:
    """Return the code of users' hooks on `modules` in which an error was raised.

    Of those alone that return nothing, as far as their code tells: the others may change widths.
    """
    ran = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    hooks = [hook for module in modules for table in _tables(module) for hook in table.values()]
    found = {_code(hook) for hook in hooks if _is_users(hook)} & ran
    return {code for code in found if code is not None and _returns_nothing(code)}


def take_off(modules: Iterable[nn.Module], codes: Collection[CodeType]) -> None:
    """Take hooks with such code off `modules`."""
    for table in (table for module in modules for table in _tables(module) if codes):
        for key in [key for key, hook in table.items() if _code(hook) in codes]:
            del table[key]


def _tables(module: nn.Module) -> Iterator[dict[int, Any]]:
    """Yield the tables of a module's forward hooks."""
    yield from (t for key in (BEFORE, AFTER) if (t := module.__dict__.get(key)))


def _is_users(hook: Any) -> bool:
    return package_of(hook) not in (*LIBRARIES, *OTHERS)


def _reached(hooks: Iterable[Any]) -> Iterator[Any]:
    """Yield what hooks hold, the nearest first, without what is inside modules and tensors."""
    todo, seen = deque((hook, 0) for hook in hooks), set[int]()
    while todo and len(seen) < MOST:
        value, depth = todo.popleft()
        if id(value) in seen or type(value) in SIMPLE or isinstance(value, Tensor):
            continue
        seen.add(id(value))
        yield value
        if depth < DEEP:
            todo += [(each, depth + 1) for each in [*_inside(value)]]  # threads may change it


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        return [*(value.__closure__ or ()), *_named(value).values(), *held_in(value)]
    if isinstance(value, RemovableHandle):  # a hook may remove itself
        refs = (value.hooks_dict_ref, *value.extra_dict_ref)
        return [table for ref in refs if (table := ref()) is not None]
    if isinstance(value, type):
        return [each for each in vars(value).values() if isinstance(each, CONTAINERS)]
    if isinstance(value, nn.Module):
        own = value.__dict__
        return [each for key, each in own.items() if key not in TABLES and "_hooks" not in key]
    called = [type(value).__call__] if is_foreign(value) and callable(value) else []
    return [*called, *held_in(value)]


def _contents(value: Any) -> Any:
    """Return the container that a value is, or that has its attributes, or None."""
    if isinstance(value, CONTAINERS):
        return value
    own = isinstance(value, FunctionType | nn.Module) or is_foreign(value)
    attributes = getattr(value, "__dict__", None) if own else None
    return attributes if type(attributes) is dict else None  # of a class it is a view


def _named(function: FunctionType) -> dict[str, Any]:
    """Return what the code of a user's function names of its file."""
    if not _is_users(function):
        return {}
    codes = [function.__code__]
    codes += [const for const in function.__code__.co_consts if isinstance(const, CodeType)]
    around, names = function.__globals__, {name for code in codes for name in code.co_names}
    return {name: around[name] for name in names if name in around}


def _is_full(cell: Any) -> bool:
    return isinstance(cell, CellType) and cell != CellType()


def _items(value: Any) -> list[Any]:
    """Return what a container has; of a dictionary keys and values in turn."""
    pairs = [*value.items()] if isinstance(value, dict) else [(each,) for each in [*value]]
    return [*itertools.chain.from_iterable(pairs)]


def _fill(value: Any, items: list[Any]) -> None:
    value.clear()
    if isinstance(value, dict):
        value.update(zip(items[::2], items[1::2], strict=True))
    else:
        value.update(items) if isinstance(value, set) else value.extend(items)


def _code(hook: Any) -> CodeType | None:
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = hook if inspect.isroutine(hook) else type(hook).__call__
    return getattr(inspect.unwrap(function), "__code__", None)


def _returns_nothing(code: CodeType) -> bool:
    """True if code returns None, or is a lambda, which may."""
    steps = [*dis.get_instructions(code)]
    out = [one for one, step in itertools.pairwise(steps) if step.opname == "RETURN_VALUE"]
    out += [step for step in steps if step.opname == "RETURN_CONST"]
    nothing = all(step.opname.endswith("_CONST") and step.argval is None for step in out)
    return code.co_name == "<lambda>" or nothing
