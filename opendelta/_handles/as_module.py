"""The parts of `nn.Module` that a delta has, as it was one in OpenDelta 0.3."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import nn

from .._backbone.counting import statistics
from .._checkpoint.loading import refill
from .._deltas import former
from .._deltas.base import BaseDelta
from .._deltas.registry import METHOD_OF_03, OWN_METHOD
from ..errors import DeltaError
from ..interop import legacy

AnyDelta = TypeVar("AnyDelta", bound=BaseDelta)
CASTS = {"half": "float16", "bfloat16": "bfloat16", "float": "float32", "double": "float64"}
GONE = {
    "backend": "it is 'hf'",
    "create_config_from_model": "the options are delta.config",
    "default_exclude_modules": "there are none; use exclude_modules",
    "default_unfrozen_modules": "use delta.unfrozen_modules",
    "find_key": "use delta.modified_modules, or opendelta.plan before",
    "set_active_state_dict": "use delta.freeze_module(set_state_dict=True)",
    "structure_mapping": "use opendelta.roles(model)",
}


class AsModule(BaseDelta):
    """The part of `nn.Module`, and of OpenDelta 0.3's `DeltaBase`, that programs use.

    The options are attributes: `delta.lora_r` is `delta.config.lora_r`.
    """

    if not TYPE_CHECKING:  # else a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            if self._is_option(name):
                return getattr(self.record.config, name)
            if name in ("_modules", "_parameters"):  # a Trainer takes it for a model
                self()
            if name in CASTS:
                return functools.partial(self.to, CASTS[name])  # type: ignore[attr-defined]
            hint = f"; {OWN_METHOD}" if name in METHOD_OF_03 else ""
            hint = f", as in OpenDelta 0.3; {GONE[name]}" if name in GONE else hint
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{hint}",
                name=name,
                obj=self,
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_option(name) and not hasattr(type(self), name):
            setattr(self.record.config, name, value)  # raises
        super().__setattr__(name, value)

    def _is_option(self, name: str) -> bool:
        record = self.__dict__.get("record")
        return record is not None and name in record.config.__dataclass_fields__

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: the backbone is the model that runs.

        Raises:
            DeltaError: always.
        """
        raise DeltaError(
            f"{self!r} does not run by itself: call, train and give to a Trainer the backbone, "
            f"which holds its layers (here {type(self.backbone_model).__name__}, "
            "delta.backbone_model)"
        )

    forward = __call__

    # -------------------------------------------------------------------- its parts
    @property
    def training(self) -> bool:
        """True if a layer is in training mode."""
        return any(layer.training for layer in self.layers.values())

    @property
    def delta_modules(self) -> nn.ModuleList:
        """Return the layers in a list."""
        return nn.ModuleList(self.layers.values())

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (full name of the site, layer)."""
        yield from self.layers.items()

    def children(self) -> Iterator[nn.Module]:
        """Yield the layers."""
        yield from self.layers.values()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (full name, module) of the layers and of the modules inside them."""
        for where, layer in self.layers.items():
            yield from layer.named_modules(prefix=self.prefix(where).removesuffix("."))

    def modules(self) -> Iterator[nn.Module]:
        """Yield the layers and the modules inside them."""
        return (module for _, module in self.named_modules())

    def apply(self: AnyDelta, fn: Callable[[nn.Module], Any]) -> AnyDelta:
        """Call a function with each layer and each module inside it."""
        for layer in self.layers.values():
            layer.apply(fn)
        return self

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (full name, buffer) of the layers and of the modules inside them."""
        for where, layer in self.layers.items():
            yield from layer.named_buffers(prefix=self.prefix(where).removesuffix("."))

    def buffers(self) -> Iterator[torch.Tensor]:
        """Yield the buffers of the layers and of the modules inside them."""
        return (buffer for _, buffer in self.named_buffers())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the delta's parameters, or set them to zero."""
        for layer in self.layers.values():
            layer.zero_grad(set_to_none)

    def cuda(self: AnyDelta, device: int | torch.device | None = None) -> AnyDelta:
        """Move the delta's tensors to a CUDA device; see `to`."""
        return self.to("cuda" if device is None else torch.device("cuda", device))  # type: ignore[attr-defined, arg-type]

    def cpu(self: AnyDelta) -> AnyDelta:
        """Move the delta's tensors to the CPU; see `to`."""
        return self.to("cpu")  # type: ignore[attr-defined]

    def find_module(self, root_module: nn.Module, key: str) -> tuple[nn.Module, str, nn.Module]:
        """Return the parent of the module `key` of `root_module`, the last step, and the module."""
        parent, _, last = key.rpartition(".")
        holder = root_module.get_submodule(parent)
        return holder, last, holder.get_submodule(last)

    # -------------------------------------------------------------------- its counts
    @property
    def stat(self) -> dict[str, float]:
        """Return the counts and shares of the backbone's parameters, and CUDA memory in GiB."""
        return module_statistics(self.backbone_model)

    def trainable_parameters(self, module: nn.Module | None = None) -> list[nn.Parameter]:
        """Return the parameters that train of `module`. None: of the delta."""
        parameters = (self if module is None else module).parameters()
        return [parameter for parameter in parameters if parameter.requires_grad]

    def num_trainable_parameters(self, module: nn.Module | None = None) -> int:
        """Count the parameters that train of `module`. None: of the delta."""
        return sum(parameter.numel() for parameter in self.trainable_parameters(module))

    def num_total_parameters(self, module: nn.Module | None = None) -> int:
        """Count the parameters of `module`. None: of the delta."""
        return sum(p.numel() for p in (self if module is None else module).parameters())

    def trainable_parameters_names(self, module: nn.Module | None = None) -> list[str]:
        """Return the names of the parameters that train of `module`. None: of the backbone."""
        of = self.backbone_model if module is None else module
        return [name for name, parameter in of.named_parameters() if parameter.requires_grad]

    def frozen_parameters_names(self, module: nn.Module | None = None) -> list[str]:
        """Return the names of the frozen parameters of `module`. None: of the backbone."""
        of = self.backbone_model if module is None else module
        return [name for name, parameter in of.named_parameters() if not parameter.requires_grad]

    # -------------------------------------------------------------------- its files
    def save_checkpoint(
        self,
        path: str | os.PathLike = "./delta_checkpoints/",
        save_func: Any = torch.save,
        backbone_model: nn.Module | None = None,
    ) -> None:
        """Save the delta; the same as `save_finetuned`.

        Args:
            path: the folder; it is made if need be.
            save_func: as OpenDelta 0.3 had it; only this value is possible.
            backbone_model: as OpenDelta 0.3 had it; only the delta's own backbone is possible.
        """
        own = {"backbone_model": (backbone_model, self.backbone_model)}
        former.check_checkpoint("save_checkpoint", {"save_func": (save_func, torch.save), **own})
        self.save_finetuned(path)  # type: ignore[attr-defined]

    def load_checkpoint(
        self,
        path: str | os.PathLike,
        load_func: Any = torch.load,
        backbone_model: nn.Module | None = None,
    ) -> None:
        """Copy the values of the delta that `save_finetuned` or OpenDelta 0.3 wrote into this one.

        A folder of 0.3's own `save_checkpoint` has no config: it gives all deltas on the backbone
        their values.

        Args:
            path: the folder.
            load_func: as OpenDelta 0.3 had it; only this value is possible.
            backbone_model: as OpenDelta 0.3 had it; only the delta's own backbone is possible.

        Raises:
            DeltaLoadError: the folder holds another delta, or its tensors do not fit.
        """
        own = {"backbone_model": (backbone_model, self.backbone_model)}
        former.check_checkpoint("load_checkpoint", {"load_func": (load_func, torch.load), **own})
        if (file := legacy.bare_checkpoint(path)) is not None:
            legacy.load_state_dict(self.backbone_model, file)
        else:
            refill(path, self)


def module_statistics(module: nn.Module | BaseDelta) -> dict[str, float]:
    """Return the counts and shares of a module's or a delta's parameters, and CUDA memory in GiB.

    Of a delta all parameters are a delta's.
    """
    every, devices = list(module.parameters()), range(torch.cuda.device_count())
    total = sum(parameter.numel() for parameter in every)
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    own = total if isinstance(module, BaseDelta) else statistics(module).delta_parameters
    return {
        "total_parameters": total,
        "trainable_parameters": trained,
        "trainable_ratio": trained / max(1, total),
        "delta_parameters": own,
        "delta_ratio": own / max(1, total),
        "cudamem": sum(torch.cuda.memory_allocated(device) for device in devices) / 2**30,
        "maxcudamem": sum(torch.cuda.max_memory_allocated(device) for device in devices) / 2**30,
    }
