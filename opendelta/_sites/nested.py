"""Take nested tensors through a site row by row: layers compute on plain tensors.

`nn.TransformerEncoder` makes a nested tensor of a padded batch in eval mode. A row has no padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._layers.base import DeltaLayer
from .._modules import calls
from .._texts import running
from .rows import ALONE


def is_nested(value: Any) -> bool:
    """True if `value` is a nested tensor."""
    return isinstance(value, Tensor) and value.is_nested


def run(
    call: Callable[..., Any], acting: Sequence[DeltaLayer], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Call `call` on each row of the nested tensors in the arguments, as a batch of one.

    Args:
        call: the forward of a module with the layers `acting` around it; its first argument is
            nested.

    Returns:
        The output; each tensor in it is nested.
    """
    handovers = [layer.handover for layer in acting if layer.handover is not None]
    taken = [handover.take() for handover in handovers]
    outputs: list[Any] = []
    left: list[list[Any]] = [[] for _ in handovers]
    rows, documents = args[0].size(0), running.running()
    for index in range(rows):
        for handover, values in zip(handovers, taken, strict=True):
            handover.put(values[index] if isinstance(values, list) else values)
        own = [_row(value, index) for value in args]
        named = {key: _row(value, index) for key, value in kwargs.items()}
        alone = documents
        if documents is not None and documents.batch == rows:  # without padding nothing is unsaid
            alone = None if documents.doubt else documents.unpadded(index)
        token = ALONE.set((index, rows))
        try:
            outputs.append(running.during(alone, call, *own, **named))
        finally:
            ALONE.reset(token)
        for handover, values in zip(handovers, left, strict=True):
            values.append(handover.take())
    for handover, values in zip(handovers, left, strict=True):
        handover.put(None if all(value is None for value in values) else values)
    return calls.joined(outputs, functools.partial(_joined, args[0]))


def _row(value: Any, index: int) -> Any:
    return value.unbind()[index][None] if is_nested(value) else value


def _joined(like: Tensor, parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    rows = [row for part in parts for row in part]
    if like.layout is torch.jagged:  # the same offsets: sums with others are refused
        jagged: Any = like
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), jagged.offsets())
    return torch.nested.as_nested_tensor(rows)
