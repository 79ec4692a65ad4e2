"""Add low-rank products to a linear module: several layers as one pair of matrix products.

y + sum_i s_i B_i A_i x  =  y + B A x   with   A = [A_1; A_2; ...],  B = [s_1 B_1, s_2 B_2, ...]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .._modules.arithmetic import widened
from .._modules.calls import dense, first_input
from ..errors import DeltaError

ENABLED = True  # False: compute each layer's own equation, for tests to compare with
Call = Callable[..., Tensor]


class LowRank(NamedTuple):
    """A change s B A of a weight, with A [rank, in_features] and B [out_features, rank].

    Attributes:
        scale: a number; in compiled code, a tensor of one value.
        dropout: current probability of dropping an input of the change.
    """

    A: Tensor
    B: Tensor
    scale: Any
    dropout: float


class Segment(NamedTuple):
    """Consecutive layers that see the same input: several without dropout, or one with dropout.

    Attributes:
        start, end: the layers are start, ..., end - 1.
        dropout: probability of dropping an input.
        seed: seed of the dropout mask; None if the mask is drawn only once.
    """

    start: int
    end: int
    dropout: float
    seed: int | None = None


def side_by_side(run: Sequence[LowRank], dtype: torch.dtype) -> LowRank:
    """Join pairs to one pair that computes their sum; its dropout is the dropout of the first.

    Args:
        dtype: the dtype of the input. Different scales go into B, in no narrower dtype.
    """
    if len(run) == 1:
        return run[0]
    scale = run[0].scale
    A, B = [pair.A for pair in run], [pair.B for pair in run]
    if isinstance(scale, Tensor) or [pair for pair in run if pair.scale != scale]:
        B, scale = [pair.scale * widened(pair.B, dtype) for pair in run], 1.0
    return LowRank(torch.cat(A), torch.cat(B, 1), scale, run[0].dropout)


def joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), axis)


def _seed() -> int:
    """Return a number from torch's CPU generator, whatever the default device is."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _segments(rates: Sequence[float], seeded: bool) -> list[Segment]:
    found: list[Segment] = []
    for index, rate in enumerate(rates):
        if not rate and found and not found[-1].dropout:
            found[-1] = found[-1]._replace(end=index + 1)
        else:
            seed = _seed() if rate and seeded else None
            found.append(Segment(index, index + 1, rate, seed))
    return found


# -------------------------------------------------------------------------------------- computation
def add(call: Call, run: Sequence[LowRank], raw: bool, *args: Any, **kwargs: Any) -> Tensor:
    """Return the output of `call` plus the changes of the layers of a run.

    Args:
        run: the layers' factors.
        raw: `call` is the forward of a Linear or Conv1D, so its output may be changed in place.
    """
    x = first_input(args, kwargs)
    if not is_eager(x):
        return _composed(call(*args, **kwargs), x, run)
    flat = x if x.ndim == 2 else x.reshape(-1, x.size(-1))
    out = call(flat) if raw else call(*args, **kwargs)
    if type(out) is not Tensor or out.dtype != x.dtype:
        return _shaped(_composed(out, flat if raw else x, run), x)
    y = out if raw else out.reshape(-1, out.size(-1))
    scales, rates = [pair.scale for pair in run], [pair.dropout for pair in run]
    if torch.is_grad_enabled() or any(rates):  # so dropout is the same with and without gradients
        in_place = raw and not y._is_view()  # in place on a view, autograd copies the gradient
        factors = [like(pair.A, x) for pair in run] + [like(pair.B, x) for pair in run]
        y = _AddLowRank.apply(y, flat, in_place, scales, _segments(rates, True), *factors)
    else:
        A, B, scale, _ = side_by_side(run, x.dtype)
        h = narrow(flat, like(A, x).t())
        y = (y.addmm_ if raw else y.addmm)(h, like(B, x).t(), alpha=scale)
    return _shaped(y, x)


def is_eager(x: Any) -> bool:
    """True if operations on `x` may be in place, and may have a gradient written by hand."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or x.is_nested
        or x.is_meta
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_dispatch_stack() > 0 and _caches_results())
    )


def _caches_results() -> bool:
    """True inside selective checkpointing, where an in-place update corrupts a cached result."""
    modes = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Return `y` [tokens, width] with the first axes of `x`: [..., width]."""
    # With no tokens, -1 for the width would fail.
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.size(-1))


def like(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor if tensor.dtype == x.dtype else tensor.to(x.dtype)


def _composed(out: Tensor, x: Tensor, run: Sequence[LowRank]) -> Tensor:
    """Compute the sum by torch's own operations, which torch can compile and transform."""
    for part in _segments([pair.dropout for pair in run], False):
        whole = side_by_side(run[part.start : part.end], x.dtype)
        dropped = F.dropout(dense(x), part.dropout) if part.dropout else x
        change = F.linear(F.linear(dropped, like(whole.A, x)), like(whole.B, x))
        out = out + (whole.scale * change).type_as(out)
    return out


def _down(x: Tensor, A: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """Return all A_i x side by side [tokens, all ranks], each layer with its own dropout."""
    parts = [(_dropped(x, part), joined(A[part.start : part.end], 0)) for part in segments]
    return joined([narrow(dropped, whole.t()) for dropped, whole in parts], 1)


def narrow(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for a narrow b: on CPUs few columns take up to ten times as long as few rows."""
    if a.is_cpu and a.size(0) >= 64 and 1 < b.size(1) < 16:
        return (b.t() @ a.t()).t()
    return a @ b


def _scaled(h: Tensor, scales: Sequence[float], A: Sequence[Tensor]) -> Tensor:
    """Multiply each layer's part of h [tokens, all ranks] by the layer's scale."""
    if all(scale == scales[0] for scale in scales):
        return h if scales[0] == 1 else h * scales[0]
    parts = h.split([factor.size(0) for factor in A], 1)
    return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], 1)


def _dropped(x: Tensor, part: Segment) -> Tensor:
    return _mask(x, part).mul_(dense(x)) if part.dropout else x


def _mask(x: Tensor, part: Segment) -> Tensor:
    """Return a mask of 0 and 1 / (1 - p), the same for the same seed; p is in steps of 2^-16."""
    assert part.seed is not None
    generator = torch.Generator(x.device).manual_seed(part.seed)
    # four values from each 64 bits take a quarter of the time of rand on a CPU
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    drawn = drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    dropped = min(round(part.dropout * 2**16), 2**16 - 1)
    kept = (drawn >= dropped - 2**15).view(x.shape)
    return kept.to(x.dtype).div_(1 - dropped / 2**16)


class _AddLowRank(torch.autograd.Function):
    """y + B A x for several pairs, with a gradient written by hand.

    For the gradient it keeps the factors, x if an A trains, and A x if a factor trains. It copies
    neither x nor factors. Dropout masks are drawn again from their seeds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        in_place: bool,
        scales: list[float],
        segments: list[Segment],
        *factors: Tensor,
    ) -> Tensor:
        A, B = factors[: len(scales)], factors[len(scales) :]
        ctx.scales, ctx.segments = scales, segments
        h = _down(x, A, segments)
        trained = ctx.needs_input_grad[5:]
        ctx.save_for_backward(
            x if any(trained[: len(A)]) else None, h if any(trained) else None, *factors
        )
        scaled, up = _scaled(h, scales, A), joined(B, 1).t()
        if not in_place:
            return torch.addmm(y, scaled, up)
        ctx.mark_dirty(y)
        return y.addmm_(scaled, up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, h, *factors = ctx.saved_tensors
        scales, count = ctx.scales, len(ctx.scales)
        A, B = factors[:count], factors[count:]
        if x is None:
            x = _shape_only(g, A[0])
            if h is not None and torch.is_grad_enabled():
                raise DeltaError(
                    "a second derivative (create_graph=True) through a LoRA whose A is frozen "
                    "needs the input, which is not kept: make the LoRA without freeze_A"
                )
        elif torch.is_grad_enabled():  # a second derivative needs the graph of h
            h = _down(x, A, ctx.segments)
        wanted = ctx.needs_input_grad[1:2] + ctx.needs_input_grad[5:]
        g_x, *g_factors = _gradients(g, x, h, A, B, scales, ctx.segments, wanted)
        return (g, g_x, None, None, None, *g_factors)


def _shape_only(g: Tensor, A: Tensor) -> Tensor:
    """Return a tensor with the shape, dtype and device of an input that was not kept."""
    return g.new_empty(1, 1).expand(g.size(0), A.size(1))


def _gradients(
    g: Tensor,
    x: Tensor,
    h: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[float],
    segments: Sequence[Segment],
    wanted: Sequence[bool],
) -> list[Any]:
    """Return the gradients of x, all A and all B, from the gradient g of sum_i s_i B_i A_i x.

    Args:
        h: all A_i x side by side.
        wanted: for x, each A and each B, true if its gradient is needed.
    """
    count, ranks = len(A), [factor.size(0) for factor in A]
    of_x, of_A, of_B = wanted[0], wanted[1 : 1 + count], wanted[1 + count :]
    g_A: list[Any] = [None] * count
    g_B: list[Any] = [None] * count
    if any(of_B):
        g_B = [
            part if scale == 1 else part * scale
            for part, scale in zip(
                narrow(g.t(), h).contiguous().split(ranks, 1), scales, strict=True
            )
        ]
    g_h = _scaled(narrow(g, joined(B, 1)), scales, A).split(ranks, 1)
    g_x = None
    for part in segments:
        these = slice(part.start, part.end)
        own = joined(g_h[these], 1)
        mask = _mask(x, part) if part.dropout else None
        if any(of_A[these]):
            dropped = x if mask is None else x * mask
            g_A[these] = (own.t() @ dropped).split(ranks[these], 0)
        if of_x:
            more = own @ joined(A[these], 0)
            more = more if mask is None else more.mul_(mask)
            g_x = more if g_x is None else g_x + more
    return [g_x, *g_A, *g_B]


# ------------------------------------------------------------------------------------ rescaled rows
def rescales(x: Any) -> bool:
    """True if `rescaled` takes this input of a Linear or Conv1D."""
    return ENABLED and is_eager(x)


def rescaled(
    call: Call, x: Tensor, change: LowRank, scale: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return n (W x + s B A x) + b.

    Args:
        call: the forward of a Linear or Conv1D, on W and b.
        scale: n [out_features].
        weight: W [out_features, in_features].
    """
    flat = x if x.ndim == 2 else x.reshape(-1, x.size(-1))
    out, factors = call(flat), (like(change.A, x), like(change.B, x))
    segments, in_place = _segments([change.dropout], True), not out._is_view()
    y = _Rescaled.apply(
        out, flat, in_place, change.scale, segments, like(scale, x), weight, bias, *factors
    )
    return _shaped(y, x)


class _Rescaled(torch.autograd.Function):
    """y = n u + b with u = W x + s B A x, from W x + b, with a gradient written by hand.

    It keeps x and A x if n, A or B trains. If n trains, it keeps u too, unless u is wider than x: a
    wider u is computed again for the gradient of n. It never keeps the output, which may be changed
    in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        in_place: bool,
        scale: float,
        segments: list[Segment],
        n: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.segments = scale, segments
        h = _down(x, [A], segments)
        kept = ctx.needs_input_grad[5] and out.size(1) <= x.size(1)
        if in_place and not kept:
            ctx.mark_dirty(out)
            u = out.addmm_(h, B.t(), alpha=scale)
        else:
            u = torch.addmm(out, h, B.t(), alpha=scale)
        u = u if b is None else u.sub_(b)
        inner = (x, h) if any(ctx.needs_input_grad[i] for i in (5, 8, 9)) else (None, None)
        ctx.save_for_backward(*inner, n, W, A, B, u if kept else None)
        y = u * n if kept else u.mul_(n)
        return y if b is None else y.add_(b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, h, n, W, A, B, u = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if x is None:
            x = _shape_only(g, A)
        elif torch.is_grad_enabled():  # a second derivative needs the graphs of h and u
            h, u = _down(x, [A], ctx.segments), None
        g_u, g_n, g_b = g * n, None, None
        if wanted[5]:
            u = F.linear(x, W).addmm_(h, B.t(), alpha=ctx.scale) if u is None else u
            g_n = (g * u).sum(0)
        if wanted[7]:
            g_b = (g - g_u).sum(0)
        wanted = wanted[1:2] + wanted[8:]
        g_x, g_A, g_B = _gradients(g_u, x, h, [A], [B], [ctx.scale], ctx.segments, wanted)
        return (g_u, g_x, None, None, None, g_n, None, g_b, g_A, g_B)


# ------------------------------------------------------------------------------------ in the weight
CHUNK = 2**18  # values that each thread works on at a time: 1 MiB, which fits a core's cache


def add_to_weight(old: Tensor, new: Tensor, run: Sequence[LowRank]) -> Iterator[Tensor]:
    """Write W + sum_i s_i B_i A_i into `new`, rounded once; yield each chunk after it is written.

    Args:
        old: W [out_features, in_features].
    """
    wide = torch.promote_types(old.dtype, torch.float32)
    A, B, scale, _ = side_by_side(run, wide)
    A, B = A.to(wide), B.to(wide)
    if not old.is_contiguous():  # stored as (in, out): work on the transposed matrices
        old, new, A, B = old.t(), new.t(), B.t(), A.t()
    rows = len(old)
    if old.device.type == "cpu":  # with a multiple of 8 rows, a chunk is a multiple of 8 bytes
        rows = 8 + CHUNK * torch.get_num_threads() // max(old.size(1), 1) // 8 * 8
    parts = (tensor.split(max(rows, 1)) for tensor in (old, new, B))
    for before, after, up in zip(*parts, strict=True):
        if wide == old.dtype:
            torch.addmm(before, up, A, alpha=scale, out=after)
        else:
            after.copy_(before.to(wide).addmm_(up, A, alpha=scale))
        yield after
