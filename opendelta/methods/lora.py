"""LoRA: a low-rank change beside a weight. arXiv:2106.09685."""

from __future__ import annotations

from typing import Any

from ..author import Delta, DeltaLayer
from ._dora_layer import DoraLayer
from ._lora_layer import LoraConfig, LoraLayer


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
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 3e-3
    combination: Any = None  # the `Combination`, if `combine` made the delta

    @classmethod
    def layer_for(cls, config: Any) -> type[DeltaLayer]:
        return DoraLayer if config.use_dora else LoraLayer
