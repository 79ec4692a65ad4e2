"""Low-rank adapter: a bottleneck adapter whose two matrices are low-rank. arXiv:2106.04647."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..author import GLOROT, Delta, DeltaConfig, OutputLayer, Site, activation, linear, option


@dataclass
class LowRankAdapterConfig(DeltaConfig):
    """Options of the low-rank adapter.

    Attributes:
        reduction_factor: the hidden layer has width // reduction_factor units.
        non_linearity: its activation, by transformers' name.
        low_rank_w_init: how the factors start.
        low_rank_rank: rank of both matrices.
    """

    reduction_factor: int = option(32, minimum=1)
    non_linearity: str = "gelu_new"
    low_rank_w_init: str = option("glorot-uniform", choices=GLOROT)
    low_rank_rank: int = option(1, minimum=1)


class LowRankLinear(nn.Module):
    """x W_left W_right + b, with W_left [in, rank] and W_right [rank, out]."""

    def __init__(self, site: Site, n_in: int, n_out: int, config: LowRankAdapterConfig) -> None:
        super().__init__()
        self.W_left = site.parameter(n_in, config.low_rank_rank)
        self.W_right = site.parameter(config.low_rank_rank, n_out)
        self.b = site.parameter(n_out)
        for factor in (self.W_left, self.W_right):
            GLOROT[config.low_rank_w_init](factor)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.W_left.T), self.W_right.T, self.b)


class LowRankAdapterLayer(OutputLayer):
    """h + up(f(down(h))) on the module's output h [..., width]; up is 0 at the start."""

    def __init__(self, site: Site, config: LowRankAdapterConfig) -> None:
        super().__init__()
        self.width = site.out_features
        hidden = max(1, self.width // config.reduction_factor)
        self.down_sampler = LowRankLinear(site, self.width, hidden, config)
        self.non_linearity = activation(config.non_linearity)
        self.up_sampler = LowRankLinear(site, hidden, self.width, config)
        nn.init.zeros_(self.up_sampler.W_right)

    def change(self, h: Tensor) -> Tensor:
        return h + self.up_sampler(self.non_linearity(self.down_sampler(h)))


class LowRankAdapterModel(Delta):
    """Low-rank adapters, the baseline of the Compacter paper. arXiv:2106.04647.

    Example:
        >>> from torch import nn
        >>> from opendelta import LowRankAdapterModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = LowRankAdapterModel(model, modified_modules=["0"], reduction_factor=4)
        >>> sum(p.numel() for p in delta.parameters())
        30
    """

    delta_type = "low_rank_adapter"
    config_class = LowRankAdapterConfig
    layer_class = LowRankAdapterLayer
    default_modified_modules = ("attn.proj", "ff.w2", "mixer.out")
    default_learning_rate = 1e-2
