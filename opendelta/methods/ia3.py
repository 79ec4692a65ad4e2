"""IA3: learned rescaling of a module's output or input. arXiv:2205.05638."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..author import (
    Acts,
    Delta,
    DeltaConfig,
    DeltaLayer,
    Params,
    Site,
    dense,
    first_input,
    option,
    replace_input,
)


@dataclass
class IA3Config(DeltaConfig):
    """Options of IA3.

    Attributes:
        feedforward_modules: the modified modules whose input is rescaled instead of their output.
            None: the second layers of the feed-forward blocks.
    """

    feedforward_modules: list[str] | None = option(None, modules=["ff.w2"])


class IA3Layer(DeltaLayer):
    """y = l * (W x + b), or y = W (l * x) + b for feed-forward modules; l is 1 at the start."""

    kinds = ("linear",)
    grows = True

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__()
        self.kind = site.kind
        self.acts = Acts.BEFORE if site.name in (config.feedforward_modules or ()) else Acts.AFTER
        size = site.in_features if self.acts is Acts.BEFORE else site.out_features
        self.ia3_l = site.parameter(size)
        nn.init.ones_(self.ia3_l)

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.acts is Acts.AFTER:
            out = call(*args, **kwargs)
            return out * self.ia3_l.type_as(out)
        x = dense(first_input(args, kwargs))
        args, kwargs = replace_input(args, kwargs, x * self.ia3_l.type_as(x))
        return call(*args, **kwargs)

    def fold(self, params: Params) -> Params:
        matrix = self.kind.matrix(params["weight"])
        columns = self.acts is Acts.BEFORE
        matrix = matrix * (self.ia3_l if columns else self.ia3_l[:, None])
        folded = params | {"weight": self.kind.like_weight(matrix, params["weight"])}
        if "bias" in params and not columns:
            folded["bias"] = (params["bias"] * self.ia3_l).type_as(params["bias"])
        return folded


class IA3Model(Delta):
    """Learned rescaling of keys, values and feed-forward activations. arXiv:2205.05638.

    Example:
        >>> from torch import nn
        >>> from opendelta import IA3Model
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = IA3Model(model, modified_modules=["0"])
        >>> [tuple(p.shape) for p in delta.parameters()]
        [(8,)]
    """

    delta_type = "ia3"
    config_class = IA3Config
    layer_class = IA3Layer
    default_modified_modules = ("attn.k", "attn.v", "ff.w2", "mixer.in")
    default_learning_rate = 3e-2
