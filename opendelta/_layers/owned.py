"""Layers that no method writes: modules that a delta owns, and tensors that its layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import calls
from .._modules.tensors import FLOATS
from .base import Acts, DeltaLayer, Params, Passive
from .dtypes import dtype_for


class SharedTensors(Passive):
    """Holds the tensors that all layers of a delta share; it is on a module around all of them."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.tensors = shared

    def fold(self, params: Params) -> Params:
        return params


class OwnedModule(DeltaLayer):
    """The delta's own copy of a module; it acts in the module's place (`modules_to_save`).

    If the copy has another dtype than the module, it computes in its own: inputs are cast to it,
    outputs are cast back to the module's.
    """

    acts = Acts.INSTEAD
    sees_module = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def seeded(self) -> list[nn.Module]:
        """Return none: a method `seed` of the copied module is its own."""
        return []

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not by __call__: hooks for all modules have seen the site's call already.
        run, dtypes = self.module.forward, _differing(call.module, self.module)  # type: ignore[attr-defined]
        if dtypes is None:
            return run(*args, **kwargs)
        theirs, ours = dtypes
        args, kwargs = _cast((args, kwargs), theirs, ours)
        return _cast(run(*args, **kwargs), ours, theirs)

    @property
    def stand_in(self) -> nn.Module:
        """Return the copy."""
        return self.module

    def fit(
        self, module: nn.Module, device: torch.device, computes: torch.dtype, asked: str | None
    ) -> None:
        """Move to the device where `module` computes; compare each tensor with that of `module`."""
        if device.type != "meta" and any(p.is_meta for p in self.parameters()):
            return  # accelerate offloaded the copy, and loads its values for each run
        self.to(device=device)
        theirs = _dtypes(module)

        def wanted(name: str, tensor: Tensor) -> torch.dtype:
            return dtype_for(asked, theirs.get(name, computes), tensor.dtype)

        convert(self.module, wanted)


def convert(module: nn.Module, wanted: Callable[[str, Tensor], torch.dtype]) -> None:
    """Give the ordinary floating tensors of `module` the dtype that `wanted(name, tensor)` says.

    Quantised and sharded tensors stay as they are.
    """
    for name, tensor in _floats(module):
        dtype = wanted(name, tensor)
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(dtype)


def convert_like(module: nn.Module, other: nn.Module) -> None:
    """Give the ordinary floating tensors of `module` the dtype of those of the same name."""
    theirs = _dtypes(other)
    convert(module, lambda name, tensor: theirs.get(name, tensor.dtype))


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS:
            yield name, tensor


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in _floats(module)}


def _differing(one: nn.Module, other: nn.Module) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the two dtypes of the first parameter of the same name that differ; None: none do."""
    theirs, ours = _tensors_of(one), _tensors_of(other)
    for key in theirs.keys() & ours.keys():
        dtypes = theirs[key].dtype, ours[key].dtype
        if dtypes[0] != dtypes[1] and dtypes[0] in FLOATS and dtypes[1] in FLOATS:
            return dtypes
    for key, child in other._modules.items():
        inside = dict(one._modules.items()).get(key)
        if child is not None and inside is not None and (found := _differing(inside, child)):
            return found
    return None


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters; on a DataParallel replica, the tensors in their place."""
    own = module.__dict__.get("_former_parameters") or module._parameters
    return {key: parameter for key, parameter in own.items() if parameter is not None}


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Return `value` with the tensors of one dtype, at any depth, in another."""
    return calls.map_tensors(lambda t: t.to(after) if t.dtype == before else t, value)
