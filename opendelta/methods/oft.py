"""OFT: a rotation of a module's input, block by block. arXiv:2306.07280."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._layers.matrices import cayley
from ..author import Delta, DeltaConfig, InputLayer, Params, Site, option, widened


@dataclass
class OFTConfig(DeltaConfig):
    """Options of OFT.

    Attributes:
        oft_block_size: a block has as many rows as the largest divisor of the module's input size
            up to this.
        block_share: use the same block R_i everywhere in a module.
        use_cayley_neumann: compute the inverse in Cayley's formula as a sum. It is cheaper, and
            only nearly orthogonal.
        num_cayley_neumann_terms: number of terms of this sum.
    """

    oft_block_size: int = option(32, minimum=2)
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = option(5, minimum=4, below=1000)


class OFTLayer(InputLayer):
    """y = f(x R), R = diag(R_1, ...), R_i = (I - Q_i) (I + Q_i)^-1, Q_i = -Q_i^T (Cayley).

    The upper triangles of the Q_i are trained; they are 0 at the start, so that R is I.
    """

    def __init__(self, site: Site, config: OFTConfig) -> None:
        super().__init__()
        self.kind = site.kind
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        limit = min(config.oft_block_size, site.in_features)
        self.size = next(b for b in range(limit, 0, -1) if site.in_features % b == 0)
        rows = 1 if config.block_share else site.in_features // self.size
        self.oft_R = site.parameter(rows, self.size * (self.size - 1) // 2)
        nn.init.zeros_(self.oft_R)

    def rotations(self) -> Tensor:
        """Return the R_i [blocks or 1, size, size] in at least float32."""
        upper = widened(self.oft_R)
        row, column = torch.triu_indices(self.size, self.size, 1, device=upper.device)
        Q = upper.new_zeros(upper.size(0), self.size, self.size)
        Q[:, row, column] = upper
        Q = Q - Q.mT
        if not self.terms:
            return cayley(Q)
        one = torch.eye(self.size, dtype=Q.dtype, device=Q.device)
        total, power = one + 2 * Q, Q
        for _ in range(self.terms - 3):
            power = power @ Q
            total = total + 2 * power
        return total + power @ Q

    def rotate(self, x: Tensor, R: Tensor) -> Tensor:
        """Multiply each block of the last axis of `x` by its R_i."""
        blocks = x.unflatten(-1, (-1, 1, self.size))
        return (blocks @ R.type_as(x)).flatten(-3)

    def change(self, x: Tensor) -> Tensor:
        return self.rotate(x, self.rotations())

    def fold(self, params: Params) -> Params:
        R = self.rotations()
        matrix = self.rotate(self.kind.matrix(params["weight"]).to(R.dtype), R.mT)
        return params | {"weight": self.kind.like_weight(matrix, params["weight"])}


class OFTModel(Delta):
    """Orthogonal transforms of the input of linear modules. arXiv:2306.07280.

    Example:
        >>> from torch import nn
        >>> from opendelta import OFTModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = OFTModel(model, modified_modules=["0"], oft_block_size=4)
        >>> [tuple(p.shape) for p in delta.parameters()]
        [(2, 6)]
    """

    delta_type = "oft"
    config_class = OFTConfig
    layer_class = OFTLayer
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 3e-3
