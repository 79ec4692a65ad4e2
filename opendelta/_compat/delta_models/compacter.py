"""`opendelta.delta_models.compacter` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.compacter import CompacterConfig, CompacterModel
from opendelta.methods.compacter import CompacterLayer as HyperComplexAdapterLayer

__all__ = ["CompacterConfig", "CompacterModel", "HyperComplexAdapterLayer"]
__getattr__ = refuses(__name__, {"PHMLinear": "the layers of CompacterModel are CompacterLayer"})
