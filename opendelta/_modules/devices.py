"""Find the device and the dtype in which a module computes."""

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
    """Yield each tensor of `module` and the device where it computes, without deltas' tensors.

    The module's own tensors come first.
    """
    computing = wrappers.computing_device(module) or computing
    for own in (module._parameters, module._buffers):
        for tensor in own.values():
            if tensor is not None:
                yield tensor, computing or tensor.device
    for name, child in module._modules.items():
        if child is not None and name != SLOT:
            yield from _tensors(child, computing)


def is_meta(module: nn.Module) -> bool:
    """True if every tensor of the module is on the meta device and no hook will load it."""
    return all(where.type == "meta" for _, where in _tensors(module, None))


def device_and_dtype(
    chain: Iterable[nn.Module], on_meta: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype for a delta on the first module of `chain`.

    The chain holds the module and then its ancestors. The first floating tensor in it decides: for
    a quantised module, which has no such tensor, that is a tensor of the backbone around. A tensor
    that accelerate offloaded is on the meta device; a hook at or around it names its device.

    Args:
        on_meta: all tensors in the chain are known to be on the meta device.
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
