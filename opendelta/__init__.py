"""Small trainable changes on any PyTorch model, composed in order, without touching its code."""

# ruff: noqa: F403, F405, RUF022

import typing as _typing
from importlib import import_module as _import_module
from typing import Any as _Any

from ._backbone.counting import statistics
from ._backbone.roles import roles
from ._deltas.first_forward import unreached
from ._deltas.options import DeltaConfig, option
from ._files.folder import own_version
from ._handles.auto import AutoDeltaConfig, AutoDeltaModel
from ._handles.block import Block
from ._handles.composition import Composition, composition
from ._handles.delta import Delta
from ._handles.from_pretrained import from_pretrained
from ._handles.load import LoadReport, load
from ._handles.parallel import parallel
from ._handles.picking import pick
from ._handles.route import route
from ._handles.watching import watching
from ._layers.base import DeltaLayer
from ._layers.block import BlockLayer
from ._layers.forms import BranchLayer, InputLayer, OutputLayer, WeightLayer
from ._show.tree import Visualization, tree
from ._verbs.copying import shared_copy
from ._verbs.merging import MergeReport
from ._verbs.plan_report import Plan
from ._verbs.planning import plan
from ._verbs.pristine import assert_pristine, snapshot
from ._verbs.training_check import CheckReport, check
from .blocks import *
from .errors import *
from .methods import *
from .recipes import *

if _typing.TYPE_CHECKING:  # found on demand: these rooms stand above, or import this one
    from . import integrations as integrations
    from . import plot as plot
    from .studies import (
        Comparison,
        CompositionReport,
        InterferenceReport,
        Task,
        Texts,
        compare,
        interference,
        report,
    )

__version__ = own_version()
DeltaBase = Delta
"""The name of `Delta` in OpenDelta 0.3."""
BaseDeltaConfig = DeltaConfig
"""The name of `DeltaConfig` in OpenDelta 0.3."""
CommonStructureMap: _Any  # found on demand, as the other names of OpenDelta 0.3 are
"""What OpenDelta 0.3 called its names of modules: `opendelta.roles` gives them here."""
_OF_03 = (
    "CommonStructureMap", "GlobalSetting", "SaveLoadMixin", "global_setting", "logging",
    "set_axis_order",
)  # fmt: skip
_STUDIES = (
    "Comparison", "CompositionReport", "InterferenceReport", "Task", "Texts", "compare",
    "interference", "report",
)  # fmt: skip
_ROOMS = ("integrations", "plot", "studies")
# Python finds the module paths of OpenDelta 0.3 there, such as opendelta.auto_delta.
__path__.append(f"{__path__[0]}/_compat")


def __getattr__(name: str) -> _Any:
    if name in _OF_03:
        return _import_module(f"{__name__}.top").find(name)
    if name in _STUDIES:
        return getattr(_import_module(f"{__name__}.studies"), name)
    if name in _ROOMS:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "BaseDeltaConfig",
    "Block",
    "BlockLayer",
    "BranchLayer",
    "CheckReport",
    "Combination",
    "CommonStructureMap",
    "Comparison",
    "Composition",
    "CompositionReport",
    "Delta",
    "DeltaBase",
    "DeltaConfig",
    "DeltaLayer",
    "InputLayer",
    "InterferenceReport",
    "LoadReport",
    "MergeReport",
    "OutputLayer",
    "Plan",
    "Task",
    "Texts",
    "Visualization",
    "WeightLayer",
    "adapter_drop",
    "assert_pristine",
    "balance_loss",
    "check",
    "combine",
    "compare",
    "composition",
    "from_pretrained",
    "interference",
    "load",
    "mam",
    "optimizer_groups",
    "option",
    "parallel",
    "pick",
    "plan",
    "report",
    "roles",
    "route",
    "shared_copy",
    "snapshot",
    "statistics",
    "tree",
    "unipelt",
    "unreached",
    "watching",
    "z_loss",
]
# Written by tools/write_stubs.py: the errors and the methods. mypy reads no other list.
__all__ += [
    "AddressError", "CompileLimitError", "DeltaError", "DeltaLoadError", "DeltaWarning",
    "LostGradientWarning", "OptionError", "PristineError", "SharedDeltaWarning", "SiteError",
    "TiedWeightWarning", "UncheckedWarning", "UnreachedWarning", "UnsavedWarning",
    "UntrainedWarning", "UnusedWarning", "AverageConfig", "AverageModel", "FuseConfig",
    "FuseModel", "GateConfig", "GateModel", "AdapterConfig", "AdapterModel", "BitFitConfig",
    "BitFitModel", "CompacterConfig", "CompacterModel", "FourierFTConfig", "FourierFTModel",
    "HRAConfig", "HRAModel", "IA3Config", "IA3Model", "LNTuningConfig", "LNTuningModel",
    "LoReftConfig", "LoReftModel", "LohaConfig", "LohaModel", "LokrConfig", "LokrModel",
    "LoraConfig", "LoraModel", "LowRankAdapterConfig", "LowRankAdapterModel", "OFTConfig",
    "OFTModel", "ParallelAdapterConfig", "ParallelAdapterModel", "PrefixConfig", "PrefixModel",
    "SoftPromptConfig", "SoftPromptModel", "VeraConfig", "VeraModel",
]  # fmt: skip
