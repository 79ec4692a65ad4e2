"""`opendelta.delta_models.adapter` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.adapter import AdapterConfig, AdapterLayer, AdapterModel

__all__ = ["AdapterConfig", "AdapterLayer", "AdapterModel"]
__getattr__ = refuses(__name__)
