"""All that a method's file imports: base classes of deltas and layers, options, sizes, errors.

docs/how-to/write_a_method.md shows how to write a method.
"""

from ._deltas.blocks import BlockConfig
from ._deltas.options import DeltaConfig, as_scaling, option
from ._handles.block import Block
from ._handles.delta import Delta
from ._layers.base import Acts, DeltaLayer, InnerCall, Params, times
from ._layers.block import BlockLayer, Chosen
from ._layers.forms import BranchLayer, InputLayer, OutputLayer, WeightLayer
from ._layers.site import Heads, Site
from ._modules.arithmetic import GLOROT, activation, linear, widened
from ._modules.calls import change_hidden, dense, first_input, hidden, replace_input
from ._modules.kinds import KINDS, Kind, Norm
from .errors import OptionError, SiteError

__all__ = [
    "GLOROT",
    "KINDS",
    "Acts",
    "Block",
    "BlockConfig",
    "BlockLayer",
    "BranchLayer",
    "Chosen",
    "Delta",
    "DeltaConfig",
    "DeltaLayer",
    "Heads",
    "InnerCall",
    "InputLayer",
    "Kind",
    "Norm",
    "OptionError",
    "OutputLayer",
    "Params",
    "Site",
    "SiteError",
    "WeightLayer",
    "activation",
    "as_scaling",
    "change_hidden",
    "dense",
    "first_input",
    "hidden",
    "linear",
    "option",
    "replace_input",
    "times",
    "widened",
]
