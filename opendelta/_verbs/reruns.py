"""Run a model again where it may have left blocks out at random, as layer drop does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._deltas.first_forward import left_out

MOST = 5  # further runs that train


def until_all_ran(
    backbone: Backbone, run: Callable[[], Any], without: list[str], trained: Callable[[], list[str]]
) -> list[str]:
    """Run the model until the layers that it left out at random have run; note what ran.

    A run in eval mode leaves none out, and tells those that no run reaches.

    Args:
        run: runs the model.
        without: the parameters without a gradient in a run before.
        trained: runs the model with a backward, and returns the parameters without a gradient.

    Returns:
        The parameters that got no gradient in any run.
    """
    away, failed = left_out(backbone), True
    if not away:
        return without
    with _evaluating(backbone.model), torch.no_grad(), contextlib.suppress(Exception):
        run()
        failed = False  # a model may want other inputs in eval mode
    if not failed and left_out(backbone) == away:
        return without
    for _ in range(MOST):
        if not without and not left_out(backbone):
            break
        still = set(trained())
        without = [name for name in without if name in still]
    return without


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set all modules to eval mode, and put their modes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
