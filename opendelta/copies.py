"""Copies of backbone modules without the deltas that they carry, whole or sharing tensors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from . import foreign, freezing, inspection, labels, merging, quantised, site
from .addressing import Survey, survey
from .bases import OwnedModule
from .errors import DeltaError
from .record import SLOT

Module = TypeVar("Module", bound=nn.Module)


def plain_copy(found: Survey, name: str, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a backbone module without deltas.

    Args:
        name: the module's full name.
        memo: {id: what stands for that object in the copy}, as `copy.deepcopy` takes it.
    """
    placeholder = nn.Module()
    memo = {**memo, **{id(stack): placeholder for stack in found.stacks.values()}}
    copied = copy.deepcopy(found.modules[name], memo)
    for part in copied.modules():
        if part._modules.get(SLOT) is placeholder:
            del part._modules[SLOT]
            base = site.plain_class(part)
            if base is not None:
                foreign.set_class(part, base)
    return copied


def shared_copy(model: Module) -> Module:
    """A second module tree over the tensors of `model`, without its deltas.

    Several compositions live side by side on one backbone in memory, each on a copy of its own;
    they may run in several threads. What is written into a shared tensor in place is seen by all;
    `requires_grad` flags, merging and moving to another device or dtype are each copy's own.

    Raises:
        DeltaError: deltas are merged into the weights.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> de, fr = opendelta.shared_copy(model), opendelta.shared_copy(model)
        >>> german = opendelta.LoraModel(de, modified_modules=["0"])
        >>> de[0].weight.data_ptr() == fr[0].weight.data_ptr()
        True
        >>> opendelta.composition(fr).names
        []
    """
    found = survey(model)
    for record in found.records():
        merging.check_apart(record, "cannot share the weights under")
    memo: dict[int, Any] = {}
    for parameter in freezing.backbone_parameters(found).values():
        if quantised.is_plain(parameter):
            shared = nn.Parameter(parameter.detach(), parameter.requires_grad)
            memo[id(parameter)] = shared
        else:
            memo[id(parameter)] = parameter
    for module in found.modules.values():
        memo.update({id(b): b for b in module._buffers.values() if b is not None})
    copied: Any = plain_copy(found, "", memo)
    fresh = survey(copied)
    freezing.unwatch_state(fresh)
    inspection.unwatch_forward(fresh)
    return copied


def to_backbone(model: Module) -> Module:
    """A plain model whose weights hold all that acts on `model`; see `Composition.to_backbone`."""
    found = survey(model)
    merging.check_unrouted(found, "cannot make a plain model")
    merging.check_whole(found)
    copied = shared_copy(model)
    fresh = survey(copied)
    for where, stack in found.stacks.items():
        run = [(n, ly) for n, ly in stack.in_order() if ly.folds and ly.record.active]
        run = [(n, ly) for n, ly in run if ly.flow not in ("none", "instead")]
        owned = [layer for layer in stack.values() if isinstance(layer, OwnedModule)]
        acting = [layer for layer in owned if layer.record.active]
        if acting:
            _put(copied, where, copy.deepcopy(acting[-1].module))
        if run:
            merging.fold_into(where, fresh.modules[where], run)
    labels.hand_on(model, copied)
    if model.training:
        copied.train()
    return copied


def _put(model: nn.Module, where: str, module: nn.Module) -> None:
    if not where:
        raise DeltaError("modules_to_save holds the whole model, which has no place to stand in")
    parent, _, key = where.rpartition(".")
    model.get_submodule(parent)._modules[key] = module
