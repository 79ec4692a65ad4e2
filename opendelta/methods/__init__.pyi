# Written by tools/write_stubs.py: the signatures, made from the configs.
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..author import Delta
from ._lora_layer import LoraConfig as LoraConfig
from .adapter import AdapterConfig as AdapterConfig
from .bitfit import BitFitConfig as BitFitConfig
from .compacter import CompacterConfig as CompacterConfig
from .fourierft import FourierFTConfig as FourierFTConfig
from .hra import HRAConfig as HRAConfig
from .ia3 import IA3Config as IA3Config
from .ln_tuning import LNTuningConfig as LNTuningConfig
from .loha import LohaConfig as LohaConfig
from .lokr import LokrConfig as LokrConfig
from .loreft import LoReftConfig as LoReftConfig
from .low_rank_adapter import LowRankAdapterConfig as LowRankAdapterConfig
from .oft import OFTConfig as OFTConfig
from .parallel_adapter import ParallelAdapterConfig as ParallelAdapterConfig
from .prefix import PrefixConfig as PrefixConfig
from .soft_prompt import SoftPromptConfig as SoftPromptConfig
from .vera import VeraConfig as VeraConfig

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "BitFitConfig",
    "BitFitModel",
    "CompacterConfig",
    "CompacterModel",
    "FourierFTConfig",
    "FourierFTModel",
    "HRAConfig",
    "HRAModel",
    "IA3Config",
    "IA3Model",
    "LNTuningConfig",
    "LNTuningModel",
    "LoReftConfig",
    "LoReftModel",
    "LohaConfig",
    "LohaModel",
    "LokrConfig",
    "LokrModel",
    "LoraConfig",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "OFTConfig",
    "OFTModel",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PrefixConfig",
    "PrefixModel",
    "SoftPromptConfig",
    "SoftPromptModel",
    "VeraConfig",
    "VeraModel",
]

class AdapterModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        scaling: float = 1.0,
        layer_norm: Literal[None, "before", "after"] = None,
        residual: Literal["output", "input"] = "output",
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> AdapterConfig: ...

class BitFitModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> BitFitConfig: ...

class CompacterModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        reduction_factor: int = 16,
        non_linearity: str = "gelu_new",
        phm_c_init: Literal["normal", "uniform"] = "normal",
        hypercomplex_division: int = 4,
        learn_phm: bool = True,
        hypercomplex_nonlinearity: Literal["glorot-uniform", "glorot-normal"] = "glorot-uniform",
        shared_phm_rule: bool = False,
        factorized_phm: bool = True,
        shared_W_phm: bool = False,
        factorized_phm_rule: bool = False,
        phm_rank: int = 1,
        phm_init_range: float = 0.0001,
        kronecker_prod: bool | None = None,
        use_bias_up_sampler: bool = True,
        use_bias_down_sampler: bool = True,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> CompacterConfig: ...

class FourierFTModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        n_frequency: int = 1000,
        scaling: float = 150.0,
        random_loc_seed: int = 777,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> FourierFTConfig: ...

class HRAModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        r: int = 8,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> HRAConfig: ...

class IA3Model(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        feedforward_modules: str | Sequence[str] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> IA3Config: ...

class LNTuningModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> LNTuningConfig: ...

class LoReftModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        low_rank_dimension: int = 4,
        first: int | None = None,
        last: int | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> LoReftConfig: ...

class LohaModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        r: int = 8,
        alpha: float = 8,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> LohaConfig: ...

class LokrModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        r: int = 8,
        alpha: float = 8,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> LokrConfig: ...

class LoraModel(Delta):
    combination: Any
    def __init__(
        self,
        backbone_model: nn.Module,
        lora_r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        modified_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming",
        freeze_A: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> LoraConfig: ...

class LowRankAdapterModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        reduction_factor: int = 32,
        non_linearity: str = "gelu_new",
        low_rank_w_init: Literal["glorot-uniform", "glorot-normal"] = "glorot-uniform",
        low_rank_rank: int = 1,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> LowRankAdapterConfig: ...

class OFTModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        oft_block_size: int = 32,
        block_share: bool = False,
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> OFTConfig: ...

class ParallelAdapterModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        bottleneck_dim: int = 24,
        non_linearity: str = "gelu_new",
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        scaled: float = 1.0,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> ParallelAdapterConfig: ...

class PrefixModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        prefix_token_num: int = 6,
        reparameterize: bool = True,
        embed_dim: int = 512,
        mid_dim: int = 512,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> PrefixConfig: ...

class SoftPromptModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        soft_token_num: int = 100,
        init_range: float = 0.5,
        token_init: bool | str | list[int] = True,
        other_expand_ids: dict[str, int] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        tokenizer: str | None = None,
        strip: bool = True,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> SoftPromptConfig: ...

class VeraModel(Delta):
    def __init__(
        self,
        backbone_model: nn.Module,
        r: int = 256,
        d_initial: float = 0.1,
        vera_dropout: float = 0.0,
        projection_prng_key: int = 0,
        save_projection: bool = False,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> VeraConfig: ...
