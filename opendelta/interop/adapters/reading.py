"""Read a folder of the adapters library: each tensor gets its place, or there is an error."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._backbone.backbone import Backbone
from ..._files.reading import check_link, read_start
from ...errors import DeltaLoadError, shown
from .._draft import CONFIG, fact
from .._files import read_json, read_pickle, read_safetensors
from . import bottleneck, heads, prefixes, weights
from .terms import (
    ARCHITECTURES,
    COMMON,
    OLD,
    PICKLE,
    UNREAD,
    WEIGHTS,
    Part,
    Terms,
    slot_pattern,
)

SEVERAL = ("adapter_fusion_config.json", "adapter_setup.json")
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
READ = {"adapter": bottleneck.read, "lora": weights.read, "prefix": prefixes.read}


def recognises(folder: Path) -> bool:
    """True if the adapters library wrote `folder`."""
    if any((folder / name).is_file() for name in SEVERAL):
        return True
    config = folder / CONFIG
    if not config.is_file() or any((folder / name).is_file() for name in PEFT):
        return False
    if (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file():
        return True
    content = read_start(config)
    return b'"config"' in content and b'"peft_type"' not in content


def translate(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapters folder as the JSON and tensors that `opendelta.load` finds in ours.

    Of a pickle only tensors are read. The keys of the tensors name the modified modules.

    Args:
        model: the backbone, for the names and roles of its modules.

    Returns:
        The JSON, and the tensors by full name. A union of methods gives one delta per method.

    Raises:
        DeltaLoadError: no delta computes the same, the folder is damaged, or of another model.
    """
    for name in SEVERAL:
        if (folder / name).is_file():
            raise DeltaLoadError(
                f"{folder}: {name} says how several adapters act together; save them one by one "
                "with model.save_adapter(folder, name), and load those"
            )
    config, backbone = read_json(folder / CONFIG), Backbone.of(model)
    _check_model(folder, config, model)
    given = _sorted(folder, config, _read(folder, WEIGHTS, PICKLE))
    parts = _parts(folder, config, backbone, given)
    for part in parts:
        READ[_terms(folder, part.config).name](part)
        part.sort()
        for slot, groups in part.given.items():
            part.check_empty((slot for own in groups.values() if own), "the model")
    if head := heads.read(folder):
        heads.add(parts[0], _tensors(head))
    return _facts(config, parts), {k: t for part in parts for k, t in part.tensors().items()}


def _facts(config: dict[str, Any], parts: list[Part]) -> dict[str, Any]:
    """Return the JSON that a folder of ours would have."""
    deltas = [
        fact(part.method, part.name, {"modified_modules": list(part.sites), **part.options})
        for part in parts
    ]
    made_for = str(config.get("model_class") or "model")
    return {"backbone_class": made_for, "backbone_tensors": [], "deltas": deltas}


# ---------------------------------------------------------------------------------------- the files
def _tensors(path: Path) -> dict[str, Tensor]:
    check_link(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def _read(folder: Path, *names: str) -> dict[str, Tensor]:
    """Return the tensors of the first of these files that exists."""
    for name in names:
        if (folder / name).is_file():
            return _tensors(folder / name)
    raise DeltaLoadError(f"{folder}: {CONFIG} is there, but neither {' nor '.join(names)}")


def _check_model(folder: Path, config: dict[str, Any], model: nn.Module) -> None:
    """Raise if the adapter is of another kind of model, whose modules may have the same names."""
    theirs = config.get("model_type")
    ours = getattr(getattr(model, "config", None), "model_type", None)
    if theirs and ours and theirs != ours:
        made_for = shown(config.get("model_class"))
        raise DeltaLoadError(
            f"{folder} was saved from a {shown(theirs)} ({made_for}), and this "
            f"{type(model).__name__} is a {ours!r}; load it on the model that it was trained on"
        )


def _sorted(
    folder: Path, config: dict[str, Any], given: dict[str, Tensor]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Sort tensors into {slot: {path of the library's module: {name of a tensor: values}}}."""
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise DeltaLoadError(f"{folder / CONFIG}: name={shown(name)} must be the adapter's name")
    pattern, unknown = slot_pattern(name), []
    out: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in given.items():
        found = pattern.fullmatch(key)
        if found is None:
            unknown.append(key)
        elif not f".{found['where']}.".endswith(".prefix_tuning.pool."):  # each layer repeats it
            slot = OLD.get(found["slot"], found["slot"])
            out[slot][found["where"] or ""][found["rest"]] = tensor
    if unknown or not out:
        raise DeltaLoadError(
            f"{folder}: {len(unknown)} of {len(given)} tensors are none of an adapter called "
            f"{shown(name)}: {shown(unknown[:3])}",
            unexpected=unknown,
        )
    return out


# ---------------------------------------------------------------------------------------- the parts
def _terms(folder: Path, config: dict[str, Any]) -> Terms:
    """Return the library's terms for the method of a config."""
    kind = config.get("architecture")
    terms = ARCHITECTURES.get(kind) if kind is None or isinstance(kind, str) else None
    if terms is None:
        why = UNREAD.get(str(kind), "there is no such method here")
        raise DeltaLoadError(
            f"{folder / CONFIG}: architecture={shown(kind)} cannot be loaded: {why}"
        )
    return terms


def _parts(
    folder: Path,
    config: dict[str, Any],
    backbone: Backbone,
    given: dict[str, dict[str, dict[str, Tensor]]],
) -> list[Part]:
    """Return a part for each method in the config, with its tensors."""
    whole = config.get("config")
    union = isinstance(whole, dict) and whole.get("architecture") == "union"
    configs = whole.get("configs") if union and isinstance(whole, dict) else [whole]
    if (
        not isinstance(configs, list)
        or not configs
        or not all(isinstance(c, dict) for c in configs)
    ):
        raise DeltaLoadError(
            f"{folder / CONFIG}: config={shown(whole)} must be an object with the options of a "
            "method; save the adapter anew with a current adapters library"
        )
    name, parts = re.sub(r"[^A-Za-z0-9_-]", "_", config["name"])[:50], []
    for own in configs:
        terms = _terms(folder, own)
        mine = {slot: given.pop(slot) for slot in terms.slots if slot in given}
        if terms.slots[0] not in mine:
            raise DeltaLoadError(
                f"{folder}: no {terms.slots[0]} for {own.get('architecture') or 'bottleneck'!r}; "
                "it is incomplete, or two methods in it have tensors of the same name"
            )
        full = {**terms.defaults, **weights.correct(own, config.get("version"))}
        own_name = f"{name}_{terms.name}" if union else name
        parts.append(Part(folder, full, backbone, own_name, given=mine))
        _check_options(parts[-1], terms)
    if "invertible_adapters" in given:
        raise parts[0].refusal(
            "inv_adapter", "it changes the embeddings, and undoes that at the end"
        )
    if given:
        raise parts[0].error(f"nothing is known of its {', '.join(given)}")
    return parts


def _check_options(part: Part, terms: Terms) -> None:
    """Raise for the first option that changes the result and that we do not understand."""
    for option, value in part.config.items():
        if option in terms.refused and value and value != terms.defaults[option]:
            raise part.refusal(option, f"{terms.refused[option]}. Use the adapters library for it")
        if option not in {*terms.defaults, *terms.free, *COMMON} and value:
            raise part.refusal(option, "no such option is known. Use the adapters library for it")
