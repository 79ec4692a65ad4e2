"""Copy modules of a backbone without the deltas on them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .._modules import wrappers
from .._modules.copies import computed_in
from .._sites import swap
from ..errors import SiteError, quoted
from ..names import SLOT
from .backbone import Backbone


def plain_copy(backbone: Backbone, name: str, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of a backbone's module without deltas.

    Args:
        name: the module's full name.
        memo: {id of an object: the object in its place in the copy}, as `copy.deepcopy` takes it.

    Raises:
        SiteError: a copy would run a module of the backbone.
    """
    parts = {id(part) for part in backbone.modules[name].modules()}
    for where, module in backbone.modules.items():
        if id(module) in parts and wrappers.closes_over(module, parts):
            raise SiteError(
                f"{quoted(where)} ({type(module).__name__}) had its forward replaced by "
                f"{wrappers.replacement(module)}, which keeps the module: a copy would run this "
                "one, with its deltas. Copy before that replacement, or remove it",
                where=where,
            )
    placeholder = nn.Module()
    memo = {**memo, **{id(stack): placeholder for stack in backbone.stacks.values()}}
    memo |= computed_in(backbone.modules[name])
    copied = copy.deepcopy(backbone.modules[name], memo)
    for part in copied.modules():
        if part._modules.get(SLOT) is placeholder:
            del part._modules[SLOT]
            base = swap.plain_class(part)
            if base is not None:
                wrappers.set_class(part, base)
    return copied
