"""Fill the buffers that are made from a seed and not saved, at the start and where they were lost.

A module that has such buffers fills them by its method `seed()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def fill(module: Any) -> None:
    """Let a module fill its buffers by its method `seed`, if it has one."""
    if hasattr(type(module), "seed"):
        with torch.device("cpu"), torch.no_grad():  # a default device of "meta" gives no values
            module.seed()


def unsaved(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the buffers that no state dict has, of the modules that fill them by a seed."""
    for module in modules:
        if hasattr(type(module), "seed"):
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    yield module, name, buffer


def moved(modules: list[nn.Module], move: Callable[[], Any], by: Callable[[Tensor], Any]) -> None:
    """Run `move`, which puts `by` of each tensor in its place; fill the buffers that it lost.

    Those on the meta device have lost their values, and `to_empty` keeps none.
    """
    before = {id(module): buffer for module, _, buffer in unsaved(modules)}
    move()
    lost = {
        id(module): module
        for module, _, buffer in unsaved(modules)
        if _is_real(buffer) and (before[id(module)].is_meta or not _keeps(by, before[id(module)]))
    }
    for module in lost.values():
        fill(module)


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not tensor.is_meta


def _keeps(by: Callable[[Tensor], Any], like: Tensor) -> bool:
    """True if `by` keeps values: tried on integers that no memory holds by chance."""
    numbers = torch.arange(8, device=like.device) + time.time_ns()
    return not _is_real(numbers) or torch.equal(by(numbers).cpu(), numbers.cpu())


def beside(own: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Give memory to buffers on the meta device, where the parameters of `own` are, and fill them.

    They stay there if a state dict gave the parameters memory, as it has no values for them.
    """
    real = next((p for p in own._parameters.values() if p is not None and not p.is_meta), None)
    lost = [] if real is None else [found for found in unsaved(modules) if found[2].is_meta]
    for module, name, buffer in lost:
        module._buffers[name] = torch.empty_like(buffer, device=real.device)  # type: ignore[union-attr]
    for module in {id(module): module for module, _, _ in lost}.values():
        fill(module)
