"""Wrappers that other libraries put on `module.forward`, and how to find our forward inside them.

For example accelerate's hooks and tensor parallelism set `module.forward` to a function of theirs.
The function keeps the module's bound forward in `_old_forward` or in a closure. The forward of a
site must be the innermost one. So when a module's class changes, the bound forward inside such a
wrapper must change too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..errors import printable

ATTRIBUTES = ("forward", "_old_forward")
LONGEST = 200  # characters of a name in a message
Setter = Callable[[Any], None]


def _held(module: nn.Module) -> Iterator[tuple[Any, Setter]]:
    """Yield each callable that wrappers on the instance keep, and a function to replace it."""
    own = module.__dict__
    todo = [(own[k], functools.partial(own.__setitem__, k)) for k in ATTRIBUTES if k in own]
    seen: set[FunctionType] = set()
    while todo:
        value, setter = todo.pop()
        yield value, setter
        if isinstance(value, functools.partial):
            value = value.func
        if not isinstance(value, FunctionType) or value in seen:
            continue
        seen.add(value)
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a cell that is still empty
                continue
            if isinstance(content, FunctionType | MethodType | functools.partial | nn.Module):
                todo.append((content, functools.partial(setattr, cell, "cell_contents")))


def holders(module: nn.Module) -> list[Setter]:
    """Return a setter for each place where a wrapper keeps the bound forward of the class."""
    own = type(module).forward
    return [
        setter
        for value, setter in _held(module)
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is own
    ]


def hides_forward(module: nn.Module) -> bool:
    """True if a wrapper on the instance would keep a forward of the class from ever running."""
    return "forward" in module.__dict__ and not holders(module)


def replacement(module: nn.Module) -> str:
    """Return the name of the function in the place of a module's own forward, for messages."""
    own = module.__dict__["forward"]
    while isinstance(own, functools.partial):
        own = own.func
    own = own if hasattr(own, "__qualname__") else getattr(own, "__func__", type(own))
    name = getattr(own, "__qualname__", type(own).__qualname__)
    return printable(f"{getattr(own, '__module__', None) or '?'}.{name}", LONGEST)


def closes_over(module: nn.Module, modules: Collection[int]) -> bool:
    """True if a function on the instance keeps, in a closure, one of `modules` or its method.

    A deep copy of `module` has the same function, and runs the old module.

    Args:
        modules: ids of modules.
    """
    own = [id(value) for key, value in module.__dict__.items() if key in ATTRIBUTES]
    kept = [value for value, _ in _held(module) if id(value) not in own]
    return any(id(getattr(value, "__self__", value)) in modules for value in kept)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` another class, and the wrappers on it the forward of this class."""
    setters = holders(module)
    module.__class__ = cls
    for setter in setters:
        setter(MethodType(cls.forward, module))


def placing_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on `module` that name the device where it computes."""
    hook = module.__dict__.get("_hf_hook")
    every = getattr(hook, "hooks", [hook])  # a SequentialHook holds several
    return [each for each in every if getattr(each, "execution_device", None) is not None]


def computing_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate's hooks bring the tensors of `module`, or None."""
    hooks = placing_hooks(module)
    return torch.device(hooks[-1].execution_device) if hooks else None


def is_offloaded(module: nn.Module) -> bool:
    """True if accelerate keeps tensors of `module` elsewhere, and loads them for each run."""
    return any(getattr(hook, "offload", False) for hook in placing_hooks(module))


def loads_inside(module: nn.Module) -> bool:
    """True if accelerate loads all tensors inside `module` for each run, by their old names."""
    return any(
        getattr(hook, "offload", False) and hook.place_submodules for hook in placing_hooks(module)
    )
