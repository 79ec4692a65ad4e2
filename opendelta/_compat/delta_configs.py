"""`opendelta.delta_configs` of OpenDelta 0.3."""

from opendelta._deltas.options import DeltaConfig as BaseDeltaConfig
from opendelta._files.folder import CONFIG as CONFIG_NAME

__all__ = ["CONFIG_NAME", "BaseDeltaConfig"]
