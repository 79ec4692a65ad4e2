"""The change that one layer alone makes to a call, without the loss of digits of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import calls
from .base import Acts, Call, DeltaLayer, InnerCall


def change_alone(
    layer: DeltaLayer,
    bare: Call | None,
    inner: tuple[nn.Module, Sequence[DeltaLayer]],
    out: Any,
    args: tuple,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Return z [..., width], which the layer alone adds to the hidden states of `out`.

    In half precision y - h would lose a small z. So z is computed around zeros, or from more exact
    hidden states.

    Args:
        bare: the forward of a Linear or Conv1D without its bias, which is all that is beneath; or
            None.
        inner: the module, and the layers beneath.
        out: what the call gives without the layer.

    Returns:
        None if only a run of the whole call with the layer around it tells.
    """
    h = calls.hidden(out)
    if layer.acts is Acts.BESIDE:
        start = torch.zeros_like(h)
    elif layer.acts is Acts.AFTER:
        start = _wide(h)
    elif layer.acts is Acts.BEFORE and bare is not None:
        return bare(input_change(layer, out, args, kwargs))
    else:
        return None
    width = h.size(-1)
    given = calls.change_hidden(calls.fresh(out), width, lambda _: start)
    call: Call = lambda *_, **__: given  # noqa: E731
    call = InnerCall(call, *inner) if layer.sees_module else call
    z = calls.hidden(layer(call, *args, **kwargs)) - start
    return _gated(layer, z, h, args, kwargs)


def input_change(layer: DeltaLayer, out: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return what a layer that acts BEFORE adds to the first input of a call.

    Args:
        out: what the call gives without the layer.
    """
    x = calls.dense(calls.first_input(args, kwargs))
    start, changed = _wide(x), x

    def note(*new: Any, **options: Any) -> Any:
        nonlocal changed
        changed = calls.first_input(new, options)
        return out

    given = calls.replace_input(args, kwargs, start)
    layer(note, *given[0], **given[1])
    return _gated(layer, (changed - start).type_as(x), calls.hidden(out), args, kwargs)


def _gated(layer: DeltaLayer, z: Tensor, h: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    gate = layer.gate
    if gate is None or layer.gates_itself:
        return z
    return gate(calls.first_input(args, kwargs) if gate.on_input else h) * z


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
