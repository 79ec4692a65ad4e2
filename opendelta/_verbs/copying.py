"""Copy a whole model without its deltas: share its tensors, or fold the deltas into new weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.copying import plain_copy
from .._deltas.committing import unwatch
from .._layers import labels
from .._layers.owned import convert_like
from .._modules import tensors
from .._modules.copies import computed_in
from .._sites import merged
from .._sites.stack import Stack, Step
from ..errors import SiteError
from . import mergeable, merging
from .untying import untie

Module = TypeVar("Module", bound=nn.Module)


@tensors.lasting()
def shared_copy(model: Module) -> Module:
    """Return a second module tree over the tensors of `model`, without its deltas.

    So several compositions share one backbone in memory, each on a copy of its own. The copies may
    run in several threads. A value that is written into a shared tensor in place changes in all
    copies. Each copy has its own `requires_grad` flags; merging a copy, or moving it to another
    device or dtype, changes no other copy.

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
    backbone = Backbone.of(model)
    for record in backbone.records():
        record.require_apart("cannot share the weights under")
    copied: Any = plain_copy(backbone, "", shared_tensors(backbone.modules.values()))
    unwatch(Backbone.of(copied))
    return copied


def shared_tensors(modules: Iterable[nn.Module], frozen: bool = False) -> dict[int, Any]:
    """Return {id of a tensor of `modules`: what stands for it in a copy over the same memory}.

    Args:
        frozen: let no parameter train. Quantised and sharded ones are the same objects in a copy.
    """
    memo: dict[int, Any] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if id(parameter) in memo or parameter is None:
                continue
            shared: Any = parameter
            if tensors.is_plain(parameter):
                shared = nn.Parameter(parameter.detach(), parameter.requires_grad and not frozen)
            memo[id(parameter)] = shared
        memo.update({id(b): b for b in module._buffers.values() if b is not None})
    return memo


@tensors.lasting()
def to_backbone(model: Module) -> Module:
    """Return a plain copy of `model` with all active deltas in its weights.

    See `Composition.to_backbone`.
    """
    backbone = Backbone.of(model)
    backbone.require_unrouted("cannot make a plain model")
    backbone.recall()
    copies = _copies(backbone)
    merging.check_whole(backbone, copies)
    read = mergeable.read_beside(backbone, backbone.stacks)
    copied = shared_copy(model)
    for where, stack in backbone.stacks.items():
        run = merging.run_of(stack)
        if where in copies:
            _check_unread_copy(where, backbone.modules[where], copies[where], read)
            _become(copied.get_submodule(where), copies[where])
        if run:
            step = Step(dict(run))
            merged.fold_into(where, copied.get_submodule(where), run, step)
            mergeable.check_unread(where, backbone.modules[where], step, read.get(where, set()))
        if where in copies:
            convert_like(copied.get_submodule(where), backbone.modules[where])
    labels.hand_on(model, copied)
    untie(backbone, copied)
    if model.training:
        copied.train()
    return copied


def _check_unread_copy(
    where: str, module: nn.Module, copied: nn.Module, read: Mapping[str, set[str] | None]
) -> None:
    """Raise if code around a module reads a parameter of which the delta owns another one."""
    keys = read.get(where, set())
    keys = {"weight", "bias"} if keys is None else keys
    own = module._parameters
    if any(copied._parameters.get(key) is not own.get(key) for key in keys):
        raise SiteError(
            f"{where!r} ({type(module).__name__}): other code reads its {' and '.join(keys)} "
            "besides calling it, and computes with the backbone's; in a plain model it would "
            "compute with those of the copy in modules_to_save. Attach the delta with reads=True, "
            "so that the copy acts on both, and train it",
            where=where,
        )


def _stand_ins(stack: Stack) -> list[tuple[str, nn.Module]]:
    """Return (name of an active delta, its module for a plain model in the place of the site)."""
    found = [(n, ly.stand_in) for n, ly in stack.in_order() if ly.record.active]
    return [(name, module) for name, module in found if module is not None]


def _copies(backbone: Backbone) -> dict[str, nn.Module]:
    """Return {site: what comes in its place in a plain model} for the copies that act."""
    silent, found = _silent(backbone), {}
    for where, stack in backbone.stacks.items():
        for name, module in _stand_ins(stack):
            if (where, name) not in silent:
                found[where] = module  # the last one
    return found


def _silent(backbone: Backbone) -> set[tuple[str, str]]:
    """Return (site, delta) of the copies in the place of modules that nobody calls.

    T5, for example, has its embedding in the module "shared" too, and calls others.
    """
    unseen = {
        (where, name)
        for where, stack in backbone.stacks.items()
        for name, _ in _stand_ins(stack)
        if name not in stack.ran
    }
    reached = mergeable.reached_by(backbone) if unseen else None
    return set() if reached is None else unseen - reached


def _become(module: nn.Module, other: nn.Module) -> None:
    """Let `module` be a copy of `other`, for all that hold it, under whatever name."""
    own = copy.deepcopy(other.__dict__, {id(other): module, **computed_in(other)})
    module.__dict__.clear()
    module.__dict__.update(own)
    module.__class__ = type(other)
