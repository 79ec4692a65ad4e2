"""Small trainable changes on any PyTorch model, composed in order, without touching its code."""

from .auto import AutoDeltaConfig, AutoDeltaModel
from .checkpoint import own_version
from .composition import Composition, composition
from .delta import Delta
from .errors import (
    AddressError,
    DeltaError,
    DeltaLoadError,
    DeltaWarning,
    LostGradientWarning,
    OptionError,
    PristineError,
    SiteError,
    TiedWeightWarning,
    UnreachedWarning,
    UnsavedWarning,
)
from .inspection import assert_pristine, check, snapshot, statistics, unreached
from .methods import (
    AdapterConfig,
    AdapterModel,
    IA3Config,
    IA3Model,
    LoraConfig,
    LoraModel,
    LowRankAdapterConfig,
    LowRankAdapterModel,
)
from .options import DeltaConfig, option
from .site import DeltaLayer, OutputLayer
from .structure import roles
from .tree import Visualization, tree

__version__ = own_version()

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "AddressError",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "Composition",
    "Delta",
    "DeltaConfig",
    "DeltaError",
    "DeltaLayer",
    "DeltaLoadError",
    "DeltaWarning",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "LostGradientWarning",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "OptionError",
    "OutputLayer",
    "PristineError",
    "SiteError",
    "TiedWeightWarning",
    "UnreachedWarning",
    "UnsavedWarning",
    "Visualization",
    "assert_pristine",
    "check",
    "composition",
    "option",
    "roles",
    "snapshot",
    "statistics",
    "tree",
    "unreached",
]
