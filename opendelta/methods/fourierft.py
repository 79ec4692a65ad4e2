"""FourierFT: a change given by a few entries of its spectrum. arXiv:2405.03003."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..author import Delta, DeltaConfig, Site, WeightLayer, option, widened


@dataclass
class FourierFTConfig(DeltaConfig):
    """Options of FourierFT.

    Attributes:
        n_frequency: number of trained entries of the spectrum, at most in * out.
        scaling: the change is multiplied by this.
        random_loc_seed: seed of the places of these entries; loading draws the places again.
    """

    n_frequency: int = option(1000, minimum=1)
    scaling: float = 150.0
    random_loc_seed: int = option(777, minimum=0, below=2**63)


class FourierFTLayer(WeightLayer):
    """y = W x + s Re(ifft2(F)) x; F [out, in] is 0 but for n trained entries, which start as 0."""

    places: Tensor

    def __init__(self, site: Site, config: FourierFTConfig) -> None:
        super().__init__(site)
        self.scaling = config.scaling
        self.shape = (site.out_features, site.in_features)
        self.random_loc_seed = config.random_loc_seed
        self.fourierft_spectrum = site.parameter(min(config.n_frequency, math.prod(self.shape)))
        nn.init.zeros_(self.fourierft_spectrum)
        places = torch.empty_like(self.fourierft_spectrum, dtype=torch.long)
        self.register_buffer("places", places, persistent=False)

    def seed(self) -> None:
        """Draw the places of the entries as PEFT does."""
        generator = torch.Generator().manual_seed(self.random_loc_seed)
        order = torch.randperm(math.prod(self.shape), generator=generator)
        self.places.copy_(order[: self.places.numel()])

    def delta_weight(self) -> Tensor:
        values = widened(self.fourierft_spectrum)
        dense = values.new_zeros(math.prod(self.shape)).index_put((self.places,), values)
        return self.scaling * torch.fft.ifft2(dense.view(self.shape)).real


class FourierFTModel(Delta):
    """Changes of linear modules given by a few entries of their spectrum. arXiv:2405.03003.

    Example:
        >>> from torch import nn
        >>> from opendelta import FourierFTModel
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> delta = FourierFTModel(model, modified_modules=["0"], n_frequency=10)
        >>> [tuple(p.shape) for p in delta.parameters()]
        [(10,)]
    """

    delta_type = "fourierft"
    config_class = FourierFTConfig
    layer_class = FourierFTLayer
    default_modified_modules = ("attn.q", "attn.v", "mixer.in")
    default_learning_rate = 0.1
