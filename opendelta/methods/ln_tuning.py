"""LN tuning: train the scales and biases of normalisations. arXiv:2312.11420."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..author import Delta, DeltaConfig, DeltaLayer, Norm, Params, Site


@dataclass
class LNTuningConfig(DeltaConfig):
    """LN tuning has no options of its own.

    LN tuning goes on normalisations. Any other module of `modified_modules` stands for all
    normalisations inside it.
    """


class LNTuningLayer(DeltaLayer):
    """y = s f(x) + b, for a normalisation f; s [width] is 1 and b [width] is 0 at the start.

    So a weight w becomes s w, and a bias c becomes s c + b. A factor works for any kind of
    normalisation, and on top of other deltas. There is no b if the normalisation has no bias.
    """

    kinds = ("norm",)
    inside = True
    why_not = "the module does not scale by its weight"
    any_axis = True

    def __init__(self, site: Site, config: LNTuningConfig) -> None:
        super().__init__()
        self.kind = site.kind
        self.by_weight = isinstance(site.kind, Norm) and site.kind.scales_by_weight
        self.scale = nn.Parameter(nn.init.ones_(site.parameter(*site.kind.channels)))
        self.bias = None
        if site.module._parameters.get("bias") is not None:
            self.bias = nn.Parameter(nn.init.zeros_(site.parameter(*site.kind.channels)))

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        out = call(*args, **kwargs)
        out = out * self.kind.per_channel(self.scale, out).type_as(out)
        if self.bias is None:
            return out
        return out + self.kind.per_channel(self.bias, out).type_as(out)

    @property
    def folds(self) -> bool:
        return super().folds and self.by_weight

    def fold(self, params: Params) -> Params:
        folded = {name: tensor * self.scale for name, tensor in params.items()}
        if self.bias is not None:
            folded["bias"] = folded["bias"] + self.bias
        return {name: tensor.type_as(params[name]) for name, tensor in folded.items()}


class LNTuningModel(Delta):
    """Trainable scales and biases of LayerNorms and RMSNorms. arXiv:2312.11420.

    Example:
        >>> from torch import nn
        >>> from opendelta import LNTuningModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> delta = LNTuningModel(model, modified_modules=["root"])
        >>> sorted(delta.state_dict())
        ['1.deltas.ln_tuning.bias', '1.deltas.ln_tuning.scale']
    """

    delta_type = "ln_tuning"
    config_class = LNTuningConfig
    layer_class = LNTuningLayer
    default_modified_modules = ("layer_norm",)
    default_learning_rate = 1e-2
