"""`opendelta.delta_configs` of OpenDelta 0.3."""

from opendelta._deltas.options import DeltaConfig as BaseDeltaConfig

__all__ = ["BaseDeltaConfig"]
