"""LoRA: a low-rank change beside a weight. arXiv:2106.09685."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..delta import Delta
from ..layers import Site, first_input
from ..options import DeltaConfig, option
from ..site import DeltaLayer, Params


@dataclass
class LoraConfig(DeltaConfig):
    """Options of LoRA.

    Attributes:
        lora_r: rank of the change.
        lora_alpha: the change is scaled by lora_alpha / lora_r.
        lora_dropout: probability of dropping an input of the change while training; embeddings,
            and modules whose weight is read, have no such input.
    """

    lora_r: int = option(8, minimum=1)
    lora_alpha: float = 16
    lora_dropout: float = option(0.0, minimum=0.0, below=1.0)


class LoraLayer(DeltaLayer):
    """y = W x + (alpha / r) B A x, with A [r, in] and B [out, r]; B A is 0 at the start."""

    kinds = ("linear", "embedding", "conv2d")
    flow = "beside"

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__()
        assert site.kind is not None
        self.kind = site.kind
        self.scaling = config.lora_alpha / config.lora_r
        self.dropout = config.lora_dropout if site.kind.name != "embedding" else 0.0
        self.lora_A = site.parameter(config.lora_r, site.in_features)
        self.lora_B = site.parameter(site.out_features, config.lora_r)
        if site.kind.name == "embedding":  # as in loralib: kaiming's bound is 1 / sqrt(vocabulary)
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        out, x = call(*args, **kwargs), first_input(args, kwargs)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return out + self.scaling * self.kind.low_rank(x, self.lora_A, self.lora_B).type_as(out)

    def fold(self, params: Params) -> Params:
        matrix = self.kind.matrix(params["weight"]) + self.scaling * (self.lora_B @ self.lora_A)
        return params | {"weight": self.kind.like_weight(matrix, params["weight"])}


class LoraModel(Delta):
    """Low-rank changes beside Linear, Conv1D, Embedding and Conv2d modules. arXiv:2106.09685.

    Example:
        >>> from torch import nn
        >>> from opendelta import LoraModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = LoraModel(model, modified_modules=["0"], lora_r=2)
        >>> sorted(delta.state_dict())
        ['0.deltas.lora.lora_A', '0.deltas.lora.lora_B']
    """

    delta_type = "lora"
    config_class = LoraConfig
    layer_class = LoraLayer
    default_modified_modules = ("attn.q", "attn.v")
