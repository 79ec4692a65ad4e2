"""Refuse a call whose output is several tensors, where a layer acts on one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer
from ..errors import SiteError

ELSEWHERE = (Acts.BEFORE, Acts.INSTEAD, Acts.WITHIN, Acts.SERVES)


def of_call(
    call: Callable[..., Any], module: nn.Module, acting: Iterable[DeltaLayer]
) -> Callable[..., Any]:
    """Return `call`, a forward of somebody's own, which raises for what no layer can act on.

    When attaching, it was tried on its input alone: other arguments may ask for more.
    """
    if all(layer.acts in ELSEWHERE or layer.needs() == "hidden" for layer in acting):
        return call
    return functools.partial(_one_tensor, call, type(module).__name__)


def _one_tensor(call: Callable[..., Any], name: str, /, *args: Any, **kwargs: Any) -> Tensor:
    out = call(*args, **kwargs)
    if isinstance(out, Tensor):
        return out
    raise SiteError(
        f"this call of a {name} returned a {type(out).__name__}, and a delta on it acts on one "
        "tensor: call it without the argument that asks for more, or choose a method that takes "
        "hidden states in a tuple, such as adapters"
    )
