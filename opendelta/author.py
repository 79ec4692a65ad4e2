"""All that a method's file imports: base classes of deltas and layers, options, sizes, errors.

CONTRIBUTING.md shows how to write a method.
"""

from ._deltas.options import DeltaConfig, option
from ._handles.delta import Delta
from ._layers.base import Acts, DeltaLayer, InnerCall, Params, times
from ._layers.forms import BranchLayer, InputLayer, OutputLayer, WeightLayer
from ._layers.site import Heads, Site
from ._modules.arithmetic import GLOROT, activation, linear
from ._modules.calls import change_hidden, first_input, hidden, replace_input
from ._modules.kinds import KINDS, Kind, Norm
from .errors import OptionError, SiteError

__all__ = [
    "GLOROT",
    "KINDS",
    "Acts",
    "BranchLayer",
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
    "change_hidden",
    "first_input",
    "hidden",
    "linear",
    "option",
    "replace_input",
    "times",
]
