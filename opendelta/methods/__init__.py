"""The methods, one file each. Importing a file registers its method under its `delta_type`."""

from .adapter import AdapterConfig, AdapterLayer, AdapterModel
from .ia3 import IA3Config, IA3Layer, IA3Model
from .lora import LoraConfig, LoraLayer, LoraModel
from .low_rank_adapter import LowRankAdapterConfig, LowRankAdapterLayer, LowRankAdapterModel

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "IA3Config",
    "IA3Layer",
    "IA3Model",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterLayer",
    "LowRankAdapterModel",
]
