"""Find a place for each layer of a delta: the third step of attaching, with all other refusals.

The model stays as it is; only `committing` touches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .._backbone import engines, reading, sharding
from .._backbone.backbone import Backbone
from .._backbone.patterns import no_match
from .._layers.base import Acts, DeltaLayer
from .._layers.record import Record
from .._modules import wrappers
from .._sites import showing, swap
from .._sites.stack import Stack, stack_of
from ..errors import SiteError
from ..names import ancestors
from .base import BaseDelta
from .blocks import check_blocks
from .choosing import misfit
from .order import order_with
from .taking import check_copies


class Placing(NamedTuple):
    """The facts for putting one layer on its module.

    Attributes:
        weight_is_read: the module around reads the weight, so the weight must show the change.
        ranks: the ranks that share the module; None: this process has it alone.
        device: the device on which the module computes.
        dtype: the dtype in which it computes.
    """

    weight_is_read: bool
    ranks: sharding.Ranks | None
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Placed:
    """A delta with a place for each of its layers; all checks passed.

    Attributes:
        backbone: the model, unchanged.
        delta: the delta, off the model.
        placings: {full name of the site: the facts for its layer}.
        order: all deltas in the order in which they will act.
    """

    backbone: Backbone
    delta: BaseDelta
    placings: dict[str, Placing]
    order: list[Record]

    def pretend(self) -> None:
        """Let `backbone` show the delta as attached, so that another can be placed on top."""
        for where, layer in self.delta.layers.items():
            before, is_read = self.backbone.stacks.get(where), self.placings[where].weight_is_read
            self.backbone.stacks[where] = PretendedStack(before, self.delta.name, layer, is_read)


def place(
    backbone: Backbone,
    delta: BaseDelta,
    before: Record | None = None,
    after: Record | None = None,
    *,
    known: list[Record] | None = None,
) -> Placed:
    """Find a place for each layer of a delta.

    Args:
        before: put `delta` right before this delta in the order.
        after: put `delta` right after this delta in the order.
        known: the deltas of the backbone in their order, if the caller knows them.

    Raises:
        SiteError: a module cannot take its layer.
        DeltaError: the model is inside `route()`, or the delta would act beneath a merged one.
    """
    backbone.require_unrouted(f"cannot attach {delta.name!r}")
    training = [p for p in delta.parameters() if p.requires_grad]
    engines.check_synchronised(backbone, delta.layers, training)
    _check_owned(backbone, delta.layers)
    check_blocks(backbone, delta)
    for where, layer in delta.layers.items():
        if where in backbone.stacks and where in backbone.modules:
            check_copies(backbone, delta.name, where, layer)
    placings = {}
    for where, layer in delta.layers.items():
        if where not in backbone.modules:
            raise no_match(where, backbone.modules, backbone.model)
        module = backbone.modules[where]
        around = (backbone.modules.get(name) for name in ("", *ancestors(where)))
        if any(each is not None and wrappers.loads_inside(each) for each in around):
            raise SiteError(
                f"{where!r} ({type(module).__name__}): accelerate loads this module as part of a "
                "whole (preload_module_classes) that the delta was not in; attach before "
                "offloading",
                where=where,
            )
        placings[where] = _placing(backbone, delta, where, layer)
    return Placed(backbone, delta, placings, order_with(backbone, delta, before, after, known))


def _placing(backbone: Backbone, delta: BaseDelta, where: str, layer: DeltaLayer) -> Placing:
    module = backbone.modules[where]
    stack = backbone.stacks.get(where, stack_of(module))
    known = reading.weight_is_read(backbone, where)
    known = known or (isinstance(stack, PretendedStack) and stack.weight_is_read)
    known = swap.weight_is_read(module, known)
    is_read = known or _must_show(delta, where, module, stack)
    if is_read and reading.gets_parameters(backbone, where):
        raise SiteError(
            f"{where!r} ({type(module).__name__}): the code around it calls get_parameter, which "
            "takes no weight with a delta in it, such as it would show (reads=True); let that "
            "code read the attribute .weight, or choose other modules",
            where=where,
        )
    swap.check(where, module, delta.name, layer, is_read, stack, asked=not known)
    passes_on = layer.hands_over and layer.handover is not None
    why = None if passes_on else misfit(module, type(layer), layer.acts)
    if why is not None:
        raise SiteError(
            f"{where!r} ({type(module).__name__}): its own forward {why}, so {delta.name!r} cannot "
            f"act there; choose others, or leave it out: exclude_modules=[{where!r}]",
            where=where,
        )
    ranks = sharding.group_of(backbone, where, is_read, layer)
    return Placing(is_read, ranks, *backbone.device_and_dtype_of(where))


def _must_show(delta: BaseDelta, where: str, module: nn.Module, stack: Stack | None) -> bool:
    """True if the option `reads` lets `module` show its weight with the layers of `delta`.

    In a delta whose copies show theirs, a layer that no weight can show acts in calls alone.
    """
    if not delta.config.reads:
        return False
    layer = delta.layers[where]
    if layer.stand_in is not None:
        return bool(showing.parts_of(module))
    if where not in (delta.config.modified_modules or ()):
        return False
    copies = filter(None, (each.stand_in for each in delta.layers.values()))
    shown = any(map(showing.parts_of, copies))
    return not shown or swap.why_unshown(module, delta.name, layer, stack) is None


class PretendedStack(Stack):
    """The stack that a module would have with one more layer; the module does not carry it.

    Attributes:
        weight_is_read: the module would show folded weights.
    """

    def __init__(self, before: Stack | None, name: str, layer: DeltaLayer, is_read: bool) -> None:
        super().__init__()
        self.weight_is_read = is_read
        if before is not None:
            self._modules.update(before._modules)
            self.steps = before.steps
        self._modules[name] = layer


def _check_owned(backbone: Backbone, layers: Mapping[str, DeltaLayer]) -> None:
    """Raise if a new layer would never run, or would keep another layer from running.

    A delta's own copy of a module acts in the module's place, so nothing inside the module runs.

    Args:
        layers: the new layers by full name of their site.
    """
    for where in layers:
        for name in [*ancestors(where)][1:]:
            if (owner := _owner_of(backbone, name)) is not None:
                raise SiteError(
                    f"{where!r} is inside {name!r}, in whose place {owner!r} puts its own copy "
                    "(modules_to_save): a delta on it would never run",
                    where=where,
                )
    owned = {where for where, layer in layers.items() if layer.acts is Acts.INSTEAD}
    for name, stack in backbone.stacks.items() if owned else ():
        around = next((w for w in [*ancestors(name)][1:] if w in owned), None)
        if around is not None and len(stack):
            raise SiteError(
                f"modules_to_save={around!r}: {', '.join(stack)} on {name!r} inside it would stop "
                "acting; detach it first, or put it on other modules",
                where=around,
            )


def _owner_of(backbone: Backbone, name: str) -> str | None:
    """Return the last delta that puts its own copy in the place of a module; None: no delta."""
    stack = backbone.stacks.get(name)
    layers = () if stack is None else stack.in_order()
    return next((own for own, layer in reversed(layers) if layer.acts is Acts.INSTEAD), None)
