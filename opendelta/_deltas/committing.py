"""Put a placed delta on its model, or take it off: the only step that touches the model."""

from __future__ import annotations

import functools

from .._backbone import sharding
from .._backbone.backbone import Backbone
from .._layers import recomputing, selection
from .._layers.base import DeltaLayer
from .._layers.record import WHOLE, Record, of_now
from .._modules.process import one_at_a_time
from .._modules.tensors import lasting
from .._sites import compile_limit, swap
from ..errors import to_the_end
from .base import HANDLES, BaseDelta
from .first_forward import unwatch_forward, watch_forward
from .freezing import restore
from .head_watch import watch_heads
from .order import renumber
from .placing import Placed
from .pretrained import unwatch_saving, watch_saving
from .quantised import unwatch_quantised, watch_quantised
from .state_dict import unwatch_state, watch_state
from .state_loading import unwatch_loading, watch_loading


@one_at_a_time
@lasting()
def commit(placed: Placed) -> None:
    """Put all layers of a delta on its model, or none if one of them fails."""
    backbone, delta = placed.backbone, placed.delta
    try:
        for where, placing in placed.placings.items():
            module, layer, ranks = backbone.modules[where], delta.layers[where], placing.ranks
            if ranks is None or ranks.group is None:
                layer.fit(module, placing.device, placing.dtype, delta.config.dtype)
            if ranks is not None:
                sharding.shard(layer, ranks)
            _mark(layer)
            split = None if ranks is None else ranks.split
            backbone.stacks[where] = swap.add(
                module, delta.name, layer, placing.weight_is_read, split
            )
        _announce(placed)
    except BaseException:  # Ctrl-C, too
        take_off(Backbone.of(backbone.model), delta)
        raise


def _mark(layer: DeltaLayer) -> None:
    """Set `_is_delta` on the layer's parameters, by which drawing tools know them."""
    own = layer.parameters() if layer._modules else layer._parameters.values()
    for parameter in own:
        if parameter is not None:
            parameter._is_delta = True  # type: ignore[attr-defined]


def _announce(placed: Placed) -> None:
    """Put a delta whose layers are on the model into the order, and let hooks know it."""
    backbone, delta, record = placed.backbone, placed.delta, placed.delta.record
    others = [other for other in placed.order if other is not record]
    if others and record.shared is not others[0].shared:
        others[0].shared.frozen |= record.shared.frozen
        others[0].shared.excluded |= record.shared.excluded
        record.shared = others[0].shared
    renumber(backbone, placed.order, placed.placings)
    record.shared.records.append(record)
    selection.join(record)
    compile_limit.watch_limit()
    recomputing.keep(of_now)
    watch_forward(backbone)
    watch_state(backbone, record.shared)
    watch_loading(backbone.model)
    watch_saving(backbone, record.shared)
    watch_quantised(backbone)
    HANDLES.add(delta)


@one_at_a_time
def take_off(backbone: Backbone, delta: BaseDelta) -> None:
    """Take all layers of a delta off its model; with the last delta, remove all other traces."""
    to_the_end(functools.partial(_take_off, backbone, delta.record))


def _take_off(backbone: Backbone, record: Record) -> None:
    for where, name, layer in list(backbone.delta_layers()):
        if layer.record is record:
            swap.remove(backbone.modules[where], name)
    for where in backbone.stacks:
        swap.clear(backbone.modules[where])
    record.left = selection.Moment()
    shared = record.shared
    shared.records = [other for other in shared.records if other is not record]
    watch_heads(backbone)
    if not any(len(stack) for stack in backbone.stacks.values()):
        unwatch(backbone)
        restore(backbone, shared)
        shared.in_state_dict = WHOLE


def unwatch(backbone: Backbone) -> None:
    """Take away what watches a model that carries deltas, and stands for its methods."""
    unwatch_state(backbone)
    unwatch_loading(backbone.model)
    unwatch_saving(backbone)
    unwatch_quantised(backbone)
    unwatch_forward(backbone)
