"""Note how a site is used: by calls, to which gradients come, or by other code that reads it."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.calls import every
from ..names import SLOT
from .stack import Stack, acting_on, stack_of

KEY = "uses?"  # no delta can have this name
LOOKS = {  # what code asks of a weight that it does not compute with
    "data", "data_ptr", "detach", "device", "dim", "dtype", "element_size", "grad", "is_contiguous",
    "is_cuda", "is_meta", "layout", "ndim", "norm", "numel", "requires_grad", "requires_grad_",
    "shape", "size", "std", "stride",
}  # fmt: skip
CALLS = ("PRECALL", "CALL", "CACHE")


class Uses:
    """The uses of a site.

    Attributes:
        reads: how often other code has read its weight, or a module inside it, while deltas act and
            gradients are on.
        judged: the reads up to the end of the last backward pass.
        again: the reads of code that runs a second time, inside a backward pass.
        called: it has been called.
        reached: how often gradients came to what a delta gave in a call.
    """

    def __init__(self) -> None:
        self.reads, self.judged, self.again, self.called = 0, 0, 0, False
        self.reached: Counter[str] = Counter()


def uses_of(stack: Stack) -> Uses:
    """Return the uses of a site, as far as its class notes them."""
    return stack.__dict__.setdefault(KEY, Uses())


def noting(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a site that notes its calls."""

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
        before = uses.reads
        output = forward(self, *args, **kwargs)
        uses.reads = before
        if torch.is_grad_enabled():
            names = {layer.record.name for layer in acting_on(stack)}
            when_gradients_come(output, lambda: uses.reached.update(names))
        return output

    return noted


class Reading:
    """An attribute of a site's class: it gives a parameter or a child, and notes that it is read.

    It stands behind what the module itself has under this name, as pruning and old norms put there.

    Args:
        name: that of the attribute.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, _: Any = None) -> Any:
        if module is None:
            return self
        for parts in (module._parameters, module._modules):
            if self.name in parts:
                note_read(module)
                return parts[self.name]
        raise AttributeError(self.name)  # then torch looks at the buffers


def readings(module: nn.Module, base: type[nn.Module]) -> tuple[str, ...]:
    """Return the attributes of a module, of the class `base`, that `Reading` can note.

    Those are the weight, unless the class has one of its own, as a parametrization gives it, and
    the modules inside, whose weights a loss may read.
    """
    names = ["weight", *(name for name, child in module._modules.items() if child is not None)]
    return tuple(name for name in names if name != SLOT and not hasattr(base, name))


def note_read(module: nn.Module) -> None:
    """Count that code, which called the function that calls this, reads a site.

    It does not count if that code only looks at what it gets.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        frame, stack = sys._getframe(2), stack_of(module)
        if stack is not None and not _only_looks(frame.f_code, frame.f_lasti) and acting_on(stack):
            uses = uses_of(stack)
            uses.reads += 1
            uses.again += torch._C._current_graph_task_id() != -1


@functools.lru_cache(maxsize=1024)
def _only_looks(code: CodeType, at: int) -> bool:
    """True if code asks what its step `at` gives for one of `LOOKS`, maybe by other attributes."""
    after = itertools.dropwhile(lambda step: step.offset <= at, dis.get_instructions(code))
    for step in after:
        if step.opname in CALLS:
            continue
        if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return False
        if step.argval in LOOKS:
            return True
    return False


def when_gradients_come(output: Any, function: Callable[[], None]) -> bool:
    """Run a function whenever gradients come back to the tensors of an output; False: none can."""
    nodes = {tensor.grad_fn for tensor in _computed(output)}
    for node in nodes:
        node.register_prehook(lambda _: function())
    return bool(nodes)


def _computed(output: Any) -> Iterator[Any]:
    return (t for t in every(Tensor, output, objects=True) if t.grad_fn is not None)
