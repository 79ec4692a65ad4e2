"""`opendelta.delta_models.compacter` of OpenDelta 0.3."""

from opendelta.methods.compacter import CompacterConfig, CompacterModel
from opendelta.methods.compacter import CompacterLayer as HyperComplexAdapterLayer

__all__ = ["CompacterConfig", "CompacterModel", "HyperComplexAdapterLayer"]
