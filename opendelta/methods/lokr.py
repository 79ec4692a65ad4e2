"""LoKr: a change that is a Kronecker product. arXiv:2309.14859."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..author import Delta, DeltaConfig, Site, WeightLayer, option, widened


@dataclass
class LokrConfig(DeltaConfig):
    """Options of LoKr.

    Attributes:
        r: rank of the low-rank factors.
        alpha: the change is scaled by alpha / r.
        decompose_both: let the small factor W1 be low-rank too, if its factors are smaller.
        decompose_factor: W1 has at most this many rows and columns. -1: for each size of the
            module, the largest divisor up to its square root.
        rank_pattern, alpha_pattern: {pattern: value} for some of the modules.
    """

    r: int = option(8, minimum=1)
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = option(-1, minimum=-1)
    rank_pattern: dict[str, int] | None = option(None, minimum=1, modules=())
    alpha_pattern: dict[str, float] | None = option(None, modules=())


def divide(size: int, factor: int) -> tuple[int, int]:
    """Return (m, n) with m n = size; m is `factor` if that divides `size`.

    Else m <= n, and m is the largest divisor that is not above `factor` (if `factor` is not -1).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    m = next(m for m in range(limit, 0, -1) if size % m == 0)
    return m, size // m


class LokrLayer(WeightLayer):
    """y = W x + (alpha / r) (W1 kron W2) x; W1 starts as 0.

    (W1 kron W2) x is W1 X W2^T for x as a matrix X, so the product is never built.
    """

    def __init__(self, site: Site, config: LokrConfig) -> None:
        super().__init__(site)
        rank = (config.rank_pattern or {}).get(site.name, config.r)
        self.scaling = (config.alpha_pattern or {}).get(site.name, config.alpha) / rank
        (a, c) = divide(site.out_features, config.decompose_factor)
        (b, d) = divide(site.in_features, config.decompose_factor)
        factors = {"lokr_w1": (a, b, config.decompose_both), "lokr_w2": (c, d, True)}
        for name, (rows, columns, low_rank) in factors.items():
            if low_rank and rank < max(rows, columns) / 2:
                self.register_parameter(f"{name}_a", site.parameter(rows, rank))
                self.register_parameter(f"{name}_b", site.parameter(rank, columns))
            else:
                self.register_parameter(name, site.parameter(rows, columns))
        for tensor in self.parameters():
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        nn.init.zeros_(next(self.parameters()))

    def factor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W1 for the name "lokr_w1", W2 for "lokr_w2", computed in at least `dtype`."""
        own: Any = self._parameters
        parts = [name] if name in own else [f"{name}_a", f"{name}_b"]
        return functools.reduce(torch.matmul, [widened(own[part], dtype) for part in parts])

    def delta_weight(self) -> Tensor:
        return self.scaling * torch.kron(self.factor("lokr_w1"), self.factor("lokr_w2"))

    def product(self, x: Tensor) -> Tensor:
        W1, W2 = (self.factor(name, x.dtype).type_as(x) for name in ("lokr_w1", "lokr_w2"))
        X = x.unflatten(-1, (W1.size(1), W2.size(1)))
        return self.scaling * (W1 @ X @ W2.T).flatten(-2)


class LokrModel(Delta):
    """Kronecker products beside linear modules. arXiv:2309.14859.

    Example:
        >>> from torch import nn
        >>> from opendelta import LokrModel
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> delta = LokrModel(model, modified_modules=["0"], r=1)
        >>> sum(p.numel() for p in delta.parameters())
        24
    """

    delta_type = "lokr"
    config_class = LokrConfig
    layer_class = LokrLayer
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 1e-2
