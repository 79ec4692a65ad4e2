"""The methods, one file each. Importing a file registers its method under its `delta_type`.

This is the only list of the methods: each name that is imported here is a name of `opendelta` too.
A method imports `author`. If it needs more than `author` offers, it imports the rooms below.
`recipes` and the programs may import methods.
"""

from .adapter import AdapterConfig, AdapterModel
from .bitfit import BitFitConfig, BitFitModel
from .compacter import CompacterConfig, CompacterModel
from .fourierft import FourierFTConfig, FourierFTModel
from .hra import HRAConfig, HRAModel
from .ia3 import IA3Config, IA3Model
from .ln_tuning import LNTuningConfig, LNTuningModel
from .loha import LohaConfig, LohaModel
from .lokr import LokrConfig, LokrModel
from .lora import LoraConfig, LoraModel
from .loreft import LoReftConfig, LoReftModel
from .low_rank_adapter import LowRankAdapterConfig, LowRankAdapterModel
from .oft import OFTConfig, OFTModel
from .parallel_adapter import ParallelAdapterConfig, ParallelAdapterModel
from .prefix import PrefixConfig, PrefixModel
from .soft_prompt import SoftPromptConfig, SoftPromptModel
from .vera import VeraConfig, VeraModel

__all__ = [name for name in dir() if name.endswith(("Config", "Model"))]
