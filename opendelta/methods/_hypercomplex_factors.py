"""The factors A_i and B_i of hypercomplex linear layers, sum_i A_i kron B_i. arXiv:2102.08597."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..author import GLOROT, OptionError, Site, widened


class Rule(nn.Module):
    """The n matrices A_i [n, n], or their factors [n, n, 1] and [n, 1, n] if `factorized`."""

    phm_rule: Tensor
    phm_rule_left: Tensor
    phm_rule_right: Tensor

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()
        n = config.hypercomplex_division
        self.factorized = config.factorized_phm_rule
        shapes = {"phm_rule": (n, n, n)}
        if self.factorized:
            shapes = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        for name, shape in shapes.items():
            tensor = site.parameter(*shape)
            if config.phm_c_init == "normal":
                nn.init.normal_(tensor, std=config.phm_init_range)
            else:
                nn.init.uniform_(tensor, -config.phm_init_range, config.phm_init_range)
            if config.learn_phm:
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor.detach())

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the A_i [n, n, n], computed in at least `dtype`."""
        if self.factorized:
            left, right = self.phm_rule_left, self.phm_rule_right
            return torch.bmm(widened(left, dtype), widened(right, dtype))
        return widened(self.phm_rule, dtype)


class Blocks(nn.Module):
    """The n matrices B_i [in / n, out / n], or their factors of rank `phm_rank` if `factorized`."""

    def __init__(self, site: Site, n_in: int, n_out: int, config: Any, zero: bool) -> None:
        super().__init__()
        n, rank = config.hypercomplex_division, config.phm_rank
        if n_in % n or n_out % n:
            raise OptionError(
                f"{site.name!r}: hypercomplex_division={n} must divide the adapter's sizes, which "
                f"are {n_in} and {n_out}"
            )
        self.factorized = config.factorized_phm
        start = GLOROT[config.hypercomplex_nonlinearity]
        if self.factorized:
            self.W_left = site.parameter(n, n_in // n, rank)
            self.W_right = site.parameter(n, rank, n_out // n)
        else:
            self.W = site.parameter(n, n_in // n, n_out // n)
        for tensor in self.parameters():
            for block in tensor.detach():
                start(block)
        if zero:
            nn.init.zeros_(self.W_right if self.factorized else self.W)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the B_i [n, in / n, out / n], computed in at least `dtype`."""
        if self.factorized:
            return torch.bmm(widened(self.W_left, dtype), widened(self.W_right, dtype))
        return widened(self.W, dtype)
