"""Buffers that change while a model trains, such as the statistics of a BatchNorm."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .._backbone.backbone import Backbone
from .._layers.base import Acts
from .._layers.record import Record
from ..errors import UnsavedWarning, listed, warn
from ..names import ancestors, join


def trains_in_place(module: nn.Module) -> bool:
    """True if a parameter of the module's own trains."""
    return any(p is not None and p.requires_grad for p in module._parameters.values())


def named(records: list[Record]) -> set[str]:
    """Return the names of the backbone's modules and tensors that are saved with deltas."""
    of_configs = {name for r in records for name in r.config.unfrozen_modules or ()}
    return of_configs.union(*(record.shared.excluded for record in records))


def moving(backbone: Backbone) -> list[str]:
    """Return the frozen normalisations whose statistics move in training, and are in no file.

    A normalisation does not count if an active delta's own copy takes its place.
    """
    records = backbone.records()
    layers = ((where, layer) for where, _, layer in backbone.delta_layers())
    copied = {w for w, ly in layers if ly.acts is Acts.INSTEAD and ly.record.active}
    kept = named(records) | copied
    return [
        name
        for name, module in backbone.modules.items()
        if isinstance(module, _NormBase) and module.running_mean is not None
        if not trains_in_place(module)
        if not kept & {"", join(name, "running_mean"), *ancestors(name)}
    ]


def warn_of_moving(backbone: Backbone) -> None:
    """Warn of the modules of `moving`."""
    if left := moving(backbone):
        warn(
            f"{len(left)} normalisations of the frozen {type(backbone.model).__name__} keep "
            f"statistics, which move in train() though nothing else of them trains: {listed(left)}"
            ". No file of a delta holds them, and they stay when the deltas leave. Name them in "
            "modules_to_save=[...], so that the delta has its own, or keep them in eval()",
            UnsavedWarning,
        )
