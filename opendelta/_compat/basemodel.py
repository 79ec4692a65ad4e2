"""`opendelta.basemodel` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta._handles.delta import Delta as DeltaBase

__all__ = ["DeltaBase"]
__getattr__ = refuses(
    __name__,
    dict.fromkeys(
        ["is_leaf_module", "non_module_param"], "it is one line of torch's named_modules"
    ),
)
