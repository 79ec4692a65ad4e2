"""The hypercomplex linear layer: a weight that is a sum of Kronecker products. arXiv:2102.08597."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..author import Site, linear
from ._hypercomplex_factors import Blocks, Rule


class HypercomplexLinear(nn.Module):
    """x (sum_i A_i kron B_i) + b, for x [..., in].

    Args:
        zero: let the weight be 0 at the start.

    `forward` takes `shared`, a `SharedParts`: its `rule` and `blocks` replace the layer's own ones
    if the options share them.
    """

    def __init__(
        self, site: Site, n_in: int, n_out: int, config: Any, bias: bool, zero: bool = False
    ) -> None:
        super().__init__()
        self.key = f"{n_in}x{n_out}"
        self.rule = None if config.shared_phm_rule else Rule(site, config)
        self.blocks = None if config.shared_W_phm else Blocks(site, n_in, n_out, config, zero)
        self.b = site.parameter(n_out) if bias else None
        if self.b is not None:
            nn.init.zeros_(self.b)

    def forward(self, x: Tensor, shared: Any) -> Tensor:
        A = (self.rule or shared.rule)(x.dtype)
        B = (self.blocks or shared.blocks[self.key])(x.dtype)
        weight = torch.einsum("nij,nkl->ikjl", A, B)
        rows, columns = weight.size(0) * weight.size(1), weight.size(2) * weight.size(3)
        bias = None if self.b is None else self.b.type_as(x)
        return linear(x, weight.reshape(rows, columns).T.to(x.device), bias)


class SharedParts(nn.Module):
    """The A_i, and the B_i for each width, if the options share them between layers."""

    def __init__(self, sites: list[Site], config: Any) -> None:
        super().__init__()
        self.rule = Rule(sites[0], config) if config.shared_phm_rule else None
        self.blocks = nn.ModuleDict()
        for site in sites if config.shared_W_phm else ():
            w, hidden = site.out_features, config.hidden(site.out_features)
            self.blocks[f"{w}x{hidden}"] = Blocks(site, w, hidden, config, zero=False)
            self.blocks[f"{hidden}x{w}"] = Blocks(site, hidden, w, config, zero=True)
