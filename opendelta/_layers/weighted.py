"""Add a weighted sum of low-rank products to a linear module: y + sum_i g_i s_i B_i A_i x.

The weights g differ from position to position, so no single weight holds the sum. All A_i are one
product, all B_i another; g multiplies what is between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modules.calls import first_input
from .base import times
from .low_rank import Call, LowRank, is_eager, joined, like, narrow, side_by_side


def add(
    call: Call,
    run: Sequence[LowRank],
    g: Tensor | list[float],
    strength: Any,
    whole: LowRank | None,
    raw: bool,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return the output of `call` plus the weighted changes of `run`, without dropout.

    Args:
        g: the weights [n], or [..., n] for each position.
        strength: a factor of all weights.
        whole: the factors of `run` joined, with their scales, or None.
        raw: `call` is the forward of a Linear or Conv1D, so its output may be changed in place.
    """
    x = first_input(args, kwargs)
    if whole is not None or not is_eager(x):
        out = call(*args, **kwargs)
        return out + change(x, run, g, strength, whole).type_as(out)
    flat = x if x.ndim == 2 else x.reshape(-1, x.size(-1))
    out = call(flat) if raw else call(*args, **kwargs)
    if type(out) is not Tensor or out.dtype != x.dtype:
        return (out if not raw else out.view(*x.shape[:-1], -1)) + change(x, run, g, strength)
    g = like(times(strength, as_tensor(g, x)), x)
    y = out if raw else out.reshape(-1, out.size(-1))
    flat_g = g if g.ndim == 1 else g.expand(*x.shape[:-1], -1).reshape(-1, g.size(-1))
    scales, ranks = [pair.scale for pair in run], [pair.A.size(0) for pair in run]
    if torch.is_grad_enabled():
        factors = [like(pair.A, x) for pair in run] + [like(pair.B, x) for pair in run]
        y = _AddWeighted.apply(y, flat, flat_g, raw and not y._is_view(), scales, *factors)
    else:
        A, B = joined([like(p.A, x) for p in run], 0), joined([like(p.B, x) for p in run], 1)
        alike = all(scale == scales[0] for scale in scales)
        weights = flat_g if alike else _scaled(flat_g, scales)
        h = _weighed(narrow(flat, A.t()), weights, ranks)
        y = (y.addmm_ if raw else y.addmm)(h, B.t(), alpha=scales[0] if alike else 1)
    return y.view(*x.shape[:-1], y.size(-1))


def change(
    x: Tensor,
    run: Sequence[LowRank],
    g: Tensor | list[float],
    strength: Any,
    whole: LowRank | None = None,
) -> Tensor:
    """Return sum_i g_i s_i B_i A_i x by torch's own operations; the arguments are as for `add`."""
    whole = side_by_side(run, x.dtype) if whole is None else whole
    ranks = [pair.A.size(0) for pair in run]
    h = _weighed(F.linear(x, like(whole.A, x)), like(times(strength, as_tensor(g, x)), x), ranks)
    up = F.linear(h, like(whole.B, x))
    return up if isinstance(whole.scale, float | int) and whole.scale == 1 else whole.scale * up


def as_tensor(g: Tensor | list[float], x: Tensor) -> Tensor:
    """Return weights as they are, or numbers as a tensor like `x`."""
    return torch.tensor(g, dtype=x.dtype, device=x.device) if isinstance(g, list) else g


def _scaled(g: Tensor, scales: Sequence[float]) -> Tensor:
    """Multiply the weights [..., n] by the scale of each product."""
    if all(scale == scales[0] for scale in scales):
        return g if scales[0] == 1 else g * scales[0]
    return g * torch.tensor(scales, dtype=g.dtype, device=g.device)


def _weighed(h: Tensor, g: Tensor, ranks: Sequence[int]) -> Tensor:
    """Multiply each product's part of h [..., all ranks] by its weight in g [..., n] or [n]."""
    if len(set(ranks)) == 1:
        parts = h.view(*h.shape[:-1], len(ranks), ranks[0])
        return (parts * like(g, h).unsqueeze(-1)).flatten(-2)
    return h * _each_rank(g, ranks).type_as(h)


def _each_rank(g: Tensor, ranks: Sequence[int]) -> Tensor:
    """Repeat each product's weight for each of its ranks: [..., n] becomes [..., all ranks]."""
    parts = [g[..., i, None].expand(*g.shape[:-1], rank) for i, rank in enumerate(ranks)]
    return torch.cat(parts, -1)


class _AddWeighted(torch.autograd.Function):
    """y + B (g * A x), with a gradient written by hand.

    It keeps the factors, g, x and A x; it copies neither x nor factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        g: Tensor,
        in_place: bool,
        scales: list[float],
        *factors: Tensor,
    ) -> Tensor:
        A, B = factors[: len(scales)], factors[len(scales) :]
        h = narrow(x, joined(A, 0).t())
        ctx.scales = scales
        ctx.save_for_backward(x, h, g, *factors)
        mixed = _weighed(h, _scaled(g, scales), [part.size(0) for part in A])
        if not in_place:
            return torch.addmm(y, mixed, joined(B, 1).t())
        ctx.mark_dirty(y)
        return y.addmm_(mixed, joined(B, 1).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, h, g, *factors = ctx.saved_tensors
        count, wanted = len(ctx.scales), ctx.needs_input_grad
        A, B = factors[:count], factors[count:]
        ranks = [part.size(0) for part in A]
        if torch.is_grad_enabled():  # a second derivative needs the graph of h
            h = narrow(x, joined(A, 0).t())
        scaled = _scaled(g, ctx.scales)
        g_B: Sequence[Any] = [None] * count
        if any(wanted[5 + count :]):
            mixed = _weighed(h, scaled, ranks)
            g_B = narrow(grad.t(), mixed).contiguous().split(ranks, 1)
        inner = narrow(grad, joined(B, 1))
        g_g = None
        if wanted[2]:
            parts = (inner * h).split(ranks, -1)
            g_g = _scaled(torch.stack([part.sum(-1) for part in parts], -1), ctx.scales)
            g_g = g_g if g.ndim > 1 else g_g.sum(0)
        g_h = _weighed(inner, scaled, ranks)
        g_A: Sequence[Any] = [None] * count
        if any(wanted[5 : 5 + count]):
            g_A = (g_h.t() @ x).split(ranks, 0)
        g_x = g_h @ joined(A, 0) if wanted[1] else None
        return (grad, g_x, g_g, None, None, *g_A, *g_B)
