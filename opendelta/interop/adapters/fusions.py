"""Translate AdapterFusion, which the adapters library saves apart from the adapters in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..._backbone.backbone import Backbone
from ...errors import DeltaLoadError, listed, shown
from .._draft import CONFIG as ADAPTER
from .._draft import fact
from .bottleneck import INSIDE, places
from .terms import FUSION, Part

CONFIG = "adapter_fusion_config.json"
WEIGHTS, PICKLE = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
FUSED = ("adapter", "compacter")  # our methods of what the library fuses by the rule of our block


def names_in(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return the library's names of the adapters that the fusion in `folder` combines."""
    given = config.get("adapter_names") or str(config.get("name")).split(",")
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise DeltaLoadError(
            f"{folder / CONFIG}: adapter_names={shown(given)} must be a list of names"
        )
    return given


def attached(backbone: Backbone) -> dict[str, dict[str, Any]]:
    """Return {name: the JSON that a folder of ours would have} of the deltas on a backbone."""
    sites: dict[str, list[str]] = {}
    for where, name, layer in backbone.delta_layers():
        if layer.joins_blocks:
            sites.setdefault(name, []).append(where)
    return {
        each.name: fact(
            each.config.delta_type,
            each.name,
            {**vars(each.config), "modified_modules": sites.get(each.name, [])},
        )
        for each in backbone.records()
    }


def beside(folder: Path, name: str) -> Path:
    """Return the folder of the adapter `name` beside the folder of a fusion."""
    found = folder.absolute().parent / name
    if Path(name).name != name or name == ".." or not (found / ADAPTER).is_file():
        raise DeltaLoadError(
            f"{folder}: it fuses {shown(name)}, which is neither on the model nor in a folder "
            "beside it: load its adapters first, from the folders that model.save_adapter wrote"
        )
    return found


def read(part: Part, fused: list[dict[str, Any]]) -> None:
    """Fill in a part that holds tensors of a fusion.

    Args:
        fused: the deltas that it combines, each as in the JSON of a folder of ours.
    """
    config = part.config
    _check_options(part)
    _check_fused(part, fused)
    part.method = "fuse"
    part.options |= {"deltas": [each["name"] for each in fused], "value": bool(config["value"])}
    sites = {where for each in fused for where in each["options"]["modified_modules"]}
    for path, own in part.given.pop(FUSION.slots[0]).items():
        found = [where for where in places(part, path) if where in sites]
        if len(found) > 1 or part.sites.keys() & {*found}:
            raise part.error(f"the adapters that it fuses at {path!r} differ in their places")
        if not found:  # the library saves a fusion for layers that the adapters leave out
            continue
        if config["query_before_ln"] and part.roles.get(found[0]) not in INSIDE[""]:
            raise part.refusal("query_before_ln", f"a block on {found[0]!r} asks after that sum")
        value = {"value": "value.weight"} if config["value"] else {}
        ours = [f"{matrix}.{end}" for matrix in ("query", "key") for end in ("weight", "bias")]
        part.sites[found[0]] = {
            name: part.take(own, theirs)
            for name, theirs in {**dict(zip(ours, ours, strict=True)), **value}.items()
        }
        part.check_empty(own, path)
    if without := sorted(sites - part.sites.keys()):
        raise part.error(f"it has no matrices for the adapters on {listed(without)}")


def _check_options(part: Part) -> None:
    for option in ("query", "key"):
        if not part.config[option]:
            raise part.refusal(option, "a block always has this matrix")
    if part.config["residual_before"] and part.config["value"]:
        raise part.refusal(
            "residual_before", "the matrix V of a block leaves the residual as it is"
        )


def _check_fused(part: Part, fused: list[dict[str, Any]]) -> None:
    """Raise for a delta that the library does not fuse, or fuses by another rule."""
    for each in fused:
        if each["delta_type"] not in FUSED:
            raise part.error(
                f"it fuses {each['name']!r}, which is a {each['delta_type']!r}: only adapters "
                "(seq_bn, double_seq_bn) and Compacter are fused by the rule of a block. A fusion "
                "of parallel ones (par_bn) asks with the branch's input, and adds it to the output"
            )
        if each["options"].get("layer_norm") == "after":
            raise part.error(
                f"it fuses {each['name']!r}, which has a normalisation after it (ln_after): the "
                "library's fusion skips that, and no block does"
            )
    if len({each["options"].get("residual") == "input" for each in fused}) > 1:
        raise part.error("of the adapters that it fuses only some normalise their sum")
