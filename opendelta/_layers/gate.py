"""A learned gate on the change of a delta layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._modules import arithmetic, calls
from .site import Site


class Gate(nn.Module):
    """UniPELT's learned gate, g = sigmoid(w h + b) at each position. arXiv:2110.07577.

    The paper averages the gate over the sequence. Here each position has its own gate: so a causal
    model stays causal, and generates the same with and without its cache. A gate starts at 1/2.

    Args:
        width: size of the last axis of `h`, or of axis 1 for images; 0: the gate is sigmoid(b).
        on_input: `h` is the module's input; else it is the module's output.
    """

    def __init__(self, site: Site, width: int, on_input: bool) -> None:
        super().__init__()
        self.on_input = on_input
        self.axis = site.axis
        self.weight = site.parameter(1, width) if width else None
        self.bias = site.parameter(1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def logit(self, h: Tensor) -> Tensor:
        """Return w h + b, with size 1 on the axis of the width."""
        if self.weight is None:
            return self.bias
        h = calls.dense(h).movedim(self.axis, -1)
        return arithmetic.linear(h, self.weight, self.bias).movedim(-1, self.axis)

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.logit(h))
