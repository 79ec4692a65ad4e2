"""`opendelta.auto_delta` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta._handles.auto import AutoDeltaConfig, AutoDeltaModel

__all__ = ["AutoDeltaConfig", "AutoDeltaModel"]
__getattr__ = refuses(
    __name__,
    dict.fromkeys(
        [
            "DELTA_CONFIG_MAPPING",
            "DELTA_MODEL_MAPPING",
            "LAZY_CONFIG_MAPPING",
            "LAZY_DELTA_MAPPING",
        ],
        "AutoDeltaConfig.from_dict and AutoDeltaModel.from_config know all methods",
    ),
)
