"""Names that `opendelta` itself had in OpenDelta 0.3."""

from importlib import import_module
from typing import Any

from opendelta._compat.gone import refusal

ORDER = "hidden states are [batch, tokens, width], and other orders were BMTrain's: leave it out"
GONE = {
    "SaveLoadMixin": "save_finetuned and from_finetuned are methods of the deltas",
    **dict.fromkeys(["GlobalSetting", "global_setting", "set_axis_order"], ORDER),
}


def find(name: str) -> Any:
    """Return the counterpart of a name; raise an ImportError if it has none."""
    if name == "logging":
        return import_module("opendelta.utils.logging")
    if name == "CommonStructureMap":
        return import_module("opendelta.utils.structure_mapping").CommonStructureMap
    raise refusal(f"opendelta.{name}", GONE[name])
