"""Convert the tensors of a delta to another dtype, or move them to another device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .._backbone.backbone import Backbone
from .._backbone.patterns import no_match
from .._layers.dtypes import dtype_for
from .._modules.tensors import is_finite, is_sharded, lasting
from ..errors import DeltaError, OptionError, shown, to_the_end
from .base import BaseDelta
from .options import DTYPES


def is_dtype(target: Any) -> bool:
    """True if `target` is a dtype of torch, or the name of one that the option `dtype` takes."""
    return isinstance(target, torch.dtype) or str(target).removeprefix("torch.") in DTYPES


@lasting()
def carry(delta: BaseDelta, device: Any) -> None:
    """Move all tensors of a delta to a device; see `Delta.to`."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(
            f"{delta.name!r}.to({shown(device)}): give a device, or a dtype: {', '.join(DTYPES)}"
        ) from None
    delta.record.require_apart("cannot move")
    if device.type == "meta" or any(is_sharded(p) or p.is_meta for p in delta.parameters()):
        raise DeltaError(
            f"cannot move {delta.name!r} to {device}: its tensors have no values there, or are "
            "sharded or offloaded; move the backbone, and its deltas move along"
        )
    for layer in delta.layers.values():
        layer.to(device)


@lasting()
def convert(delta: BaseDelta, dtype: Any) -> None:
    """Convert all tensors of a delta, and let `dtype` be its option; see `Delta.to`."""
    config = dataclasses.replace(delta.config, dtype=str(dtype)).fixed()
    delta.record.require_apart("cannot convert")
    backbone = Backbone.of(delta.backbone_model)
    if any(is_sharded(p) or (p.is_meta and not backbone.is_meta) for p in delta.parameters()):
        raise DeltaError(
            f"cannot convert {delta.name!r}: its tensors are sharded or offloaded; convert it "
            "before that, or pass dtype= when it is made"
        )
    for where in delta.layers:
        if where not in backbone.modules:
            raise no_match(where, backbone.modules, backbone.model)
        wanted = dtype_for(config.dtype, backbone.device_and_dtype_of(where)[1])
        for key, tensor in delta.layers[where].state_dict(prefix=delta.prefix(where)).items():
            if (
                is_finite(tensor)
                and tensor.is_floating_point()
                and not is_finite(tensor.to(wanted))
            ):
                raise DeltaError(
                    f"cannot convert {delta.name!r}: {key} holds values that are too large for "
                    f"{wanted}; bfloat16 has the range of float32"
                )

    def apply() -> None:
        for where, layer in delta.layers.items():
            device, computes = backbone.device_and_dtype_of(where)
            layer.fit(backbone.modules[where], device, computes, config.dtype)
        delta.record.config = config

    to_the_end(apply)
