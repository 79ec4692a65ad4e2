"""Find deltas whose settings spoil training: frozen, scaled to 0, without dropout, narrow, ..."""

from __future__ import annotations

from .._backbone.backbone import Backbone
from .._layers.dtypes import BACKBONE, dtype_for
from .._modules.tensors import HALVES
from ..names import SLOT, join, parent


def all_frozen(backbone: Backbone) -> list[str]:
    """Return the names of the active deltas with parameters, if no parameter of them trains."""
    trains: dict[str, bool] = {}
    for _, name, layer in backbone.delta_layers():
        for parameter in layer.parameters() if layer.record.active else ():
            trains[name] = trains.get(name, False) or parameter.requires_grad
    return [] if any(trains.values()) else list(trains)


def scaled_to_0(backbone: Backbone) -> list[str]:
    """Return the active deltas whose layers train, multiplied by 0: by name, or some by layer."""
    still: dict[str, dict[str, bool]] = {}
    for where, name, layer in backbone.delta_layers():
        if (
            layer.scales
            and layer.record.active
            and any(p.requires_grad for p in layer.parameters())
        ):
            # A layer that sees the weight, as DoRA's, trains more than what is scaled.
            factor = 1 if layer.sees_module else getattr(layer, "scaling", 1)
            own = still.setdefault(name, {})
            own[join(where, SLOT, name)] = layer.record.scale == 0 or factor == 0
    named = [
        ([name] if all(own.values()) else [n for n in own if own[n]]) for name, own in still.items()
    ]
    return [name for names in named for name in names]


def without_dropout(backbone: Backbone) -> list[str]:
    """Return the delta layers with dropout, if none of them drops."""
    found: dict[str, bool] = {}
    for where, name, layer in backbone.delta_layers():
        parts = [layer.training] if getattr(layer, "dropout", 0) else []
        parts += [part.training for part in layer.modules() if getattr(part, "p", 0)]
        if parts:
            found[join(where, SLOT, name)] = any(parts)
    return [] if any(found.values()) else list(found)


def narrow(backbone: Backbone) -> list[str]:
    """Return the trainable 16-bit tensors of deltas that are meant to be wider."""
    return [
        join(where, SLOT, name, key)
        for where, name, layer in backbone.delta_layers()
        if (asked := layer.record.config.dtype) != BACKBONE
        for key, p in layer.named_parameters()
        if p.requires_grad and p.dtype in HALVES and dtype_for(asked, p.dtype) not in HALVES
    ]


def mixed_modes(backbone: Backbone) -> dict[str, str]:
    mixed = {}
    for name, module in backbone.modules.items():
        around = backbone.modules.get(parent(name), backbone.model)
        if module.training and not around.training:
            mixed[name] = "train"
    for where, name, layer in backbone.delta_layers():
        modes = {part.training for part in layer.modules()}
        if modes != {backbone.modules[where].training}:
            mixed[join(where, SLOT, name)] = "train" if True in modes else "eval"
    return mixed
