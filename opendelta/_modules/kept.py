"""Put back what code of somebody's own keeps outside the modules while it runs in a trial.

A hook may record activations, count calls, or remove itself; a forward may keep a table that it has
computed in a variable of its file, in a class, or in `functools.cache`. What they change in the
process is put back: lists and other containers, arrays, attributes of objects and classes,
variables of a closure and of a file, random generators. What they print or write to a file is not;
nor is what a forward counts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as of_all
from torch.utils.hooks import RemovableHandle

from .drawing import as_drawn
from .holding import SIMPLE, TABLES, held_in, is_foreign
from .hooks import OTHERS, is_users, tables_of
from .writing import LIBRARIES, package_of

DEEP = 4  # steps from a hook or a class to what it keeps: a function, its file's variable, a list
MOST = 10_000  # things that are looked at
CONTAINERS = dict | list | set | deque
PLAIN: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
SHARED = {  # objects of these are what threads and tasks meet in: a waiting one would be lost
    "_queue", "_thread", "asyncio", "concurrent", "multiprocessing", "queue", "threading",
}  # fmt: skip
CACHED = type(functools.cache(lambda: None))
KNOWN = frozenset({*sys.stdlib_module_names, *LIBRARIES, *OTHERS, "numpy"} - {"__main__"})
Names = tuple[dict[str, Any], dict[str, Any], set[str]]


@contextlib.contextmanager
def putting_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back, at the end, what users' hooks on `modules` and on all modules keep.

    Other threads may run their forwards meanwhile: of what those keep, stand-ins alone leave. But
    random generators are put back, whoever holds them, as those of the process are.
    """
    modules = [*modules]
    by_hooks = {id(value): value for value in _reached(_hooks(modules))}
    by_forwards = [value for value in _reached(_own(modules)) if id(value) not in by_hooks]
    before = _Before([*by_hooks.values()], lambda _: True), _Before(by_forwards, _is_stand_in)
    drawn = as_drawn([*by_hooks.values(), *by_forwards])
    try:
        yield
    finally:
        for put_back in drawn:
            put_back()
        for each in before:
            each.put_back()


class _Before:
    """The contents of some objects at one moment.

    Args:
        reached: the objects.
        is_wrong: true of what is there later, if it has to leave.
    """

    def __init__(self, reached: list[Any], is_wrong: Callable[[Any], bool]) -> None:
        self.is_wrong = is_wrong
        self.contents = [(c, _items(c)) for c in map(_contents, reached) if c is not None]
        self.cells = [(cell, cell.cell_contents) for cell in reached if _is_full(cell)]
        self.named = [n for v in reached if isinstance(v, FunctionType) for n in _named(v)]
        self.classes = [(c, dict(vars(c))) for c in reached if isinstance(c, type) and _is_own(c)]
        self.caches = [(v, v.cache_info().misses) for v in reached if isinstance(v, CACHED)]
        numpy: Any = sys.modules.get("numpy")
        arrays = [a for a in reached if numpy and isinstance(a, numpy.ndarray)]
        self.arrays = [(a, a.copy()) for a in arrays]

    def put_back(self) -> None:
        wrong = self.is_wrong
        for value, items in self.contents:
            now = _items(value)
            if [*map(id, now)] != [*map(id, items)] and (wrong(None) or any(map(wrong, now))):
                _fill(value, items)
        for cell, was in self.cells:
            if wrong(cell.cell_contents):
                cell.cell_contents = was
        for array, had in self.arrays:
            if wrong(array):
                array[...] = had
        for cls, before in self.classes:
            own = [k for k, v in before.items() if (n := vars(cls).get(k)) is not v and wrong(n)]
            for name in own:
                setattr(cls, name, before[name])
            new = [k for k in vars(cls) if k not in before and not k.startswith("__")]
            for name in filter(lambda name: wrong(vars(cls)[name]), new):
                delattr(cls, name)
        for file, had, names in self.named:
            file.update(
                {k: v for k, v in had.items() if file.get(k) is not v and wrong(file.get(k))}
            )
            for name in [k for k in names if k in file and k not in had and wrong(file[k])]:
                del file[name]
        for cache, misses in self.caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _is_stand_in(value: Any) -> bool:
    """True if a value is, or holds, something without values, as a run on shapes computes it."""
    if isinstance(value, Tensor):
        return value.is_meta or isinstance(value, FakeTensor)
    if isinstance(value, dict | list | tuple):
        return any(map(_is_stand_in, value.values() if isinstance(value, dict) else value))
    return type(value).__module__.startswith("opendelta._backbone.")


def _hooks(modules: list[nn.Module]) -> list[Any]:
    """Return users' hooks, and what stands in a module's forward."""
    hooks: list[Any] = [hook for m in modules for table in tables_of(m) for hook in table.values()]
    hooks += [own for m in modules if (own := m.__dict__.get("forward")) is not None]  # wrappers
    hooks += [*of_all._global_forward_pre_hooks.values(), *of_all._global_forward_hooks.values()]
    return [*filter(is_users, hooks)]


def _own(modules: list[nn.Module]) -> list[Any]:
    """Return the classes and attributes of modules of somebody's own."""
    classes = dict.fromkeys(cls for kind in {*map(type, modules)} for cls in kind.__mro__)
    held = [value for m in modules if _is_own(type(m)) for value in _attributes(m)]
    return [*filter(_is_own, classes), *held]


def _reached(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield what `roots` hold, the nearest first, without what is inside modules and tensors."""
    todo, seen = deque((root, 0) for root in roots), set[int]()
    while todo and len(seen) < MOST:
        value, depth = todo.popleft()
        if id(value) in seen or type(value) in SIMPLE or isinstance(value, Tensor):
            continue
        if type(value).__module__.partition(".")[0] in SHARED:
            continue
        seen.add(id(value))
        yield value
        if depth < DEEP:
            todo += [(each, depth + 1) for each in [*_inside(value)]]  # threads may change it


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        found = [each for _, had, _ in _named(value) for each in had.values()]
        return [*(value.__closure__ or ()), *found, *held_in(value)]
    if isinstance(value, CACHED | staticmethod | classmethod):
        return [value.__wrapped__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, BuiltinMethodType):  # such as a generator's
        return [value.__self__]
    if isinstance(value, RemovableHandle):  # a hook may remove itself
        refs = (value.hooks_dict_ref, *value.extra_dict_ref)
        return [table for ref in refs if (table := ref()) is not None]
    if isinstance(value, type):
        return [*vars(value).values()] if _is_own(value) else []
    if isinstance(value, nn.Module):
        return _attributes(value)
    called = [type(value).__call__] if is_foreign(value) and callable(value) else []
    return [*called, *held_in(value)]


def _attributes(module: nn.Module) -> list[Any]:
    own = module.__dict__.items()
    return [value for key, value in own if key not in TABLES and "_hooks" not in key]


def _contents(value: Any) -> Any:
    """Return the container that a value is, or that has its attributes, or None."""
    if isinstance(value, CONTAINERS):
        return value
    own = isinstance(value, FunctionType | nn.Module) or is_foreign(value)
    attributes = getattr(value, "__dict__", None) if own else None
    return attributes if type(attributes) is dict else None  # of a class it is a view


def _named(function: FunctionType) -> list[Names]:
    """Return the variables that the code of a user's function names in its file and in others.

    Returns:
        Of each file its variables, those that the code names, and all names.
    """
    if not _is_own(function):
        return []
    codes = [function.__code__]
    codes += [const for const in function.__code__.co_consts if isinstance(const, CodeType)]
    names = {name for code in codes for name in code.co_names}
    files = [function.__globals__]
    for file in files:  # it grows: a file may name others
        named = [file[name] for name in names if isinstance(file.get(name), ModuleType)]
        new = [vars(each) for each in named if _is_own(each)]
        files += [each for each in new if all(each is not known for known in files)]
    return [(file, {n: file[n] for n in names if n in file}, names) for file in files]


def _is_own(value: Any) -> bool:
    """True if a function, a class or a file is of nobody whose code is known."""
    of = value.__name__.partition(".")[0] if isinstance(value, ModuleType) else package_of(value)
    return of not in KNOWN


def _is_full(cell: Any) -> bool:
    return isinstance(cell, CellType) and cell != CellType()


def _items(value: Any) -> list[Any]:
    """Return what a container has; of a dictionary keys and values in turn."""
    if isinstance(value, dict):
        return [*itertools.chain.from_iterable([*_plain(value).items(value)])]
    return [*_plain(value).__iter__(value)]


def _fill(value: Any, items: list[Any]) -> None:
    plain = _plain(value)
    plain.clear(value)
    if isinstance(value, dict):
        for key, each in zip(items[::2], items[1::2], strict=True):
            plain.__setitem__(value, key, each)
    else:
        plain.update(value, items) if isinstance(value, set) else plain.extend(value, items)


def _plain(value: Any) -> Any:
    """Return Python's own class of a container, as one of somebody's own may do more, or else."""
    return next(kind for kind in PLAIN if isinstance(value, kind))
