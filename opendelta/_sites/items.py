"""Show the children of a module that carries deltas, as a list of modules or a loop takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

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
        stack = stack_of(self)
        owners = [name for name, ly in stack.in_order() if ly.stand_in is not None] if stack else []
        if owners:
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


def _without_stack(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Return another object with the parts of a module, of the class `base`, but its stack."""
    plain = object.__new__(base)
    parts = {name: part for name, part in module.__dict__["_modules"].items() if name != SLOT}
    object.__setattr__(plain, "__dict__", {**module.__dict__, "_modules": parts})
    return plain
