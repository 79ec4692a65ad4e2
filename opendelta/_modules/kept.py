"""Put back what code of somebody's own keeps outside the modules while it runs in a trial.

A hook may record activations, count calls, or remove itself; a forward may keep a table that it has
computed in a variable of its file, in a class, or in `functools.cache`. What they change in the
process is put back: lists and other containers, arrays, attributes of objects and classes,
variables of a closure and of a file, random generators. What they print or write to a file is not.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import CellType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from .drawing import as_drawn
from .holding import LARGEST, is_foreign, slots_of
from .reached import CACHED, by_forwards, by_hooks, is_own, leads_to_stand_in, named

CONTAINERS = dict | list | set | deque
PLAIN: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
# Their threads run no forward of somebody's own.
ASIDE = ("IPython", "concurrent.futures.process", "debugpy", "execnet", "ipykernel", "tensorboard",
    "multiprocessing.queues", "torch._inductor", "torch.utils.data", "tqdm", "wandb", "zmq",
)  # fmt: skip
Wrong = Callable[[Any], bool]
_UNSET: Any = object()


@contextlib.contextmanager
def putting_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back, at the end, what users' hooks on `modules` and on all modules keep.

    So it is with what forwards keep, in the only thread. Where others may run forwards meanwhile,
    of what those keep stand-ins alone leave. But random generators are put back, whoever holds
    them, as those of the process are; so are torch's default dtype and its grad mode.
    """
    modules = [*modules]
    hooked, own = by_hooks(modules), by_forwards(modules)
    kept = _Before([*hooked.values()]), _Before([v for key, v in own.items() if key not in hooked])
    drawn, alone = as_drawn([*hooked.values(), *own.values()]), _is_alone()
    settings = torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)
    try:
        yield
    finally:
        _put_back_settings(*settings)
        for put_back in drawn:
            put_back()
        kept[0].put_back(_always)
        kept[1].put_back(_always if alone and _is_alone() else leads_to_stand_in)


@contextlib.contextmanager
def around_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Do what `putting_back` does around runs of copies of modules that share their parameters.

    Attributes of parameters are put back, too: one of bitsandbytes gives its numbers to the first
    module that runs.
    """
    modules = [*modules]
    own = [p for m in modules for p in m._parameters.values() if p is not None]
    special = [(p, dict(vars(p))) for p in own if type(p) is not nn.Parameter and vars(p)]
    try:
        with putting_back(modules):
            yield
    finally:
        for parameter, had in special:
            vars(parameter).update(had)


def _put_back_settings(dtype: torch.dtype, gradients: bool, environ: dict[str, str]) -> None:
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
    if _is_alone() and environ != os.environ:
        os.environ.clear()
        os.environ.update(environ)


def _always(_: Any) -> bool:
    return True


def _is_alone() -> bool:
    """True if no other thread may run forwards."""
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    return all(map(_is_aside, frames.values()))


def _is_aside(frame: FrameType | None) -> bool:
    """True if the first function that a thread has run is of a library whose threads are known."""
    files = []
    while frame is not None:
        files.append(frame.f_globals.get("__name__") or "")
        frame = frame.f_back
    first = next((file for file in reversed(files) if file != "threading"), "threading")
    return any(f"{first}.".startswith(f"{known}.") for known in ASIDE)


class _Before:
    """The contents of some objects at one moment.

    Args:
        reached: the objects.
    """

    def __init__(self, reached: list[Any]) -> None:
        self.contents = [(c, _items(c)) for c in map(_contents, reached) if c is not None]
        self.slots = [(v, s, _in_slot(s, v)) for v in reached if is_foreign(v) for s in slots_of(v)]
        self.cells = [(cell, cell.cell_contents) for cell in reached if _is_full(cell)]
        self.named = [n for v in reached if isinstance(v, FunctionType) for n in named(v)]
        self.classes = [(c, dict(vars(c))) for c in reached if isinstance(c, type) and is_own(c)]
        self.caches = [(v, _misses(v), {*_table(v)}) for v in reached if isinstance(v, CACHED)]
        self.variables = [(v, _value(v)) for v in reached if isinstance(v, ContextVar)]
        numpy: Any = sys.modules.get("numpy")
        arrays = [a for a in reached if numpy and isinstance(a, numpy.ndarray)]
        small = [a for a in arrays if a.flags.writeable and a.nbytes <= LARGEST]
        self.arrays = [(a, a.copy()) for a in small]

    def put_back(self, wrong: Wrong) -> None:
        """Put back what has changed since.

        Args:
            wrong: true of a new value that has to leave.
        """
        for value, items in self.contents:
            now = _items(value)
            if [*map(id, now)] != [*map(id, items)]:
                _fill(value, items if wrong is _always else _without(value, now, items, wrong))
        for value, slot, was in self.slots:
            now = _in_slot(slot, value)
            if [*map(id, now)] != [*map(id, was)] and wrong(now[0] if now else None):
                slot.__set__(value, *was) if was else slot.__delete__(value)
        for cell, was in self.cells:
            if cell.cell_contents is not was and wrong(cell.cell_contents):
                cell.cell_contents = was
        for variable, was in self.variables:
            now = _value(variable)
            if now is not was is not _UNSET and wrong(now):  # nothing makes it unset again
                variable.set(was)
        for array, had in self.arrays if wrong is _always else ():
            array[...] = had
        for cls, had in self.classes:
            _put_back_names(cls, dict(vars(cls)), had, wrong)
        for file, had, names in self.named:
            _put_back_names(file, {k: file[k] for k in names if k in file}, had, wrong)
        for cache, misses, keys in self.caches:
            if not _table(cache) and _misses(cache) != misses:
                cache.cache_clear()
            for key in [k for k, v in _table(cache).items() if k not in keys and wrong(v)]:
                del _table(cache)[key]


def _put_back_names(owner: Any, now: dict[str, Any], had: dict[str, Any], wrong: Wrong) -> None:
    """Put back the variables of a file, or the attributes of a class."""
    is_class = isinstance(owner, type)
    for name, value in now.items():
        if name in had and had[name] is value:
            continue
        if not wrong(value) or (is_class and name.startswith("__")):
            continue
        if name in had:
            setattr(owner, name, had[name]) if is_class else owner.update({name: had[name]})
        else:
            delattr(owner, name) if is_class else owner.pop(name)
    for name in had.keys() - now.keys() if wrong is _always else ():
        setattr(owner, name, had[name]) if is_class else owner.update({name: had[name]})


def _contents(value: Any) -> Any:
    """Return the container that a value is, or that has its attributes, or None."""
    if isinstance(value, CONTAINERS):
        return value
    own = isinstance(value, FunctionType | nn.Module) or is_foreign(value)
    attributes = getattr(value, "__dict__", None) if own else None
    return attributes if type(attributes) is dict else None  # of a class it is a view


def _value(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return _UNSET


def _misses(cache: Any) -> int:
    return cache.cache_info().misses


def _table(cache: Any) -> dict[Any, Any]:
    """Return the table of a `functools.cache`; of one that has a limit, {}: it is in links."""
    if cache.cache_info().maxsize is not None:
        return {}
    own = vars(cache)
    return next(v for v in gc.get_referents(cache) if isinstance(v, dict) and v is not own)


def _is_full(cell: Any) -> bool:
    return isinstance(cell, CellType) and cell != CellType()


def _in_slot(slot: Any, value: Any) -> list[Any]:
    """Return a list of what an object has in a slot."""
    try:
        return [slot.__get__(value)]
    except AttributeError:
        return []


def _without(value: Any, now: list[Any], items: list[Any], wrong: Wrong) -> list[Any]:
    """Return the items that a container has now, those before in the place of wrong ones."""
    if isinstance(value, dict):
        had, new = (dict(zip(i[::2], i[1::2], strict=True)) for i in (items, now))
        for key in [k for k, v in new.items() if had.get(k, had) is not v and wrong(v)]:
            if key in had:
                new[key] = had[key]
            else:
                del new[key]
        return [*itertools.chain.from_iterable(new.items())]
    known = {*map(id, items)}
    kept = [v for v in now if id(v) in known or not wrong(v)]
    same = len(kept) < len(now) == len(items)
    return items if same else kept


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
