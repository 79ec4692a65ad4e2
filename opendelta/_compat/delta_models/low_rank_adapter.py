"""`opendelta.delta_models.low_rank_adapter` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterModel
from opendelta.methods.low_rank_adapter import LowRankAdapterLayer as LowRankAdapter

__all__ = ["LowRankAdapter", "LowRankAdapterConfig", "LowRankAdapterModel"]
__getattr__ = refuses(__name__)
