"""`opendelta.delta_models.parallel_adapter` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.parallel_adapter import (
    ParallelAdapterConfig,
    ParallelAdapterLayer,
    ParallelAdapterModel,
)

__all__ = ["ParallelAdapterConfig", "ParallelAdapterLayer", "ParallelAdapterModel"]
__getattr__ = refuses(__name__)
