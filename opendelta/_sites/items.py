"""Show the children of a module that carries deltas, as a list of modules or a loop takes them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from .._layers import recomputing
from .._modules.writing import LIBRARIES, package_of
from ..errors import SiteError
from ..names import SLOT
from . import noting, showing
from .stack import stack_of

LISTS = nn.Sequential, nn.ModuleList, nn.ModuleDict
GIVE = ("__iter__", "__len__", "__getitem__", "__contains__", "keys", "values", "items")
CHANGE = (
    "__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert", "pop",
    "update", "clear", "popitem",
)  # fmt: skip

LOOPS = {"children", "named_children", "modules", "named_modules", "_modules"}
WHOLE = ("_apply", "train", "state_dict", "load_state_dict")
# Their code means the deltas too, when it asks for the modules in a forward.
MEAN_ALL = LIBRARIES | {"opendelta", "accelerate", "deepspeed", "lightning", "pytorch_lightning"}
RUNNING: ContextVar[frozenset[int]] = ContextVar("running", default=frozenset())


def methods(base: Any, copied: bool, notes: bool) -> dict[str, Callable[..., Any]]:
    """Return the methods by which a site, of the class `base`, gives and changes its items.

    Args:
        copied: they are those of a delta's own copy while it acts.
        notes: `noting.uses_of` tells who reads them.
    """
    if not issubclass(base, LISTS):
        return {}
    given = {verb: _giving(base, verb, copied, notes) for verb in GIVE if hasattr(base, verb)}
    given |= {verb: _naming(base, verb) for verb in ("__setattr__", "__delattr__", "add_module")}
    return given | {verb: _changing(base, verb) for verb in CHANGE if hasattr(base, verb)}


def _giving(base: Any, verb: str, copied: bool, notes: bool) -> Callable[..., Any]:
    @functools.wraps(getattr(base, verb))
    def give(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if notes and verb != "__len__":
            noting.note_read(self)
        shown = showing.copy_of(self) if copied else None
        if shown is None:  # a copy without items is false
            shown = _without_stack(self, base)
        return getattr(base, verb)(shown, *args, **kwargs)

    return give


def _changing(base: Any, verb: str) -> Callable[..., Any]:
    @functools.wraps(getattr(base, verb))
    def change(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stack, owners = stack_of(self), _owners(self)
        if owners and id(self) not in RUNNING.get():  # its own forward changes the copy's too
            raise SiteError(
                f"{', '.join(map(repr, owners))} has a copy of this {base.__name__}, whose items "
                "would stay: detach it, change the items, then make a new delta"
            )
        self.__dict__["_modules"].pop(SLOT, None)
        try:
            return getattr(base, verb)(self, *args, **kwargs)
        finally:
            if stack is not None:
                self.__dict__["_modules"][SLOT] = stack

    return change


def _owners(module: nn.Module) -> list[str]:
    """Return the names of the deltas that have a copy of a site."""
    stack = stack_of(module)
    return [n for n, layer in stack.in_order() if layer.stand_in is not None] if stack else []


def _naming(base: Any, verb: str) -> Callable[..., Any]:
    """Return the method that sets or deletes an attribute or a child, which may be an item."""
    plain, change = getattr(base, verb), _changing(base, verb)

    @functools.wraps(plain)
    def changed(self: nn.Module, name: str, *values: Any, **named: Any) -> Any:
        value: Any = next(iter((*values, *named.values())), None)
        own = self.__dict__["_modules"]
        item = isinstance(value, nn.Module)
        if name == SLOT or not (item or name in own):
            return plain(self, name, *values, **named)
        if item and any(part is own.get(name) for part in value.modules()):
            return plain(self, name, *values, **named)  # a wrapper of what was there
        if item and name in own and not _owners(self):
            return plain(self, name, *values, **named)  # in the old one's place, as loops do
        return change(self, name, *values, **named)

    return changed


# ------------------------------------------------------------------------------------- in a forward
class Shown(dict[str, Any]):
    """The children of a module but its stack; what is written goes to the module."""

    def __init__(self, own: dict[str, Any]) -> None:
        super().__init__((name, part) for name, part in own.items() if name != SLOT)
        self.own = own

    def __setitem__(self, name: str, part: Any) -> None:
        super().__setitem__(name, part)
        self.own[name] = part

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.own[name]

    def pop(self, name: str, *default: Any) -> Any:
        self.own.pop(name, *default)
        return super().pop(name, *default)

    def update(self, *parts: Any, **named: Any) -> None:
        for name, part in dict(*parts, **named).items():
            self[name] = part

    def setdefault(self, name: str, part: Any = None) -> Any:
        if name not in self:
            self[name] = part
        return self[name]


def shown_children() -> property:
    """Return the property `_modules` of a site's class: its forward finds no stack there."""

    def read(self: nn.Module) -> dict[str, Any]:
        own = self.__dict__["_modules"]
        if torch.compiler.is_dynamo_compiling():
            return {name: part for name, part in own.items() if name != SLOT}
        return Shown(own) if id(self) in RUNNING.get() else own

    def write(self: nn.Module, value: dict[str, Any]) -> None:
        self.__dict__["_modules"] = value

    return property(read, write)


def in_forwards(base: Any, made: dict[str, Any]) -> dict[str, Any]:
    """Return what shows a site, of the class `base`, to forwards: its own, and others' around it.

    Args:
        made: the methods that the site's class has already.
    """
    shown: dict[str, Any] = {}
    if base.named_modules is nn.Module.named_modules:
        shown["named_modules"] = named_modules
    if is_hidden_from(base):
        shown["_modules"] = shown_children()
        shown |= {verb: on_all(verb, made.get(verb, getattr(base, verb))) for verb in WHOLE}
    return shown


def is_hidden_from(base: Any) -> bool:
    """True if a class has a forward of somebody's own, which may go over the children.

    Of libraries only those that name the children do.
    """
    forward = inspect.unwrap(base.forward)
    named = LOOPS & {*getattr(getattr(forward, "__code__", None), "co_names", ())}
    return bool(named) or package_of(forward) not in LIBRARIES


def hiding(base: Any) -> Callable[..., Any]:
    """Return the forward of the modules of a class, in which their stack is no child."""
    recomputing.keep(of_now)

    @functools.wraps(base.forward)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return base.forward(module, *args, **kwargs)
        token = RUNNING.set(RUNNING.get() | {id(module)})
        try:
            return base.forward(module, *args, **kwargs)
        finally:
            RUNNING.reset(token)

    return forward


def on_all(verb: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of `WHOLE`, which takes the stack along in the module's own forward too."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # what it finds lacks the stack
            stack: Any = stack_of(self)
            if stack is not None and verb in ("_apply", "train"):
                getattr(stack, verb)(*args, **kwargs)
            return method(self, *args, **kwargs)
        token = RUNNING.set(RUNNING.get() - {id(self)})
        try:
            return method(self, *args, **kwargs)
        finally:
            RUNNING.reset(token)

    return run


def of_now(again: Callable[..., Any]) -> Callable[..., Any]:
    """Return `again`, which checkpointing runs in the backward, with the forwards around it now."""
    running = RUNNING.get()

    def run(*args: Any, **kwargs: Any) -> Any:
        token = RUNNING.set(running)
        try:
            return again(*args, **kwargs)
        finally:
            RUNNING.reset(token)

    return run if running else again


# ------------------------------------------------------------------------------------ all modules
def named_modules(
    self: nn.Module,
    memo: set[nn.Module] | None = None,
    prefix: str = "",
    remove_duplicate: bool = True,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of a site and all modules inside; a loop in a forward gets no layers."""
    memo = set() if memo is None else memo
    if self in memo:
        return
    if remove_duplicate:
        memo.add(self)
    yield prefix, self
    for name, part in self.__dict__["_modules"].items():
        if name == SLOT:
            compiled = torch.compiler.is_dynamo_compiling()
            if _loops_in_compiled() if compiled else _loops_in_forward(sys._getframe(1)):
                continue
        if part is not None:
            inside = f"{prefix}.{name}" if prefix else name
            yield from part.named_modules(memo, inside, remove_duplicate)


def _loops_in_compiled() -> bool:
    """True if code that is compiled asks for the modules, and not for their parameters."""
    guards: Any = sys.modules["torch._guards"]  # the compiler has imported it; it is slow to import
    names = [each.name for each in guards.TracingContext.extract_stack()]
    return nn.Module._named_members.__name__ not in names


# As torch.compiler.assume_constant_result does, which imports the compiler.
_loops_in_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _loops_in_forward(frame: FrameType | None) -> bool:
    """True if the code that asks for the modules is somebody's own, and runs in a forward."""
    while frame is not None and frame.f_code in WALKS:
        frame = frame.f_back
    if frame is None or _package(frame) in MEAN_ALL:
        return False
    if RUNNING.get():
        return True
    while frame is not None and frame.f_code is not CALL:
        if frame.f_code.co_name == "forward" and _package(frame) not in MEAN_ALL:
            given = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            if isinstance(given, nn.Module):
                return True
        if frame.f_globals is vars(checkpoint):
            return True  # it may run a part of a forward again
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


WALKS = {each.__code__ for each in (nn.Module.modules, nn.Module.named_modules, named_modules)}
CALL = nn.Module._call_impl.__code__  # hooks run there too, which are in no forward


def _without_stack(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Return another object with the parts of a module, of the class `base`, but its stack."""
    plain = object.__new__(base)
    parts = {name: part for name, part in module.__dict__["_modules"].items() if name != SLOT}
    object.__setattr__(plain, "__dict__", {**module.__dict__, "_modules": parts})
    return plain
