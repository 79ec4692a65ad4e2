"""The blocks, one file each. Importing a file registers its block under its `delta_type`.

This is the only list of the blocks: each name that is imported here is a name of `opendelta` too.
A block combines other deltas by a rule. It imports `author`; `recipes` and the programs may import
blocks.
"""

from .average import AverageConfig, AverageModel
from .fuse import FuseConfig, FuseModel
from .gate import GateConfig, GateModel

__all__ = [name for name in dir() if name.endswith(("Config", "Model"))]
