"""Find out by one run whether the output of a module is what the table of kinds says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import SiteError
from .calls import hidden_key
from .kinds import Kind, Norm, kind_of
from .probing import is_known
from .trials import bare, facts, on_meta, on_shapes

# What a layer needs of the output: hidden states somewhere in it; one tensor with the channels of
# the kind; or one tensor in the shape of the product that the kind computes.
Needs = Literal["hidden", "channels", "product"]
_found: dict[tuple, tuple[Any, Tensor] | None] = {}
MOST = 64  # groups that a module may split its input into


def misfit(module: nn.Module, cls: type[nn.Module], needs: Needs) -> str | None:
    """Return in words how the output of a module differs from what its kind says.

    None: it does not, or a run does not tell. Only a forward of a class's own is run, on shapes.

    Args:
        cls: the module's own class, without deltas.
    """
    kind, forward = None if is_known(cls) else kind_of(module), cls.forward
    if kind is None:
        return None
    key = (forward, kind, *facts(module))
    if key not in _found:
        _found[key] = _tried(module, forward, kind)
    run = _found[key]
    if run is not None and needs == "hidden" and not isinstance(run[0], Tensor):
        return _without_hidden(run[0], kind)
    if run is not None and (why := _other_shape(*run, kind, needs)) is not None:
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


@on_shapes()
def _tried(module: nn.Module, forward: Callable[..., Any], kind: Kind) -> tuple[Any, Tensor] | None:
    """Return the output of a forward on shapes, and what the kind says; None: it fails."""
    try:
        made = on_meta(module)
    except Exception:  # some tensors of other libraries do not move
        return None
    own = (t.dtype for t in made._parameters.values() if t is not None and t.is_floating_point())
    for x, plain in _examples(module, kind, next(own, torch.float32)):
        try:
            return forward(made, x), plain
        except Exception:  # whatever a forward of somebody's own raises on such an input
            continue
    return None


def _examples(module: nn.Module, kind: Kind, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs to try, and what the kind computes from each; some forwards split an axis."""
    x, plain, _ = kind.example(3, dtype)
    yield x, plain
    if kind.is_product:
        yield x[0], plain[0]
        for size in {v for v in vars(module).values() if type(v) is int and 1 < v <= MOST}:
            yield kind.example(size, dtype)[:2]


@torch.no_grad()
def _looks_up(module: nn.Module, forward: Callable[..., Any], kind: Kind) -> bool:
    """True if the same index gives the same output at each place, as positions do not.

    Also if a run does not tell: a forward may need more than the indices.
    """
    made = bare(module)
    made.training = False
    rows = torch.linspace(-1, 1, kind.in_features)  # one column in memory, however wide it is
    made.__dict__["_parameters"]["weight"] = rows[:, None].expand(-1, kind.out_features)
    last = kind.in_features - 1
    ids = torch.tensor([max(last - 1, 0), last, max(last - 1, 0)])  # padding is an early index
    needed = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty]
    for each in (ids[None], ids):
        try:
            out = forward(made, each)
            return torch.equal(out[..., 0, :], out[..., 2, :])
        except IndexError:
            return False
        except (TypeError, ValueError, AttributeError):  # it may take the other one
            continue
        except Exception:  # whatever a forward of somebody's own raises on such an input
            return True
    return len(needed) > 2  # the module, the indices, and more
