"""The options and the layer of LoRA. arXiv:2106.09685."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .._layers.starts import START, start
from ..author import DeltaConfig, Site, SiteError, WeightLayer, option, widened


@dataclass
class LoraConfig(DeltaConfig):
    """Options of LoRA.

    Attributes:
        lora_r: rank of the change.
        lora_alpha: the change is scaled by lora_alpha / lora_r.
        lora_dropout: probability of dropping an input of the change while training. It does nothing
            on embeddings, and on modules whose weight is read, as these have no such input.
        use_rslora: scale by lora_alpha / sqrt(lora_r) instead. arXiv:2312.03732.
        use_dora: split the weight into magnitude and direction, and train both. arXiv:2402.09353.
        init: how A and B start. "kaiming" or "gaussian": A is random, B is 0. "pissa"
            (arXiv:2404.02948) or "olora" (arXiv:2406.01775): A0 and B0 come from the weight. The
            change is then B A - B0 A0, so that it is 0 at the start too.
        freeze_A: train B only, which keeps no input for the gradient. arXiv:2308.03303 (LoRA-FA).
        rank_pattern: {pattern: rank} for some of the modules, by the addressing rules.
        alpha_pattern: {pattern: alpha} for some of the modules.
    """

    positional = (
        "modified_modules", "unfrozen_modules", "exclude_modules", "common_structure",
        "interactive_modify",
    )  # fmt: skip
    lora_r: int = option(8, minimum=1)
    lora_alpha: float = 16
    lora_dropout: float = option(0.0, minimum=0.0, below=1.0)
    _: KW_ONLY
    use_rslora: bool = False
    use_dora: bool = False
    init: str = option("kaiming", choices=START)
    freeze_A: bool = False
    rank_pattern: dict[str, int] | None = option(None, minimum=1, modules=())
    alpha_pattern: dict[str, float] | None = option(None, modules=())


class LoraLayer(WeightLayer):
    """y = W x + (alpha / r) B A x, with A [r, in] and B [out, r]; B A is 0 at the start."""

    kinds: tuple[str, ...] = ("linear", "embedding", "conv2d")
    start_A: Tensor
    start_B: Tensor

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config.lora_dropout)
        rank = (config.rank_pattern or {}).get(site.name, config.lora_r)
        alpha = (config.alpha_pattern or {}).get(site.name, config.lora_alpha)
        self.scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.lora_A = site.parameter(rank, site.in_features)
        self.lora_B = site.parameter(site.out_features, rank)
        start(self, site, config.init)
        if config.freeze_A:
            if site.kind.takes_ids:
                raise SiteError(
                    f"{site.name!r}: freeze_A is not for embeddings, whose A starts as 0",
                    where=site.name,
                )
            A = self._parameters.pop("lora_A")
            self.register_buffer("lora_A", A.detach())  # type: ignore[union-attr]

    @property
    def grows(self) -> bool:  # type: ignore[override]
        """True unless "pissa" or "olora" took its start from the weight."""
        return "start_A" not in self._buffers

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B; after "pissa" or "olora" with A0 and -B0 joined to them."""
        own: Any = self._parameters
        if "start_A" not in self._buffers:
            plain = "lora_A" in own and "lora_B" in own  # five times as fast as by attribute
            return (own["lora_A"], own["lora_B"]) if plain else (self.lora_A, self.lora_B)
        A, B = torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)
        return A, B

    def delta_weight(self) -> Tensor:
        A, B = map(widened, self.pair())
        return self.scaling * (B @ A)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return *self.pair(), self.scaling
