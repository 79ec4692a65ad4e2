"""AdapterFusion: each token attends to the changes of several deltas. arXiv:2005.00247."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..author import Block, BlockConfig, BlockLayer, Chosen, Site, linear


@dataclass
class FuseConfig(BlockConfig):
    """Options of AdapterFusion.

    Attributes:
        value: transform the sum by a matrix V, which starts near the identity.
    """

    _: KW_ONLY
    value: bool = True


class FuseLayer(BlockLayer):
    """y = h + V sum_i s_i z_i, with s = softmax_i((Q h + q) . (K z_i + k))."""

    def __init__(self, site: Site, config: FuseConfig) -> None:
        super().__init__()
        self.width = site.out_features
        self.query, self.key = (site.linear(self.width, self.width) for _ in range(2))
        for part in (self.query, self.key):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        self.value = site.parameter(self.width, self.width) if config.value else None
        if self.value is not None and not self.value.is_meta:
            with torch.no_grad():
                self.value.fill_(1e-6).fill_diagonal_(1.0)

    def combine(self, x: Any, h: Tensor, z: Sequence[Tensor], chosen: Chosen) -> Tensor:
        query = self.query(h)
        scores = torch.stack([(self.key(each) * query).sum(-1) for each in z], -1)
        mixed = self.weigh(chosen.softmax(scores), z, chosen)
        return mixed if self.value is None else linear(mixed, self.value)


class FuseModel(Block):
    """AdapterFusion over any deltas. arXiv:2005.00247.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> a = opendelta.AdapterModel(model, modified_modules=["0"], name="a")
        >>> b = opendelta.LoraModel(model, modified_modules=["0"], name="b")
        >>> fuse = opendelta.FuseModel(model, deltas=[a, b])
        >>> fuse.freeze_module(exclude=["fuse"])  # only the fusion trains, as in the paper
        >>> opendelta.composition(model).explain("0").formula
        'y = fuse(a(0(x)), 0(x) + b(x))'
    """

    delta_type = "fuse"
    config_class = FuseConfig
    layer_class = FuseLayer
