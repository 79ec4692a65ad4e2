"""DoRA: LoRA on the direction of a weight, and a magnitude for each output. arXiv:2402.09353."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layers import low_rank
from .._layers.base import params_beneath
from .._layers.low_rank import LowRank
from .._layers.starts import plain_weight
from ..author import Acts, Params, Site, dense, first_input, widened
from ._lora_layer import LoraConfig, LoraLayer


class DoraLayer(LoraLayer):
    """y = n (W x + D x) + b, with D = (alpha / r) B A and n = m / |W + D|, row by row.

    m [out] starts as |W|, so that n is 1. As in the paper, no gradient passes through |W + D|. W is
    the weight with the changes of the foldable layers that act before this one.
    """

    kinds = ("linear", "conv2d")
    acts = Acts.AFTER
    sees_module = True

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.lora_magnitude_vector = site.parameter(site.out_features)
        plain_weight(site, "use_dora")  # refuses others
        if not self.lora_A.is_meta:
            weight = params_beneath(site.module, site.beneath)["weight"]
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self.norm(self.kind.matrix(widened(weight))))

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """Return |W + s B A| of each row, from W A^T and A A^T: the sum is never built.

        For a row of zeros it is a tiny number instead of 0, so that n is 1 at the start there too.
        """
        A, B = (t.type_as(weight) for t in self.pair())
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        crossed = 2 * self.scaling * ((weight @ A.T) * B).sum(1)
        own = self.scaling**2 * ((B @ (A @ A.T)) * B).sum(1)
        # Detached: `no_grad` lets the tangents of forward mode pass.
        return (squares + crossed + own).clamp_min(torch.finfo(wide).tiny).sqrt().detach()

    def _scale(self, params: Params) -> Tensor:
        return self.lora_magnitude_vector / self.norm(self.kind.matrix(params["weight"]))

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        params, x = call.params(), first_input(args, kwargs)  # type: ignore[attr-defined]
        if call.raw and low_rank.rescales(x):  # type: ignore[attr-defined]
            change = LowRank(*self.factors(), self.dropout if self.training else 0.0)
            weight, bias = self.kind.matrix(params["weight"]), params.get("bias")
            return low_rank.rescaled(call, x, change, self._scale(params), weight, bias)
        out = call(*args, **kwargs)
        x = F.dropout(dense(x), self.dropout, self.training) if self.dropout else x
        scale = self._scale(params)
        more = self.kind.per_channel(scale - 1, out).type_as(out)  # exactly 0 at the start
        scale = self.kind.per_channel(scale, out).type_as(out)
        bias = params.get("bias")
        bias = 0.0 if bias is None else self.kind.per_channel(bias.type_as(out), out)
        return out + more * (out - bias) + scale * self.product(x).type_as(out)

    def fold(self, params: Params) -> Params:
        matrix = self.kind.matrix(params["weight"]) + self.delta_weight()
        matrix = self._scale(params)[:, None] * matrix
        return params | {"weight": self.kind.like_weight(matrix, params["weight"])}
