"""Small trainable changes on any PyTorch model, composed in order, without touching its code."""

from . import errors, methods
from ._backbone.counting import statistics
from ._backbone.roles import roles
from ._deltas.first_forward import unreached
from ._deltas.options import DeltaConfig, option
from ._files.folder import own_version
from ._handles.auto import AutoDeltaConfig, AutoDeltaModel
from ._handles.composition import Composition, composition
from ._handles.delta import Delta
from ._handles.load import LoadReport, load
from ._handles.picking import pick
from ._handles.route import route
from ._layers.base import DeltaLayer
from ._layers.forms import BranchLayer, InputLayer, OutputLayer, WeightLayer
from ._show.tree import Visualization, tree
from ._verbs.copying import shared_copy
from ._verbs.merging import MergeReport
from ._verbs.plan_report import Plan
from ._verbs.planning import plan
from ._verbs.pristine import assert_pristine, snapshot
from ._verbs.training_check import CheckReport, check
from .errors import *  # noqa: F403
from .methods import *  # noqa: F403
from .recipes import Combination, adapter_drop, combine, mam, unipelt

__version__ = own_version()

__all__ = [
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "BranchLayer",
    "CheckReport",
    "Combination",
    "Composition",
    "Delta",
    "DeltaConfig",
    "DeltaLayer",
    "InputLayer",
    "LoadReport",
    "MergeReport",
    "OutputLayer",
    "Plan",
    "Visualization",
    "WeightLayer",
    "adapter_drop",
    "assert_pristine",
    "check",
    "combine",
    "composition",
    "load",
    "mam",
    "option",
    "pick",
    "plan",
    "roles",
    "route",
    "shared_copy",
    "snapshot",
    "statistics",
    "tree",
    "unipelt",
    "unreached",
]
__all__ += errors.__all__
__all__ += methods.__all__
