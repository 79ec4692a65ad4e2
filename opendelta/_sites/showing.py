"""Properties of a site's class that show folded weights, or the copy's parts, to other code."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.base import DeltaLayer
from .._modules import tensors
from ..names import SLOT
from .stack import Stack, shown_on, stack_of

BY_NAMES = ("torch.nn.utils._named_member_accessor", "accelerate.")
OWN: ContextVar[bool] = ContextVar("own", default=False)


@contextlib.contextmanager
def own_parts() -> Iterator[None]:
    """Let all sites show what they hold themselves, as code needs it that changes the backbone."""
    token = OWN.set(True)
    try:
        yield
    finally:
        OWN.reset(token)


def with_own_parts(base: Any, verb: str) -> Callable[..., Any]:
    """Return a method of a class, during which all sites show what they hold themselves."""

    @functools.wraps(getattr(base, verb))
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with own_parts():
            return getattr(base, verb)(self, *args, **kwargs)

    return run


def folded(name: str) -> property:
    """Return a property that shows a parameter with the deltas folded in, for a parent to read."""

    def show(stack: Stack, module: nn.Module, _: Any) -> Any:
        return stack.fold(tensors.stored_params(module)).get(name)

    return _shown(name, show)


def of_copy(name: str) -> property:
    """Return a property that shows a parameter, or a module inside, of the copy that acts."""

    def show(stack: Stack, _: nn.Module, own: Any) -> Any:
        copied = _copy_of(shown_on(stack))
        found = own if copied is None else getattr(copied, name)
        return found.to(own.dtype) if isinstance(found, Tensor) and found is not own else found

    return _shown(name, show)


def _goes_by_names(frame: FrameType) -> bool:
    """True if code is torch's or accelerate's that finds a tensor by its full name, to replace it.

    It looks for the module beside which the copy lies.
    """
    return frame.f_globals.get("__name__", "").startswith(BY_NAMES)


def _shown(name: str, show: Callable[[Stack, nn.Module, Any], Any]) -> property:
    def read(self: nn.Module) -> Any:
        own: Any = self._modules[name] if name in self._modules else tensors.stored(self, name)
        if own is None and name not in self._parameters:
            raise AttributeError(name)  # it was deleted
        stack = stack_of(self)
        if not stack or tensors.is_sharded(own):  # FSDP2 reads the parameter while it shards it
            return own
        if not torch.compiler.is_compiling() and (OWN.get() or _goes_by_names(sys._getframe(1))):
            return own
        return show(stack, self, own)

    def write(self: nn.Module, value: Tensor) -> None:
        # nn.Module stores Parameters elsewhere; only plain tensors of a replica come here.
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(read, write, delete)


def parts_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of all of a module that its copy has too: its tensors, the modules inside.

    Buffers are left out: code that reads them may write to them.
    """
    children = [name for name, child in module._modules.items() if child is not None]
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    computed = [name for name, value in module.__dict__.items() if isinstance(value, Tensor)]
    return tuple(name for name in (*own, *children, *computed) if name != SLOT)


def copy_of(site: nn.Module) -> nn.Module | None:
    """Return the copy of a site that acts and shows in its place; None: the site does."""
    stack = stack_of(site)
    if not stack or (not torch.compiler.is_compiling() and OWN.get()):
        return None
    return _copy_of(shown_on(stack))


def _copy_of(layers: list[DeltaLayer]) -> nn.Module | None:
    """Return the copy that acts in a module's place; None: the module does."""
    return next((ly.stand_in for ly in reversed(layers) if ly.stand_in is not None), None)


def itself(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Return another object with all that `module` holds, which shows no copy's parts.

    Args:
        base: the class of a site that shows none.
    """
    plain = object.__new__(base)
    object.__setattr__(plain, "__dict__", module.__dict__)
    return plain
