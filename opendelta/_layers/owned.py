"""Layers that no method writes: modules that a delta owns, and tensors that its layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .base import Acts, DeltaLayer, Params


class SharedTensors(DeltaLayer):
    """Holds the tensors that all layers of a delta share; it is on a module around all of them."""

    acts = Acts.SERVES
    computes = False

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.tensors = shared

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    def fold(self, params: Params) -> Params:
        return params


class OwnedModule(DeltaLayer):
    """The delta's own copy of a module; it acts in the module's place (`modules_to_save`)."""

    acts = Acts.INSTEAD

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not by __call__: hooks for all modules have seen the site's call already.
        return self.module.forward(*args, **kwargs)

    @property
    def stand_in(self) -> nn.Module:
        """Return the copy."""
        return self.module

    def fit(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Move to the device where `module` computes; take each parameter's dtype from `module`."""
        if device.type != "meta" and any(p.is_meta for p in self.parameters()):
            return  # accelerate offloaded the copy, and loads its values for each run
        self.to(device=device)
        like = dict(module.named_parameters())
        for name, parameter in self.module.named_parameters():
            if name in like and parameter.dtype != like[name].dtype:
                parameter.data = parameter.data.to(like[name].dtype)
