"""Refuse a call of a forward of somebody's own, where no layer can act on what it takes or gives.

When attaching, the forward was tried on its input alone: other arguments may ask for more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer
from .._modules import calls
from ..errors import SiteError
from .stack import Stack, acting_on

ELSEWHERE = (Acts.BEFORE, Acts.INSTEAD, Acts.WITHIN, Acts.SERVES)


def called(
    call: Callable[..., Any], module: nn.Module, stack: Stack, /, *args: Any, **kwargs: Any
) -> Any:
    """Run `call`, a forward of somebody's own, and raise for what no layer of `stack` can act on.

    Raises:
        SiteError: it gives several tensors where a layer acts on one, or it is an embedding that
            looks up no ids.
    """
    out = call(*args, **kwargs)
    if isinstance(out, Tensor):
        if isinstance(module, nn.Embedding):
            _check_looked_up(module, _on_output(stack), calls.first_given(args, kwargs), out)
        return out
    if all(layer.needs() == "hidden" for layer in _on_output(stack)):
        return out
    raise SiteError(
        f"this call of a {type(module).__name__} returned a {type(out).__name__}, and a delta on "
        "it acts on one tensor: call it without the argument that asks for more, or choose a "
        "method that takes hidden states in a tuple, such as adapters"
    )


def _on_output(stack: Stack) -> list[DeltaLayer]:
    return [layer for layer in acting_on(stack) if layer.acts not in ELSEWHERE]


def _check_looked_up(module: nn.Embedding, acting: list[DeltaLayer], x: Any, out: Tensor) -> None:
    """Raise if a table was called on other than ids, where a layer acts on the rows of ids."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return
    fits = out.size(-1) == module.embedding_dim
    if names := [ly.record.name for ly in acting if not fits or ly.needs() == "product"]:
        raise SiteError(
            f"this call of a {type(module).__name__} was given {x.dtype} of shape "
            f"{list(x.shape)}, and {', '.join(map(repr, names))} on it acts on ids alone: choose "
            "other modules, train all of this one by modules_to_save=, or let the model call "
            "another module here, such as an untied head"
        )
