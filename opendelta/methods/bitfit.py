"""BitFit: train biases alone. arXiv:2106.10199."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._modules.tensors import stored
from ..author import Delta, DeltaConfig, DeltaLayer, Params, Site, times, widened


@dataclass
class BitFitConfig(DeltaConfig):
    """BitFit has no options of its own.

    BitFit goes on linear layers, convolutions and normalisations. Any other module of
    `modified_modules` stands for all such modules inside it.
    """


class BitFitLayer(DeltaLayer):
    """y = f(x) + b, with b [out] that is 0 at the start; f may have a bias of its own or none.

    On an image or a normalisation over channels, b is one value for each channel.
    """

    kinds = ("linear", "conv2d", "norm")
    inside = True
    why_not = "the module has no bias"
    scales = True
    any_axis = True
    grows = True

    def __init__(self, site: Site, config: BitFitConfig) -> None:
        super().__init__()
        self.kind = site.kind
        self.has_bias = self.can_fold_on(site.module)
        self.bias = site.parameter(*site.kind.channels)
        nn.init.zeros_(self.bias)

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        out = call(*args, **kwargs)
        bias = times(self.strength(), widened(self.bias, out.dtype))
        return out + self.kind.per_channel(bias, out).type_as(out)

    @classmethod
    def can_fold_on(cls, module: nn.Module) -> bool:
        return stored(module, "bias") is not None

    @property
    def folds(self) -> bool:
        return super().folds and self.has_bias

    def fold(self, params: Params) -> Params:
        bias = params["bias"] + times(self.strength(), widened(self.bias))
        return params | {"bias": bias.type_as(params["bias"])}


class BitFitModel(Delta):
    """Trainable biases on top of the backbone's, also where it has none. arXiv:2106.10199.

    Example:
        >>> from torch import nn
        >>> from opendelta import BitFitModel
        >>> model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = BitFitModel(model, modified_modules=["root"])
        >>> [tuple(p.shape) for p in delta.parameters()]
        [(8,), (2,)]
    """

    delta_type = "bitfit"
    config_class = BitFitConfig
    layer_class = BitFitLayer
    default_modified_modules = ("attn", "ff", "mixer", "layer_norm")
    default_learning_rate = 3e-3
