"""HRA: a chain of reflections of a module's input. arXiv:2405.17484."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..author import Delta, DeltaConfig, InputLayer, Params, Site, option, widened


@dataclass
class HRAConfig(DeltaConfig):
    """Options of HRA.

    Attributes:
        r: the number of reflections; even, as two equal ones in a row change nothing at the start.
    """

    r: int = option(8, minimum=2, multiple_of=2)


class HRALayer(InputLayer):
    """y = W H_1 ... H_r x + b, with H_i = I - 2 u_i u_i^T / |u_i|^2 and u [in, r].

    The u_i are the columns of u. At the start each is random and equal to its neighbour, so the
    product is I.
    """

    kinds = ("linear",)

    def __init__(self, site: Site, config: HRAConfig) -> None:
        super().__init__()
        self.kind = site.kind
        self.hra_u = site.parameter(site.in_features, config.r)
        if not self.hra_u.is_meta:
            half = torch.empty_like(self.hra_u[:, ::2])
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
            with torch.no_grad():
                self.hra_u.copy_(half.repeat_interleave(2, dim=1))

    def reflections(self, like: Tensor) -> list[Tensor]:
        """Return u_i / |u_i| [in] for each i, computed in at least float32."""
        u = widened(self.hra_u)
        return list((u / torch.linalg.vector_norm(u, dim=0)).to(like.dtype).unbind(1))

    def change(self, x: Tensor) -> Tensor:
        for u in reversed(self.reflections(x)):
            x = x - 2 * (x @ u)[..., None] * u
        return x

    def fold(self, params: Params) -> Params:
        matrix = self.kind.matrix(params["weight"])
        for u in self.reflections(matrix):
            matrix = matrix - 2 * (matrix @ u)[:, None] * u
        return params | {"weight": self.kind.like_weight(matrix, params["weight"])}


class HRAModel(Delta):
    """Householder reflections of the input of linear modules. arXiv:2405.17484.

    Example:
        >>> from torch import nn
        >>> from opendelta import HRAModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = HRAModel(model, modified_modules=["0"], r=2)
        >>> [tuple(p.shape) for p in delta.parameters()]
        [(8, 2)]
    """

    delta_type = "hra"
    config_class = HRAConfig
    layer_class = HRALayer
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 0.1
