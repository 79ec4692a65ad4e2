"""VeRA: two small vectors around random matrices that all layers share. arXiv:2310.11454."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..author import Delta, DeltaConfig, Site, WeightLayer, linear, option, widened


@dataclass
class VeraConfig(DeltaConfig):
    """Options of VeRA.

    Attributes:
        r: rank of the shared matrices; larger than LoRA's, as only vectors are trained.
        d_initial: the value of d at the start.
        vera_dropout: probability of dropping an input of the change while training.
        projection_prng_key: seed of the shared matrices; loading draws the matrices again.
        save_projection: save the shared matrices too.
    """

    r: int = option(256, minimum=1, below=2**16)
    d_initial: float = 0.1
    vera_dropout: float = option(0.0, minimum=0.0, below=1.0)
    projection_prng_key: int = option(0, minimum=0, below=2**63)
    save_projection: bool = False


class Projections(nn.Module):
    """A [r, largest in] and B [largest out, r], the same for the same seed and sizes; frozen."""

    def __init__(self, sites: list[Site], config: VeraConfig) -> None:
        super().__init__()
        self.key, persistent = config.projection_prng_key, config.save_projection
        sizes = max(s.in_features for s in sites), max(s.out_features for s in sites)
        A, B = sites[0].parameter(config.r, sizes[0]), sites[0].parameter(sizes[1], config.r)
        self.register_buffer("vera_A", A.detach(), persistent)
        self.register_buffer("vera_B", B.detach(), persistent)

    def seed(self) -> None:
        """Fill A and B by Kaiming's uniform start with the same numbers as PEFT."""
        generator = torch.Generator().manual_seed(self.key)
        for buffer in self.buffers():
            bound = math.sqrt(6 / buffer.size(1))
            buffer.copy_(torch.empty(buffer.shape).uniform_(-bound, bound, generator=generator))


class VeraLayer(WeightLayer):
    """y = W x + b * B (d * A x), with d [r] and b [out]; b is 0 at the start."""

    def __init__(self, site: Site, config: VeraConfig) -> None:
        super().__init__(site, config.vera_dropout)
        self.vera_lambda_d = nn.Parameter(
            nn.init.constant_(site.parameter(config.r), config.d_initial)
        )
        self.vera_lambda_b = nn.Parameter(nn.init.zeros_(site.parameter(site.out_features)))

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r], this layer's parts of the shared matrices."""
        A, B = self.shared.vera_A, self.shared.vera_B
        return A[:, : self.kind.in_features].to(x.device), B[: self.kind.out_features].to(x.device)

    def delta_weight(self) -> Tensor:
        A, B = map(widened, self.pair(self.vera_lambda_b))
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def product(self, x: Tensor) -> Tensor:
        A, B = self.pair(x)
        d, b = self.vera_lambda_d.type_as(x), self.vera_lambda_b.type_as(x)
        return b * linear(d * linear(x, A), B)


class VeraModel(Delta):
    """Trained vectors around shared random matrices, beside linear modules. arXiv:2310.11454.

    Example:
        >>> from torch import nn
        >>> from opendelta import VeraModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = VeraModel(model, modified_modules=["0", "2"], r=4)
        >>> sum(p.numel() for p in delta.parameters())
        18
    """

    delta_type = "vera"
    config_class = VeraConfig
    layer_class = VeraLayer
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 3e-2

    @classmethod
    def shared_for(cls, config: Any) -> Callable[..., nn.Module] | None:
        return Projections
