"""`opendelta.delta_models.lora` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.lora import LoraConfig, LoraModel

__all__ = ["LoraConfig", "LoraModel"]
__getattr__ = refuses(
    __name__,
    {
        "LoraArguments": "use LoraConfig",
        "LowRankLinear": "the layers of LoraModel are opendelta.methods.lora.LoraLayer",
    },
)
