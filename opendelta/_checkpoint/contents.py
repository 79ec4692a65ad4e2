"""Read the contents of a CHECKPOINT without a model, for `show`, `diff` and `report`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import interop
from .._deltas.options import DeltaConfig, changed_options
from .._files.reading import check_link
from ..errors import DeltaLoadError
from ..interop import _files as others
from ..names import SLOT, last
from . import hub
from .source import opened

SET_ELSEWHERE = ("modified_modules", "modules_to_save", "unfrozen_modules", "name")
NO_OPTIONS = {  # fields of other libraries' files that `show` does not list as options
    "architecture", "auto_mapping", "backbone_checkpoint_name", "backbone_class", "backbone_hash",
    "base_model_name_or_path", "common_structure", "delta_type", "inference_mode",
    "modified_modules", "modules_to_save", "opendelta_version", "peft_type", "peft_version",
    "target_modules", "task_type", "transformers_version",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The contents of a folder.

    Attributes:
        path: the CHECKPOINT as it was given.
        format: the library that wrote it.
        backbone: the class of the model that it was saved from; "": not known.
        model: the name of that model; "": not known.
        deltas: for each delta its name, type, switches, modules, and options other than defaults.
        shapes: {name of a tensor: its shape}.
        bytes: size of all its files together.
        values: {name of a tensor: the tensor}; {} if only the shapes were read.
        fingerprint: number of the weights of which the folder knows some values.
    """

    path: str
    format: str
    backbone: str
    model: str
    deltas: list[dict[str, Any]]
    shapes: dict[str, list[int]]
    bytes: int
    values: Mapping[str, Tensor] = field(repr=False)
    fingerprint: int = 0


def contents(given: str, values: bool = False) -> Contents:
    """Read a CHECKPOINT.

    Args:
        values: read the tensors too, and not only their shapes.

    Raises:
        DeltaLoadError: there is no checkpoint, or it is damaged.
    """
    folder = hub.folder_of(given)
    reader = interop.reader_of(folder) if folder.is_dir() else None
    size = _size(folder)
    if reader is not None:
        return _foreign(given, folder, last(reader.__name__), size)
    with opened(folder, nn.Module()) as source:
        source.verify()
        facts, tensors = source.facts, source.tensors
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        deltas = [
            described(fact, config, _count(shapes, fact["name"]))
            for fact, config in zip(facts["deltas"], source.configs, strict=True)
        ]
        read = {name: tensor.read() for name, tensor in tensors.items()} if values else {}
    return Contents(
        path=given,
        format=f"opendelta {facts.get('opendelta_version', '')}".strip(),
        backbone=source.saved_from or "",
        model=str(facts.get("backbone_path") or ""),
        deltas=deltas,
        shapes=shapes,
        bytes=size,
        values=read,
        fingerprint=len(facts["fingerprint"]),
    )


def described(fact: dict[str, Any], config: DeltaConfig, parameters: int) -> dict[str, Any]:
    """Return a delta for people: its name, type, switches, places, and options that were set.

    Args:
        fact: the delta in the JSON of a folder.
        parameters: number of its parameters.
    """
    options = changed_options(config)
    return {
        "name": fact["name"],
        "delta_type": fact["delta_type"],
        "active": fact["active"],
        "scale": fact.get("scale", 1.0),
        "frozen": len(fact["frozen"]),
        "parameters": parameters,
        "modules": config.modified_modules or [],
        "modules_to_save": config.modules_to_save or [],
        "options": {name: value for name, value in options.items() if name not in SET_ELSEWHERE},
    }


def states(delta: dict[str, Any]) -> list[str]:
    """Return the switches of a described delta in words."""
    found = ["active" if delta["active"] else "disabled"]
    found += [word for word in ("frozen", "merged") if delta.get(word)]
    return found + [f"scale {delta['scale']:g}"] * (delta["scale"] != 1)


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder, in which another process may be saving."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _count(shapes: Mapping[str, list[int]], name: str) -> int:
    own = (shape for key, shape in shapes.items() if f".{SLOT}.{name}." in f".{key}")
    return sum(map(math.prod, own))


@dataclass(frozen=True)
class Foreign:
    """The files and options of another library from which `show` reads.

    Attributes:
        name: the library's name.
        config: its file of options.
        weights: its possible files of tensors; a folder has one of them.
        kind: the option that names the method.
        places: the option that names the modules.
        backbone: the option that names the class of the model.
        model: the option that names the model.
        inner: the option that holds the options of the method; None if they are not nested.
    """

    name: str
    config: str
    weights: tuple[str, ...]
    kind: str
    places: str = ""
    backbone: str = ""
    model: str = ""
    inner: str | None = None


FOREIGN = {
    "peft": Foreign(
        "PEFT", "adapter_config.json", ("adapter_model.safetensors",), "peft_type",
        places="target_modules", model="base_model_name_or_path",
    ),
    "legacy": Foreign(
        "OpenDelta 0.3", "config.json", ("pytorch_model.bin",), "delta_type",
        places="modified_modules", backbone="backbone_class",
    ),
    "adapters": Foreign(
        "adapters", "adapter_config.json", ("adapter.safetensors", "pytorch_adapter.bin"),
        "architecture", backbone="model_class", model="model_name", inner="config",
    ),
}  # fmt: skip


def _foreign(given: str, folder: Path, reader: str, size: int) -> Contents:
    """Read another library's folder; names and options stay as that library writes them."""
    library = FOREIGN[reader]
    whole = others.read_json(folder / library.config)
    inner = whole.get(library.inner) if library.inner else whole
    config: dict[str, Any] = inner if isinstance(inner, dict) else {}
    path = next((folder / n for n in library.weights if (folder / n).is_file()), None)
    if path is None:
        raise DeltaLoadError(f"{folder}: there is no {' or '.join(library.weights)} in it")
    check_link(path)
    read = others.read_safetensors if path.suffix == ".safetensors" else others.read_pickle
    tensors = read(path)
    kind = str(config.get(library.kind) or "adapter")
    delta = {
        "name": str(whole.get("name") or kind),
        "delta_type": kind,
        "active": True,
        "scale": 1.0,
        "frozen": 0,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "modules": _names(config.get(library.places)),
        "modules_to_save": _names(config.get("modules_to_save")),
        "options": {k: v for k, v in sorted(config.items()) if v and k not in NO_OPTIONS},
    }
    return Contents(
        path=given,
        format=library.name,
        backbone=str(whole.get(library.backbone) or ""),
        model=str(whole.get(library.model) or ""),
        deltas=[delta],
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
        bytes=size,
        values=tensors,
    )


def _names(given: Any) -> list[str]:
    """Return what a field holds that names modules: names, a pattern, or nothing."""
    return [str(name) for name in (given if isinstance(given, list) else [given]) if name]


def compared(one: Contents, other: Contents) -> dict[str, Any]:
    """Return the differences between two checkpoints; an empty value means no difference."""
    ours = {delta["name"]: delta for delta in one.deltas}
    theirs = {delta["name"]: delta for delta in other.deltas}
    both = [name for name in ours if name in theirs]
    order = [name for name in theirs if name in ours]
    shapes = {
        name: [one.shapes[name], other.shapes[name]]
        for name in one.shapes
        if name in other.shapes and one.shapes[name] != other.shapes[name]
    }
    same = [name for name in one.shapes if name in other.shapes and name not in shapes]
    return {
        "only_in_a": [name for name in ours if name not in theirs],
        "only_in_b": [name for name in theirs if name not in ours],
        "order": [both, order] if both != order else [],
        "changed": {n: found for n in both if (found := _changes(ours[n], theirs[n]))},
        "tensors_only_in_a": sorted(one.shapes.keys() - other.shapes.keys()),
        "tensors_only_in_b": sorted(other.shapes.keys() - one.shapes.keys()),
        "shapes": shapes,
        "values": {
            name: apart
            for name in same
            if (apart := _distance(one.values[name], other.values[name])) > 0
        },
    }


def _changes(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[Any]]:
    """Return {fact or option: [value in A, value in B]} for two deltas of the same name."""
    a = {**ours, **ours["options"], "options": None, "parameters": None}
    b = {**theirs, **theirs["options"], "options": None, "parameters": None}
    return {k: [a.get(k), b.get(k)] for k in {**a, **b} if a.get(k) != b.get(k)}


def _distance(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / max(|a|, |b|); 0 only if the dtypes and all bits are equal.

    NaN and infinite values count as 0 in both norms.
    """
    if a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)):
        return 0.0
    one, other = (each.double().nan_to_num(0, 0, 0) for each in (a, b))
    size = max(float(one.norm()), float(other.norm()))
    apart = float((one - other).norm())
    return max(apart / size if size > 0 else apart, 5e-324)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
