"""Where a module computes, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..names import SLOT
from . import wrappers
from .tensors import FLOATS


def _tensors(
    module: nn.Module, computing: torch.device | None
) -> Iterator[tuple[Tensor, torch.device]]:
    """The tensors of `module` without those of deltas, its own first, and where they compute."""
    computing = wrappers.computing_device(module) or computing
    for own in (module._parameters, module._buffers):
        for tensor in own.values():
            if tensor is not None:
                yield tensor, computing or tensor.device
    for name, child in module._modules.items():
        if child is not None and name != SLOT:
            yield from _tensors(child, computing)


def is_meta(module: nn.Module) -> bool:
    """Whether nothing in `module` has memory, or gets some when it computes."""
    return all(where.type == "meta" for _, where in _tensors(module, None))


def device_and_dtype(
    chain: Iterable[nn.Module], on_meta: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Where a delta on the first module of `chain` computes, and in what.

    The chain goes on with the module's ancestors, and the first floating tensor in it decides: a
    quantised module has none of its own, and the backbone around it tells what it computes in.
    What accelerate offloaded is on the meta device, and computes where a hook at or around it says.

    Args:
        on_meta: everything in the chain is known to be on the meta device.
    """
    device = meta = None
    dtype = None
    for module in chain:
        for tensor, where in _tensors(module, None):
            meta = meta or (where if where.type == "meta" else None)
            device = device or (where if where.type != "meta" else None)
            dtype = dtype or (tensor.dtype if tensor.dtype in FLOATS else None)
            if dtype is not None and (device is not None or on_meta):
                return device or where, dtype
    return device or meta or torch.device("cpu"), dtype or torch.get_default_dtype()
