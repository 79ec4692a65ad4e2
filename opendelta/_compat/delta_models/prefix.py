"""`opendelta.delta_models.prefix` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.prefix import PrefixConfig, PrefixModel

__all__ = ["PrefixConfig", "PrefixModel"]
__getattr__ = refuses(
    __name__,
    dict.fromkeys(
        [
            "PrefixLayerT5", "PrefixLayerBart", "PrefixLayerGPT2", "PrefixLayerBert",
            "PrefixLayerRoberta", "PrefixLayerDistilBert", "ReparameterizeFunction",
        ],
        "PrefixModel has one layer for all models, opendelta.methods.prefix.PrefixLayer",
    ),
)  # fmt: skip
