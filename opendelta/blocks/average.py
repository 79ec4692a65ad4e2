"""Average: a weighted sum of changes, with constant or learned weights. arXiv:2307.13269."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from ..author import Block, BlockConfig, BlockLayer, Chosen, OptionError, Site, as_scaling


@dataclass
class AverageConfig(BlockConfig):
    """Options of the average.

    Attributes:
        weights: one for each of the deltas, of any sum and sign. None: 1/n.
        learn: train the weights, at each module its own; they start as `weights`.
    """

    _: KW_ONLY
    weights: list[float] | None = None
    learn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            what = f"{type(self).__name__}: weights={self.weights}"
            if self.deltas is not None and len(self.weights) != len(self.deltas):
                raise OptionError(f"{what} must be one for each of {self.deltas}")
            self.weights = [as_scaling(what, weight) for weight in self.weights]


class AverageLayer(BlockLayer):
    """y = h + sum_i w_i z_i."""

    kinds = (*BlockLayer.kinds, "conv2d")
    any_axis = True
    constant = True

    def __init__(self, site: Site, config: AverageConfig) -> None:
        super().__init__()
        count = len(config.children)
        self.fixed = config.weights or [1 / count] * count
        self.weight = site.parameter(count) if config.learn else None
        if self.weight is not None and not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(torch.tensor(self.fixed, dtype=torch.float64))

    def weights(self, u: Tensor | None, chosen: Chosen) -> Tensor | list[float]:
        if self.weight is not None:
            return chosen.of(self.weight)
        return [self.fixed[number] for number in chosen.numbers]

    def formula_of(self, name: str, inner: str, children: Sequence[tuple[int, str]]) -> str:
        if self.weight is not None or self.record.scale != 1 or self.gate is not None:
            return super().formula_of(name, inner, children)
        rest = 1 - sum(self.fixed[number] for number, _ in children)
        parts = [f"{self.fixed[number]:g} ({text})" for number, text in children]
        return " + ".join(parts + [f"{rest:g} ({inner})"] * (abs(rest) > 1e-9))


class AverageModel(Block):
    """A weighted sum of the changes of several deltas. arXiv:2307.13269.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> a = opendelta.LoraModel(model, modified_modules=["0"], name="a")
        >>> b = opendelta.AdapterModel(model, modified_modules=["0"], name="b")
        >>> mean = opendelta.AverageModel(model, deltas=["a", "b"], name="mean")
        >>> opendelta.composition(model).explain("0").formula
        'y = 0.5 (0(x) + a(x)) + 0.5 (b(0(x)))'
    """

    delta_type = "average"
    config_class = AverageConfig
    layer_class = AverageLayer
