"""`opendelta.delta_models.bitfit` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.bitfit import BitFitConfig, BitFitModel
from opendelta.methods.bitfit import BitFitLayer as BiasLayer

__all__ = ["BiasLayer", "BitFitConfig", "BitFitModel"]
__getattr__ = refuses(__name__)
