"""Let the layers of a site see its input as it was given, where its forward may write to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import calls, writing
from .._modules.tensors import memory_of
from ..names import SLOT

Call = Callable[..., Any]
KEY = "intact?"  # no delta can have this name
CALL, CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
# Their forwards write to no input, but for what has an option `inplace`, or does so in its code.
LIBRARIES = {"torch", "torchvision", "timm", "transformers", "bitsandbytes", "torchao", "optimum"}


def note(stack: Any, module: nn.Module) -> None:
    """Look if the layers of a module need an input of their own, after a layer came or left."""
    stack.__dict__[KEY] = any(layer.keeps_input for layer in stack.values()) and _may_write(module)


def is_needed(stack: Any) -> bool:
    """True if the layers of a stack need an input of their own."""
    return stack.__dict__.get(KEY, False)


def _may_write(module: nn.Module) -> bool:
    """True if a forward of somebody's own, of TorchScript or in place may run in a module."""
    cls: Any = type(module)
    forward = getattr(cls, "forward", None)  # a script's class has none
    package = "" if forward is None else _package(inspect.unwrap(forward))
    if package not in LIBRARIES or module.__dict__.get("inplace", False):
        return True
    if package != "torch" and writing.writes(cls):
        return True
    inside = [child for key, child in module._modules.items() if key != SLOT and child is not None]
    return any(_is_changed(child) or _may_write(child) for child in inside)


def _is_changed(child: nn.Module) -> bool:
    """True if code of somebody's own may run around the forward of a class, or in its place."""
    own, cls = child.__dict__, type(child)
    if "forward" in own:
        return True
    if cls.__call__ is not CALL and _package(cls.__call__) not in LIBRARIES:
        return True
    if cls._call_impl is not CALL_IMPL and _package(cls._call_impl) not in LIBRARIES:
        return True
    hooks = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return any(_package(hook) not in (*LIBRARIES, "opendelta") for hook in hooks)


def _package(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0]


class Intact:
    """The forward of a module whose layers are given a copy of its input.

    It runs on the input itself, so that what it writes there is seen as without layers.

    Args:
        call: the forward.
        x: its first input.
    """

    def __init__(self, call: Callable[..., Any], x: Tensor) -> None:
        self.call, self.x, self.copy, self.ran = call, x, x.clone(), False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.given(args, kwargs)
        return self.call(*args, **kwargs)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return arguments with the input itself in the place of the copy; later, another copy."""
        x = calls.first_input(args, kwargs)
        if x is self.copy:
            new = self.copy.clone() if self.ran else self.x
            self.ran = True
            return calls.replace_input(args, kwargs, new)
        if not torch.compiler.is_compiling() and isinstance(x, Tensor) and self._holds(x):
            return calls.replace_input(args, kwargs, x.clone())
        return args, kwargs

    def _holds(self, x: Tensor) -> bool:
        """True if a tensor is a part of the copy, as the rows of a group are."""
        return memory_of(x) == memory_of(self.copy)


def around(stack: Any, call: Call, module: nn.Module, raw: bool) -> Call:
    """Return `call` with the layers of a stack around it, which get an input of their own."""
    return functools.partial(_run, functools.partial(stack.around, module=module), call)


def _run(around: Callable[[Call], Call], call: Call, /, *args: Any, **kwargs: Any) -> Any:
    x = calls.first_input(args, kwargs) if args or kwargs else None
    if not isinstance(x, Tensor):
        return around(call)(*args, **kwargs)
    inner = Intact(call, x)
    args, kwargs = calls.replace_input(args, kwargs, inner.copy)
    return around(inner)(*args, **kwargs)
