"""Find out by one run whether the output of a module is what the table of kinds says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..errors import SiteError
from .calls import hidden_key
from .facts import facts, remembered
from .faking import Shapes, on_shapes
from .kinds import Kind, Norm, kind_of
from .probing import is_known
from .trials import SIZES, alone, common_axis, shape_with, without_values

# What a layer needs of the output: hidden states somewhere in it; one tensor with the channels of
# the kind; or one tensor in the shape of the product that the kind computes. Or the input alone.
Needs = Literal["hidden", "channels", "product", "input"]
MOST = 64  # groups that a module may split its input into
ELSEWHERE = "another axis than its class does"
BY_COUNT = "an axis that depends on how many axes its input has"


class _Run(NamedTuple):
    """A run on shapes of one forward.

    Attributes:
        output: what the forward returned.
        plain: what the kind computes from the input.
        axis: in words, where the forward takes its width; None: where its kind does.
    """

    output: Any
    plain: Tensor
    axis: str | None


_found: dict[tuple, _Run | None] = {}


def misfit(module: nn.Module, cls: type[nn.Module], needs: Needs) -> str | None:
    """Return in words how the output of a module differs from what its kind says.

    None: it does not, or a run does not tell. Only a forward of a class's own is run, on shapes.

    Args:
        cls: the module's own class, without deltas.
    """
    kind, forward = None if is_known(cls) else kind_of(module), cls.forward
    if kind is None:
        return None
    known = facts(module)
    key = None if known is None else (forward, kind, *known)
    run = remembered(_found, key, lambda: _tried(module, forward, kind))
    if run is not None and run.axis is not None:
        return f"takes its width on {run.axis}"
    if needs == "input":
        return None
    if run is not None and needs == "hidden" and not isinstance(run.output, Tensor):
        return _without_hidden(run.output, kind)
    if run is not None and (why := _other_shape(run.output, run.plain, kind, needs)) is not None:
        return why
    if needs == "product" and kind.takes_ids and not _looks_up(module, forward, kind):
        return "does not look its input up in its weight"
    return None


def _without_hidden(output: Any, kind: Kind) -> str | None:
    try:
        hidden_key(output, kind.out_features)
    except SiteError:
        return f"returns a {type(output).__name__} with no tensor [..., {kind.out_features}]"
    return None


def _other_shape(output: Any, plain: Tensor, kind: Kind, needs: Needs) -> str | None:
    if not isinstance(output, Tensor):
        return f"returns a {type(output).__name__} instead of one tensor"
    whole = needs == "product" or isinstance(kind, Norm)
    if output.ndim == plain.ndim and not whole:
        same = output.size(kind.axis) == kind.out_features
    else:
        same = output.shape == plain.shape
    if same:
        return None
    return f"returns {list(output.shape)} where its sizes say {list(plain.shape)}"


@torch.no_grad()
def _tried(module: nn.Module, forward: Callable[..., Any], kind: Kind) -> _Run | None:
    """Return a run of a forward on shapes; None: it fails."""
    with on_shapes(module) as mode:
        try:
            made = without_values(module, mode)
        except Exception:  # some tensors of other libraries have no such twin
            return None
        own = (t for t in made._parameters.values() if t is not None and t.is_floating_point())
        like = next(own, torch.empty(0))
        for x, plain, usual in _examples(module, kind, like.dtype):
            try:
                output = forward(made, mode.empty(x.shape, x.dtype, like.device))
            except Exception:  # whatever a forward of somebody's own raises on such an input
                continue
            axis = None if usual else ELSEWHERE
            if usual and kind.is_product:
                takes = functools.partial(_takes, forward, made, mode, kind, like)
                axis = {-1: None, None: BY_COUNT}.get(common_axis(takes), ELSEWHERE)
            return _Run(output, plain, axis)
    return None


def _takes(
    forward: Callable[..., Any],
    made: nn.Module,
    mode: Shapes,
    kind: Kind,
    like: Tensor,
    count: int,
    axis: int,
) -> bool:
    """True if a product's forward takes an input of `count` axes with its width at `axis`.

    On another axis than the last one, it must also give its output's width there.

    Args:
        made: a module without values.
    """
    widths = (kind.in_features, kind.out_features)
    others = [size for size in SIZES if size not in widths][: count - 1]
    given, wanted = (shape_with(width, axis, others) for width in widths)
    try:
        output = forward(made, mode.empty(given, like.dtype, like.device))
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False
    shapes = [tuple(t.shape) for t in tree_iter(output) if isinstance(t, Tensor)]
    return axis == count - 1 or wanted in shapes


def _examples(
    module: nn.Module, kind: Kind, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield inputs to try, what the kind computes from each, and if the width is where it is usual.

    Some forwards split an axis.
    """
    square = 3 in (kind.in_features, kind.out_features)  # it would hide a wrong axis
    x, plain, _ = kind.example(5 if square else 3, dtype)
    yield x, plain, True
    if kind.is_product:
        sizes = [size for size in (3, 5, 7, 11) if size != kind.in_features]
        images = [(2, *sizes[:count]) for count in (2, 1, 3)]
        for before in images:
            yield x.new_empty(*before, x.size(-1)), plain.new_empty(*before, plain.size(-1)), True
        for batch, *rest in images:
            yield x.new_empty(batch, x.size(-1), *rest), plain, False
        yield x[0], plain[0], True
        for size in {v for v in vars(module).values() if type(v) is int and 1 < v <= MOST}:
            yield *kind.example(size, dtype)[:2], True
    elif kind.axis == 1 and plain.ndim == 4:
        yield x.movedim(1, -1), plain, False


@torch.no_grad()
def _looks_up(module: nn.Module, forward: Callable[..., Any], kind: Kind) -> bool:
    """True if the same index gives the same output at each place, as positions do not.

    Also if a run does not tell: a forward may need more than the indices.
    """
    made = alone(module)
    made.training = False
    rows = torch.linspace(-1, 1, kind.in_features)  # one column in memory, however wide it is
    made.__dict__["_parameters"]["weight"] = rows[:, None].expand(-1, kind.out_features)
    last = kind.in_features - 1
    ids = torch.tensor([max(last - 1, 0), last, max(last - 1, 0)])  # padding is an early index
    needed = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty]
    for each in (ids[None], ids):
        try:
            out = forward(made, each.clone())
            return torch.equal(out[..., 0, :], out[..., 2, :])
        except IndexError:
            return False
        except (TypeError, ValueError, AttributeError):  # it may take the other one
            continue
        except Exception:  # whatever a forward of somebody's own raises on such an input
            return True
    return len(needed) > 2  # the module, the indices, and more
