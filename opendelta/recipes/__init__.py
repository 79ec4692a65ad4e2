"""Make new deltas of several others: combinations from papers, and sums of weight changes.

It imports `methods` and all rooms below; the package itself, `demo` and `cli` may import it.
"""

from .balancing import balance_loss, z_loss
from .combining import Combination, combine
from .optimizing import optimizer_groups
from .presets import adapter_drop, mam, unipelt

__all__ = [
    "Combination",
    "adapter_drop",
    "balance_loss",
    "combine",
    "mam",
    "optimizer_groups",
    "unipelt",
    "z_loss",
]
