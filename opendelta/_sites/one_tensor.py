"""Refuse a call whose output is several tensors, where a layer acts on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._layers.base import Acts
from ..errors import SiteError
from .stack import Stack, acting_on

ELSEWHERE = (Acts.BEFORE, Acts.INSTEAD, Acts.WITHIN, Acts.SERVES)


def called(
    call: Callable[..., Any], module: nn.Module, stack: Stack, /, *args: Any, **kwargs: Any
) -> Any:
    """Run `call`, a forward of somebody's own, and raise for what no layer of `stack` can act on.

    When attaching, it was tried on its input alone: other arguments may ask for more.
    """
    out = call(*args, **kwargs)
    if isinstance(out, Tensor):
        return out
    if all(layer.acts in ELSEWHERE or layer.needs() == "hidden" for layer in acting_on(stack)):
        return out
    raise SiteError(
        f"this call of a {type(module).__name__} returned a {type(out).__name__}, and a delta on "
        "it acts on one tensor: call it without the argument that asks for more, or choose a "
        "method that takes hidden states in a tuple, such as adapters"
    )
