"""Prefix tuning: trained keys and values before attention's own. arXiv:2101.00190."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._sequences.prefix import PrefixLayer as Base
from ..author import Delta, DeltaConfig, Site, option, widened


@dataclass
class PrefixConfig(DeltaConfig):
    """Options of prefix tuning.

    Prefix tuning goes on attention modules. Any other module of `modified_modules` stands for the
    attention modules inside it.

    Attributes:
        prefix_token_num: number of keys, and of values, in each attention module.
        reparameterize: compute the keys and values by a small network that all layers share.
        embed_dim: width of this network's input.
        mid_dim: width of its hidden layer.
    """

    prefix_token_num: int = option(6, minimum=1)
    reparameterize: bool = True
    embed_dim: int = option(512, minimum=1)
    mid_dim: int = option(512, minimum=1)


class Network(nn.Module):
    """tanh(E W1 + b1) [prefix, mid_dim], from which each layer makes its own keys and values."""

    def __init__(self, sites: list[Site], config: PrefixConfig) -> None:
        super().__init__()
        site = sites[0]
        self.embedding = nn.Parameter(
            nn.init.normal_(site.parameter(config.prefix_token_num, config.embed_dim))
        )
        self.hidden = site.linear(config.embed_dim, config.mid_dim)

    def forward(self) -> Tensor:
        return self.hidden(widened(self.embedding)).tanh()


class PrefixLayer(Base):
    """softmax(q [P_k; K]^T) [P_v; V], with trained P_k, P_v [prefix, heads * head]."""

    def __init__(self, site: Site, config: PrefixConfig) -> None:
        super().__init__(site)
        sizes = self.heads.count * self.heads.key, self.heads.count * self.heads.value
        self.reparameterize = config.reparameterize
        if config.reparameterize:
            self.key, self.value = (site.linear(config.mid_dim, size) for size in sizes)
        else:
            self.past_key, self.past_value = (
                nn.Parameter(nn.init.normal_(site.parameter(config.prefix_token_num, size)))
                for size in sizes
            )

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        if self.reparameterize:
            hidden = self.shared()
            if not self.key.weight.is_meta:  # offloaded, as by accelerate, which moves it
                hidden = hidden.to(self.key.weight.device)
            both = self.key(hidden), self.value(hidden)
        else:
            both = self.past_key, self.past_value
        keys, values = (t.unflatten(-1, (self.heads.count, -1)).transpose(0, 1) for t in both)
        return keys, values


class PrefixModel(Delta):
    """Keys and values that all queries see, in every attention module of a model. arXiv:2101.00190.

    The prefix goes through transformers' attention interface, and never through the KV cache. An
    attention module that does not use this interface is refused. Its relative position bias is 0.

    Example:
        >>> import transformers
        >>> from opendelta import PrefixModel
        >>> sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=9, n_positions=9)
        >>> model = transformers.GPT2Model(transformers.GPT2Config(**sizes))
        >>> delta = PrefixModel(model, prefix_token_num=3, reparameterize=False)
        >>> [tuple(p.shape) for p in delta.parameters()]
        [(3, 8), (3, 8)]
    """

    delta_type = "prefix"
    config_class = PrefixConfig
    layer_class = PrefixLayer
    default_modified_modules = ("attn",)
    default_learning_rate = 1e-4

    @classmethod
    def shared_for(cls, config: Any) -> Callable[..., nn.Module] | None:
        return Network if config.reparameterize else None
