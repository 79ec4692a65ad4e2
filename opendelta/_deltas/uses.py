"""Warn of modules whose weight has other uses than the one that a delta changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .._backbone import reading
from .._backbone.backbone import Backbone
from .._layers.base import DeltaLayer
from .._modules import tensors
from .._sites import swap
from ..errors import TiedWeightWarning, warn
from ..names import is_inside, parent
from .base import BaseDelta


def tied(backbone: Backbone, targets: Sequence[str]) -> dict[str, list[str]]:
    """Return {target: the modules that share a weight with it and are no targets}."""
    users = backbone.users()
    chosen = {id(backbone.modules[name]) for name in targets}
    shared: dict[str, list[str]] = {}
    for name in targets:
        for key, parameter in backbone.modules[name]._parameters.items():
            by_id = {
                id(backbone.modules[n]): n
                for n in users.get(id(parameter), ())
                if key != "bias" or not is_inside(name, n)  # an attribute around it, as BERT's
            }
            if others := [other for module, other in by_id.items() if module not in chosen]:
                shared[name] = [*shared.get(name, []), *others]
    return shared


def warn_if_tied(backbone: Backbone, targets: Sequence[str], delta_type: str) -> None:
    """Warn of a target whose weight other modules use too: a delta changes only one use."""
    for name, others in tied(backbone, targets).items():
        warn(
            f"{delta_type!r} on {name!r} changes one use of a weight that "
            f"{', '.join(map(repr, others))} uses too",
            TiedWeightWarning,
        )


def warn_if_read(backbone: Backbone, delta: BaseDelta) -> None:
    """Warn of a target that is called and whose weight is read: a delta changes only one use."""
    for name, layer in delta.layers.items():
        module = backbone.modules[name]
        if delta.config.reads or swap.weight_is_read(module, False):
            continue
        if not reading.is_called_and_read(backbone, name) or not _changes_weight(layer, module):
            continue
        shown = layer.stand_in is not None or swap.shows_weight(module)
        ways = "reads=True" if shown else f"modules_to_save=[{name!r}] and reads=True"
        warn(
            f"{delta.name!r} on {name!r} acts in calls of it alone, and "
            f"{type(backbone.modules[parent(name)]).__name__} reads its weight too: attach with "
            f"{ways} to change both uses; if one use was meant, all is well",
            TiedWeightWarning,
        )


def _changes_weight(layer: DeltaLayer, module: nn.Module) -> bool:
    """True if a layer has a weight of its own for the module, or would change the module's."""
    if layer.stand_in is not None:
        return "weight" in layer.stand_in._parameters
    own = [each for each in module._parameters.values() if each is not None]
    if not layer.can_fold() or not all(map(tensors.is_plain, own)):
        return layer.can_fold()
    params = tensors.stored_params(module)
    with torch.no_grad():
        return layer.fold(params).get("weight") is not params.get("weight")
