"""Bottleneck adapter: a small residual network after a module. arXiv:1902.00751."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor, nn

from ..author import (
    Acts,
    Delta,
    DeltaConfig,
    DeltaLayer,
    OutputLayer,
    Site,
    activation,
    first_input,
    option,
    replace_input,
)


@dataclass
class AdapterConfig(DeltaConfig):
    """Options of the bottleneck adapter.

    Attributes:
        bottleneck_dim: width of the hidden layer.
        non_linearity: its activation, by transformers' name.
        scaling: the adapter's output is multiplied by this.
        layer_norm: "before": normalise the adapter's input. "after": normalise its output.
        residual: "output": add to the module's output. "input", only on a normalisation: add to the
            module's input and normalise again, as the adapters of arXiv:2005.00247 do in BERT.
    """

    bottleneck_dim: int = option(24, minimum=1)
    non_linearity: str = "gelu_new"
    _: KW_ONLY
    scaling: float = 1.0
    layer_norm: str | None = option(None, choices=[None, "before", "after"])
    residual: str = option("output", choices=["output", "input"])


class AdapterLayer(OutputLayer):
    """h + s up(f(down(h))) on the module's output h [..., width]; up is 0 at the start."""

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__()
        self.width, self.scaling = site.out_features, config.scaling
        self.layer_norm = config.layer_norm
        self.down_proj = site.linear(self.width, config.bottleneck_dim)
        self.non_linearity = activation(config.non_linearity)
        self.up_proj = site.linear(config.bottleneck_dim, self.width)
        self.norm: Any = site.layer_norm(self.width) if config.layer_norm else None
        nn.init.normal_(self.down_proj.weight, std=0.01)
        for start in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(start)

    def bottleneck(self, h: Tensor) -> Tensor:
        """Return s up(f(down(h)))."""
        x = self.norm(h) if self.layer_norm == "before" else h
        x = self.up_proj(self.non_linearity(self.down_proj(x)))
        return self.scaling * (self.norm(x) if self.layer_norm == "after" else x)

    def change(self, h: Tensor) -> Tensor:
        return h + self.bottleneck(h)


class InputAdapterLayer(AdapterLayer):
    """n(x + s up(f(down(n(x))))) around a normalisation n of x [..., width]."""

    kinds = ("norm",)
    acts = Acts.BEFORE
    enters = gates_itself = scales = True

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        h, x = call(*args, **kwargs), first_input(args, kwargs)
        change = (1 if self.gate is None else self.gate(h)) * self.strength() * self.bottleneck(h)
        args, kwargs = replace_input(args, kwargs, x + change.type_as(x))
        return call(*args, **kwargs)


class AdapterModel(Delta):
    """Bottleneck adapters after any module that returns hidden states. arXiv:1902.00751.

    The output may be a tensor, a tuple or a ModelOutput; its first floating tensor of the right
    width is adapted.

    Example:
        >>> from torch import nn
        >>> from opendelta import AdapterModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = AdapterModel(model, modified_modules=["0"], bottleneck_dim=3)
        >>> sum(p.numel() for p in delta.parameters())
        59
    """

    delta_type = "adapter"
    config_class = AdapterConfig
    layer_class = AdapterLayer
    default_modified_modules = ("attn.proj", "ff.w2", "mixer.out")
    default_learning_rate = 3e-3

    @classmethod
    def layer_for(cls, config: Any) -> type[DeltaLayer]:
        return InputAdapterLayer if config.residual == "input" else AdapterLayer
