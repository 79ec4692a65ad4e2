"""New deltas made of others: combinations of papers, and sums of changes.

It imports `methods` and all below; `demo` and `cli` may import it.
"""

from .combining import Combination, combine
from .presets import adapter_drop, mam, unipelt

__all__ = ["Combination", "adapter_drop", "combine", "mam", "unipelt"]
