"""LoHa: a change that is the elementwise product of two low-rank ones. arXiv:2108.06098."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..author import Delta, DeltaConfig, Site, WeightLayer, option, widened


@dataclass
class LohaConfig(DeltaConfig):
    """Options of LoHa.

    Attributes:
        r: rank of both factors; the change has rank up to r * r.
        alpha: the change is scaled by alpha / r.
        rank_pattern, alpha_pattern: {pattern: value} for some of the modules.
    """

    r: int = option(8, minimum=1)
    alpha: float = 8
    rank_pattern: dict[str, int] | None = option(None, minimum=1, modules=())
    alpha_pattern: dict[str, float] | None = option(None, modules=())


class LohaLayer(WeightLayer):
    """y = W x + (alpha / r) ((A1 B1) * (A2 B2)) x, with A [out, r] and B [r, in]; B2 starts as 0.

    (A1 B1) * (A2 B2) is also the product of two matrices [out, r * r] and [r * r, in]. The columns
    of the first are the products of all pairs of columns of A1 and A2; the rows of the second are
    the products of all pairs of rows of B1 and B2. The matrix [out, in] is built only if it is no
    larger than these two matrices.
    """

    kinds = ("linear", "conv2d")

    def __init__(self, site: Site, config: LohaConfig) -> None:
        super().__init__(site)
        rank = (config.rank_pattern or {}).get(site.name, config.r)
        self.scaling = (config.alpha_pattern or {}).get(site.name, config.alpha) / rank
        self.hada_w1_a = site.parameter(site.out_features, rank)
        self.hada_w1_b = site.parameter(rank, site.in_features)
        self.hada_w2_a = site.parameter(site.out_features, rank)
        self.hada_w2_b = site.parameter(rank, site.in_features)
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.hada_w2_b)

    def parts(self) -> Iterator[Tensor]:
        """Return A1, B1, A2 and B2 in at least float32."""
        return map(widened, (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b))

    def delta_weight(self) -> Tensor:
        a1, b1, a2, b2 = self.parts()
        return self.scaling * (a1 @ b1) * (a2 @ b2)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        n_out, rank = self.hada_w1_a.shape
        n_in = self.hada_w1_b.size(1)
        if rank * rank * (n_in + n_out) >= n_in * n_out:
            return None
        a1, b1, a2, b2 = self.parts()
        A = (b1[:, None] * b2[None]).reshape(rank * rank, n_in)
        B = (a1[:, :, None] * a2[:, None]).reshape(n_out, rank * rank)
        return A, B, self.scaling


class LohaModel(Delta):
    """Hadamard products of low-rank changes beside linear and Conv2d modules. arXiv:2108.06098.

    Example:
        >>> from torch import nn
        >>> from opendelta import LohaModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = LohaModel(model, modified_modules=["0"], r=2)
        >>> sum(p.numel() for p in delta.parameters())
        64
    """

    delta_type = "loha"
    config_class = LohaConfig
    layer_class = LohaLayer
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 1e-2
