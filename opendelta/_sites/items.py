"""Show the children of a module that carries deltas, as a list of modules or a loop takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import nn

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
        shown = (showing.copy_of(self) if copied else None) or _without_stack(self, base)
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
        self._modules.pop(SLOT, None)
        try:
            return getattr(base, verb)(self, *args, **kwargs)
        finally:
            if stack is not None:
                self._modules[SLOT] = stack

    return change


def loops(base: Any) -> bool:
    """True if the forward of a class, or a method that it names, goes over children."""
    code = _code_of(base.forward)
    if code is None or issubclass(base, LISTS):
        return False
    named = [name for name in code.co_names if not hasattr(nn.Module, name)]
    codes = [code, *filter(None, (_code_of(getattr(base, name, None)) for name in named))]
    inner = [each for own in codes for each in own.co_consts if isinstance(each, CodeType)]
    return any(LOOPS & {*each.co_names} for each in (*codes, *inner))


def _code_of(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


def without_stack(base: Any, module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module, of the class `base`, in which its stack is no child.

    What it sets as attributes is set on the module.
    """

    @functools.wraps(base.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        plain = _without_stack(module, base)
        before = dict(plain.__dict__)
        try:
            return base.forward(plain, *args, **kwargs)
        finally:
            after = plain.__dict__
            module.__dict__.update({k: v for k, v in after.items() if before.get(k) is not v})

    return forward


def _without_stack(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Return another object with the parts of a module, of the class `base`, but its stack."""
    plain = object.__new__(base)
    parts = {name: part for name, part in module._modules.items() if name != SLOT}
    object.__setattr__(plain, "__dict__", {**module.__dict__, "_modules": parts})
    return plain
