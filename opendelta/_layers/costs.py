"""Floating-point operations of one delta layer, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.kinds import kind_of


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward: those of matrix products, 2 a multiply-add.

    Attributes:
        per_token: for each position that passes the module.
        per_forward: once, however many there are: what the layer computes from its parameters.
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
    """Count what a layer adds to a forward of `module`.

    Args:
        run: runs the layer around a module that does nothing, from an input and an output of it.
        width: of the output, where the table of kinds does not know the module.
        reads: width of the input, where that is not the module's own.
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
