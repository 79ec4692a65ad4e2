"""`opendelta.delta_models` of OpenDelta 0.3: its eight methods."""

from opendelta.methods.adapter import AdapterConfig, AdapterModel
from opendelta.methods.bitfit import BitFitConfig, BitFitModel
from opendelta.methods.compacter import CompacterConfig, CompacterModel
from opendelta.methods.lora import LoraConfig, LoraModel
from opendelta.methods.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterModel
from opendelta.methods.parallel_adapter import ParallelAdapterConfig, ParallelAdapterModel
from opendelta.methods.prefix import PrefixConfig, PrefixModel
from opendelta.methods.soft_prompt import SoftPromptConfig, SoftPromptModel

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "BitFitConfig",
    "BitFitModel",
    "CompacterConfig",
    "CompacterModel",
    "LoraConfig",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PrefixConfig",
    "PrefixModel",
    "SoftPromptConfig",
    "SoftPromptModel",
]
