"""Let the layers of a site see its input as it was given, where its forward may write to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.base import Acts
from .._modules import calls, writing
from .._modules.tensors import memory_of

Call = Callable[..., Any]
KEY = "intact?"  # no delta can have this name


def note(stack: Any, module: nn.Module) -> None:
    """Look if the layers of a module need an input of their own, after a layer came or left."""
    layers = [*stack.values()]
    needs = any(layer.keeps_input or layer.acts is Acts.BEFORE for layer in layers)
    stack.__dict__[KEY] = needs and writing.may_write(module)


def is_needed(stack: Any) -> bool:
    """True if the layers of a stack need an input of their own."""
    return stack.__dict__.get(KEY, False)


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
        x = calls.first_given(args, kwargs)
        changed = x if isinstance(x, Tensor) and x.shape == self.x.shape else self.x
        return writing.through([(self.x, changed)], self.call, *args, **kwargs)

    def given(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return arguments with the input itself in the place of the copy; later, another copy."""
        x = calls.first_given(args, kwargs)
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
    x = calls.first_given(args, kwargs)
    if not isinstance(x, Tensor):
        return around(call)(*args, **kwargs)
    inner = Intact(call, x)
    args, kwargs = calls.replace_input(args, kwargs, inner.copy)
    return around(inner)(*args, **kwargs)
