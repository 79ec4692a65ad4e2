"""Note how a site is used: by calls, to which gradients come, or by other code that reads it."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import tensors
from .._modules.calls import every
from .stack import Stack, acting_on, stack_of

KEY = "uses?"  # no delta can have this name
LOOKS = {  # what code asks of a weight that it does not compute with
    "data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_contiguous", "is_cuda",
    "is_meta", "layout", "ndim", "norm", "numel", "requires_grad", "requires_grad_", "shape",
    "size", "stride",
}  # fmt: skip


class Uses:
    """The uses of a site.

    Attributes:
        read: other code has read its weight, with gradients on.
        called: it has been called.
        reached: how often gradients came to what a delta gave in a call.
    """

    def __init__(self) -> None:
        self.read = self.called = False
        self.reached: Counter[str] = Counter()


def uses_of(stack: Stack) -> Uses:
    """Return the uses of a site; a site whose class does not note them has none."""
    return stack.__dict__.setdefault(KEY, Uses())


def noting(forward: Callable[..., Any]) -> dict[str, Any]:
    """Return the forward of a site, and its property `weight`, that note each use."""

    @functools.wraps(forward)
    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stack = stack_of(self)
        if stack is None:
            return forward(self, *args, **kwargs)
        uses = uses_of(stack)
        if not torch.compiler.is_exporting():
            uses.called = True
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        before = uses.read
        output = forward(self, *args, **kwargs)
        uses.read = before
        if (given := of_gradients(output)) is not None:
            names = {layer.record.name for layer in acting_on(stack)}
            given.register_hook(lambda _: uses.reached.update(names))
        return output

    def read(self: nn.Module) -> Tensor | None:
        stack = stack_of(self)
        if stack is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            frame = sys._getframe(1)
            if _asked(frame.f_code, frame.f_lasti) not in LOOKS:
                uses_of(stack).read = True
        return tensors.stored(self, "weight")

    def write(self: nn.Module, value: Tensor) -> None:
        self.__dict__["weight"] = value  # of a replica

    return {"forward": noted, "weight": property(read, write)}


@functools.lru_cache(maxsize=1024)
def _asked(code: CodeType, at: int) -> str:
    """Return the name of the attribute that code asks of what its step `at` gives; or ""."""
    steps = itertools.dropwhile(lambda step: step.offset <= at, dis.get_instructions(code))
    after = next(steps, None)
    asks = after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD")
    return after.argval if after is not None and asks else ""


def of_gradients(output: Any) -> Tensor | None:
    """Return the first tensor in an output that gradients come back to."""
    return next((t for t in every(Tensor, output, objects=True) if t.requires_grad), None)
