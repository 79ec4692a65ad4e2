"""Compacter: an adapter whose weights are sums of Kronecker products. arXiv:2106.04647."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from .._deltas.former import check_former
from ..author import GLOROT, Delta, DeltaConfig, OutputLayer, Site, activation, option
from ._hypercomplex import HypercomplexLinear, SharedParts


@dataclass
class CompacterConfig(DeltaConfig):
    """Options of Compacter.

    Attributes:
        reduction_factor: the hidden layer has width // reduction_factor units, rounded down to a
            multiple of `hypercomplex_division`, but at least `hypercomplex_division`.
        non_linearity: its activation, by transformers' name. `CompacterModel(model)` has another
            default than a config, as in OpenDelta 0.3.
        phm_c_init: how the A_i start. "normal": with the standard deviation `phm_init_range`.
            "uniform": in [-phm_init_range, phm_init_range].
        hypercomplex_division: n, the number of Kronecker products in a sum; A_i is [n, n].
        learn_phm: train the A_i.
        hypercomplex_nonlinearity: how the B_i start.
        shared_phm_rule: all layers share the A_i, as in the paper.
        factorized_phm: B_i is a product of rank `phm_rank`.
        shared_W_phm: all layers of the same width share the B_i.
        factorized_phm_rule: A_i is a product of rank 1.
        kronecker_prod: ignored; OpenDelta 0.3 had it, and both of its values compute the same.
        phm_rank: rank of each B_i, if `factorized_phm`.
        phm_init_range: size of the start of the A_i; see `phm_c_init`.
        use_bias_up_sampler: give the up layer a bias.
        use_bias_down_sampler: give the down layer a bias.
        bottleneck_dim, sequential: ignored; OpenDelta 0.3 had them.
    """

    positional_first = True
    class_defaults = MappingProxyType({"non_linearity": "gelu_new"})
    _: KW_ONLY
    reduction_factor: int = option(16, minimum=1)
    non_linearity: str = "relu"
    phm_c_init: str = option("normal", choices=["normal", "uniform"])
    hypercomplex_division: int = option(4, minimum=1)
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = option("glorot-uniform", choices=GLOROT)
    shared_phm_rule: bool = False
    factorized_phm: bool = True
    shared_W_phm: bool = False
    factorized_phm_rule: bool = False
    phm_rank: int = option(1, minimum=1)
    phm_init_range: float = option(0.0001, minimum=0.0)
    kronecker_prod: bool | None = None
    use_bias_up_sampler: bool = True
    use_bias_down_sampler: bool = True
    bottleneck_dim: InitVar[int | None] = None
    sequential: InitVar[bool | None] = None

    def __post_init__(self, *former: Any) -> None:
        check_former("compacter", ("bottleneck_dim", "sequential"), former)
        super().__post_init__()

    def hidden(self, width: int) -> int:
        """Return the number of units of the hidden layer."""
        n = self.hypercomplex_division
        return max(1, width // self.reduction_factor // n) * n


class CompacterLayer(OutputLayer):
    """h + up(f(down(h))) on the module's output h [..., width]; up is 0 at the start."""

    def __init__(self, site: Site, config: CompacterConfig) -> None:
        super().__init__()
        self.width = w = site.out_features
        n, bias = config.hidden(w), (config.use_bias_down_sampler, config.use_bias_up_sampler)
        self.down_sampler = HypercomplexLinear(site, w, n, config, bias[0])
        self.non_linearity = activation(config.non_linearity)
        self.up_sampler = HypercomplexLinear(site, n, w, config, bias[1], zero=True)

    def change(self, h: Tensor) -> Tensor:
        x = self.non_linearity(self.down_sampler(h, self.shared))
        return h + self.up_sampler(x, self.shared)


class CompacterModel(Delta):
    """Adapters whose weights are sums of Kronecker products of small matrices. arXiv:2106.04647.

    Example:
        >>> from torch import nn
        >>> from opendelta import CompacterModel
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> delta = CompacterModel(model, modified_modules=["0"], reduction_factor=4)
        >>> sum(p.numel() for p in delta.parameters())
        248
    """

    delta_type = "compacter"
    config_class = CompacterConfig
    layer_class = CompacterLayer
    default_modified_modules = ("attn.proj", "ff.w2", "mixer.out")
    default_learning_rate = 1e-2

    @classmethod
    def shared_for(cls, config: Any) -> Callable[..., nn.Module] | None:
        return SharedParts if config.shared_phm_rule or config.shared_W_phm else None
