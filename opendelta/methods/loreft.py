"""LoReFT: a change of hidden states in a low-rank subspace, at some positions. arXiv:2404.03592."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import matrices
from .._sequences import notes, tokens
from ..author import (
    Delta,
    DeltaConfig,
    DeltaLayer,
    OutputLayer,
    Site,
    change_hidden,
    option,
    widened,
)


@dataclass
class LoReftConfig(DeltaConfig):
    """Options of LoReFT.

    Attributes:
        low_rank_dimension: rows of R.
        first: number of tokens at the start of each row, or of each document that is packed into
            it, to change. Padding does not count.
        last: number of tokens at the end to change. If both are None, all tokens are changed.
    """

    low_rank_dimension: int = option(4, minimum=1)
    first: int | None = option(None, minimum=0)
    last: int | None = option(None, minimum=0)


class LoReftLayer(OutputLayer):
    """h + R^T (W h + b - R h) on the output h [..., width]; R [r, width] has orthonormal rows.

    R^T is the Q of the QR decomposition of the trained matrix [width, r]. W starts as R, b as 0.
    """

    scales = True

    def __init__(self, site: Site, config: LoReftConfig) -> None:
        super().__init__()
        self.width, self.first, self.last = site.out_features, config.first, config.last
        self.tokens = tokens.Tokens(site.module, site.name)
        shape = self.width, min(config.low_rank_dimension, self.width)
        self.rotate_layer, self.learned_source = site.parameter(*shape), site.linear(*shape)
        with torch.no_grad():
            start = torch.empty(shape, device=site.device)
            self.rotate_layer.copy_(nn.init.orthogonal_(start))
            self.learned_source.weight.copy_(self.R())
        nn.init.zeros_(self.learned_source.bias)

    def R(self) -> Tensor:
        """Return R [r, width] in at least float32."""
        return matrices.orthonormal(widened(self.rotate_layer)).T

    def change(self, h: Tensor) -> Tensor:
        R = self.R().type_as(h)
        return h + (self.learned_source(h) - h @ R.T) @ R

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = self.tokens.hearing(call, *args, **kwargs)
        if self.first is None and self.last is None:
            return change_hidden(out, self.width, self.scaled)

        def some(h: Tensor) -> Tensor:
            chosen = self.tokens.chosen(h, args, kwargs, self.first or 0, self.last or 0)
            return torch.where(chosen[..., None], self.scaled(h), h)

        return change_hidden(out, self.width, some)

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        return notes.notes_at_ends(made, modules, config.first, config.last)


class LoReftModel(Delta):
    """Low-rank changes of hidden states after any module that returns them. arXiv:2404.03592.

    Example:
        >>> from torch import nn
        >>> from opendelta import LoReftModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = LoReftModel(model, modified_modules=["0"], low_rank_dimension=2)
        >>> sum(p.numel() for p in delta.parameters())
        34
    """

    delta_type = "loreft"
    config_class = LoReftConfig
    layer_class = LoReftLayer
    default_modified_modules = ("ff.w2",)
    default_learning_rate = 1e-2
