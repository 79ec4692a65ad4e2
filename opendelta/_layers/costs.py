"""Count the floating-point operations of one delta layer on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.kinds import kind_of


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward: only of matrix products, 2 per multiply-add.

    Attributes:
        per_token: operations for each position that passes the module.
        per_forward: operations once in a forward, on the layer's parameters alone.
    """

    per_token: int
    per_forward: int


def counted(call: Callable[[], Any]) -> int:
    """Count the operations of matrix products in `call`."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and seldom needed

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def around(
    module: nn.Module,
    run: Callable[[nn.Module, Tensor, Tensor], None],
    width: int | None,
    reads: int | None,
    dtype: torch.dtype,
) -> Flops:
    """Count the operations that a layer adds to a forward of `module`.

    Args:
        run: runs the layer around a module that does nothing; takes this module, an input and an
            output.
        width: width of the output, if the table of kinds does not know the module.
        reads: width of the input; None: the width of the module's input.
    """
    kind = kind_of(module)
    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    bare = nn.Module()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            empty = torch.empty(parameter.shape, **options)
            bare.register_parameter(name, nn.Parameter(empty))

    def of(length: int) -> tuple[int, int]:
        if kind is not None:
            x, out, positions = kind.example(length, dtype)
        else:
            assert width is not None
            x = torch.empty(1, length, width, **options)
            out, positions = x, length
        if reads is not None:
            x = torch.empty(1, length, reads, **options)
        return counted(lambda: run(bare, x, out)), positions

    (two, few), (three, more) = of(2), of(3)
    each = (three - two) // (more - few)
    return Flops(each, two - few * each)
