"""Parallel adapter: a bottleneck beside one module, or several in a row. arXiv:2110.04366."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor, nn

from ..author import BranchLayer, Delta, DeltaConfig, Site, activation, option


@dataclass
class ParallelAdapterConfig(DeltaConfig):
    """Options of the parallel adapter.

    Its `modified_modules` come in pairs, such as `["fc1", "fc2"]`. The adapter reads the input of
    the first module and adds to the output of the second. `["fc2", "fc2"]` is around one module.

    Attributes:
        bottleneck_dim: width of the hidden layer.
        non_linearity: its activation, by transformers' name.
        scaled: the adapter's output is multiplied by this; the paper's best is 4, with
            bottleneck_dim=512 beside the feed-forward layers. By position, a number after
            `non_linearity`.
    """

    bottleneck_dim: int = option(24, minimum=1)
    non_linearity: str = "gelu_new"
    _: KW_ONLY
    scaled: float = 1.0

    @classmethod
    def positional_names(cls, given: Sequence[Any] = ()) -> list[str]:
        names = super().positional_names()
        scaled = ["scaled"] if isinstance((*given, None, None, None)[2], int | float) else []
        return [*names[:2], *scaled, *names[2:]]


class ParallelAdapterLayer(BranchLayer):
    """y = f(x) + s up(g(down(x))) around all modules f of the pair; up is 0 at the start."""

    def __init__(self, site: Site, config: ParallelAdapterConfig) -> None:
        super().__init__()
        assert site.end is not None
        self.width, self.scaled = site.end.out_features, config.scaled
        self.gate_width = site.input_width
        self.down_proj = site.linear(self.gate_width, config.bottleneck_dim)
        self.non_linearity = activation(config.non_linearity)
        self.up_proj = site.linear(config.bottleneck_dim, self.width)
        nn.init.normal_(self.down_proj.weight, std=0.01)
        for start in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(start)

    def branch(self, x: Tensor) -> Tensor:
        return self.scaled * self.up_proj(self.non_linearity(self.down_proj(x)))


class ParallelAdapterModel(Delta):
    """Bottleneck adapters from the input of a module to the output of the same or a later one.

    arXiv:2110.04366.

    Example:
        >>> from torch import nn
        >>> from opendelta import ParallelAdapterModel
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> delta = ParallelAdapterModel(model, modified_modules=["0", "2"], bottleneck_dim=3)
        >>> sorted(delta.state_dict())[:2]
        ['0.deltas.parallel_adapter.down_proj.bias', '0.deltas.parallel_adapter.down_proj.weight']
    """

    delta_type = "parallel_adapter"
    config_class = ParallelAdapterConfig
    layer_class = ParallelAdapterLayer
    default_modified_modules = ("attn", "attn", "ff.w1", "ff.w2")
    default_learning_rate = 3e-3
