"""Make the modules that a delta owns: copies of the backbone's, which act in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone import copying, sharding
from .._backbone.backbone import Backbone
from .._layers import labels
from .._layers.base import DeltaLayer
from .._layers.dtypes import dtype_for
from .._layers.owned import OwnedModule, computes_weight, convert
from .._modules import wrappers
from .._modules.kinds import is_packed
from .._modules.tensors import in_parts, is_lazy
from ..errors import SiteError
from ..names import SLOT, join
from .options import DeltaConfig


def owned(backbone: Backbone, config: DeltaConfig, values: str) -> dict[str, DeltaLayer]:
    """Build the layers for `modules_to_save` and `num_labels`.

    Each module in `modules_to_save` gets one copy. If `num_labels` differs from the backbone's
    number, the root gets a LabelsLayer.
    """
    names = config.modules_to_save or ()
    copied = {name: _own_copy(backbone, name, config, values) for name in names}
    more: dict[str, DeltaLayer] = {}
    count = config.num_labels
    if count is not None and count != labels.count_of(backbone.model):
        heads = [n for n, own in copied.items() if labels.is_head(own, backbone.model)]
        copied = {name: labels.resized(own, backbone.model, count) for name, own in copied.items()}
        more[""] = labels.LabelsLayer(count, heads)
    return {**{name: OwnedModule(module) for name, module in copied.items()}, **more}


def _own_copy(backbone: Backbone, name: str, config: DeltaConfig, values: str) -> nn.Module:
    """Return a trainable copy of a backbone's module, without the deltas on it."""
    if values != "saved":
        sharding.check_copy(backbone, name)
    if any(map(wrappers.is_offloaded, backbone.modules[name].modules())):
        raise SiteError(
            f"modules_to_save={name!r}: accelerate offloads the module, and brings the values of "
            "the backbone into a copy, too. Make or load the delta first, then offload the model",
            where=name,
        )
    own = backbone.modules[name].named_parameters()
    _check_copies(name, (k for k, p in own if SLOT not in k.split(".") and in_parts(p)))
    _check_computed(name, backbone.modules[name])
    inside = backbone.modules[name].named_modules()
    _check_copies(name, (join(where, "weight") for where, m in inside if is_packed(m)))
    memo: dict[int, Any] = {}
    for parameter in backbone.modules[name].parameters() if values != "new" else ():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
    copied = copying.plain_copy(backbone, name, memo)
    state = copied.state_dict().items()
    _check_copies(name, (key for key, value in state if not isinstance(value, torch.Tensor)))
    convert(copied, lambda _, tensor: dtype_for(config.dtype, tensor.dtype))
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def _check_copies(name: str, odd: Iterable[str]) -> None:
    """Raise if the module `name` has tensors of which no copy can train: the first of `odd`."""
    if (first := next(iter(odd), None)) is not None:
        raise SiteError(
            f"modules_to_save={name!r}: its {first} is quantised or sparse, of which no copy can "
            "train; put a delta on the module instead",
            where=name,
        )


def _check_computed(name: str, module: nn.Module) -> None:
    """Raise if a copy of a module would have no values, or keep what a hook computes.

    Hooks of torch.nn.utils run on the copy, too.
    """
    if any(map(is_lazy, module.parameters())):
        raise SiteError(
            f"modules_to_save={name!r}: {type(module).__name__} gets its sizes in its first "
            "forward: run the model once, then attach",
            where=name,
        )
    hooks = [h for h in module._forward_pre_hooks.values() if not computes_weight(h)]
    held = (k for k in ("weight", "bias") if isinstance(module.__dict__.get(k), Tensor))
    if hooks and (key := next(held, None)) is not None:
        raise SiteError(
            f"modules_to_save={name!r}: {hooks[0]!r} may compute its {key} before each run, and "
            "would not do so for a copy; compute it by torch.nn.utils.parametrize, or put a delta "
            "on the module instead",
            where=name,
        )
