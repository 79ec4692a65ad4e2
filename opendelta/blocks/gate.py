"""Gate: each token weighs the deltas by a softmax, over all or the best k. arXiv:2402.07148."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._sequences.causality import Verdict, watched
from .._sequences.notes import notes_for
from .._sequences.tokens import Tokens
from .._texts.documents import SEQUENCE
from ..author import (
    Block,
    BlockConfig,
    BlockLayer,
    Chosen,
    DeltaLayer,
    OptionError,
    Site,
    linear,
    option,
    widened,
)


@dataclass
class GateConfig(BlockConfig):
    """Options of the gate.

    Attributes:
        top_k: number of deltas that each token takes. None: all.
        temperature: the logits are divided by it.
        noise: standard deviation of the noise on the logits in training mode; each token draws its
            own, or with per="sequence" each row or document.
        per: "token": each token has weights of its own. "sequence": all tokens of a row, or of a
            document packed into it, have the weights of their mean; padding does not count. Not for
            causal models, where it would show each token the later ones.
        init: how the gate starts. "normal": near equal weights. "arrow" (arXiv:2405.11157): each
            row of W is the input direction that a trained LoRA changes most, the top right singular
            vector of its B A, and the logits are |W u| + b: a gate that needs no training.
    """

    _: KW_ONLY
    top_k: int | None = option(None, minimum=1)
    temperature: float = option(1.0, minimum=1e-6)
    noise: float = option(0.0, minimum=0.0)
    per: str = option("token", choices=["token", "sequence"])
    init: str = option("normal", choices=["normal", "arrow"])


class GateLayer(BlockLayer):
    """y = h + sum_i g_i z_i, with g = softmax((W u + b) / T) over those that act, or the best k.

    u is the module's input, or the output of modules that take no hidden states, as embeddings do.
    With init="arrow" |W u| is in the place of W u.
    """

    def __init__(self, site: Site, config: GateConfig) -> None:
        super().__init__()
        self.top_k, self.temperature, self.noise = config.top_k, config.temperature, config.noise
        self.arrow = config.init == "arrow"
        self.reads = "output" if site.takes_ids else "input"
        self.width = site.out_features if site.takes_ids else site.input_width
        self.weight = site.parameter(len(config.children), self.width)
        self.bias = site.parameter(len(config.children))
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.verdict: Verdict | None = None  # for each sequence, in a model of somebody's own
        self.tokens = Tokens(site.module, site.name) if config.per == "sequence" else None
        if self.arrow and site.new:
            self._aim(site, config.children)

    @torch.no_grad()
    def _aim(self, site: Site, names: Sequence[str]) -> None:
        """Set each row of W to the top right singular vector of a child's B A."""
        layers = {layer.record.name: layer for layer in site.beneath}
        for row, name in zip(self.weight, names, strict=True):
            layer = layers.get(name)
            pair = layer.low_rank() if layer is not None and layer.runs_as_factors else None
            if pair is None or not (pair.B.is_meta or pair.B.any()):
                raise OptionError(
                    f"{site.name!r}: init='arrow' needs a trained LoRA that acts there for each of "
                    f"{list(names)}, and {name!r} is none; name other places by modified_modules="
                )
            if not row.is_meta:
                q, r = torch.linalg.qr(widened(pair.A).T)
                row.copy_(q @ torch.linalg.svd(widened(pair.B) @ r.T, full_matrices=False).Vh[0])

    def weights(self, u: Tensor | None, chosen: Chosen) -> Tensor:
        assert u is not None
        if self.tokens is not None:
            if self.verdict is not None:
                self.verdict.check(u)
            u = self.tokens.means(u, *chosen.given)
        rows, bias = chosen.of(self.weight), chosen.of(self.bias)
        logits = linear(u, rows).abs() + bias if self.arrow else linear(u, rows, bias)
        logits = logits if self.temperature == 1 else logits / self.temperature
        if self.noise and self.training:
            noise = self.noise * torch.randn_like(logits)
            if self.tokens is not None:
                noise = self.tokens.one_each(noise, *chosen.given)
            logits = logits + noise
        return chosen.softmax(logits, self.top_k).type_as(u)

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        if config.per == "token":
            return {}
        more = notes_for(made, modules, SEQUENCE)
        gates = {name: layer for name, layer in made.items() if isinstance(layer, cls)}
        return more | watched(gates, modules, more)


class GateModel(Block):
    """A mixture of experts: each token weighs the deltas by its own softmax. arXiv:2402.07148.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for name in ("a", "b", "c"):
        ...     _ = opendelta.LoraModel(model, modified_modules=["0"], name=name)
        >>> moe = opendelta.GateModel(model, deltas=["a", "b", "c"], top_k=2)
        >>> opendelta.composition(model).explain("0").formula
        'y = gate(0(x) + a(x), 0(x) + b(x), 0(x) + c(x))'
    """

    delta_type = "gate"
    config_class = GateConfig
    layer_class = GateLayer
