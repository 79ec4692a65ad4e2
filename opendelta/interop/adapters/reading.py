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
from . import bottleneck, fusions, heads, prefixes, weights
from .terms import (
    ARCHITECTURES,
    COMMON,
    FUSION,
    OLD,
    PICKLE,
    UNREAD,
    WEIGHTS,
    Part,
    Terms,
    slot_pattern,
)

SETUP = "adapter_setup.json"
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
Content = tuple[dict[str, Any], dict[str, Tensor]]  # the JSON, and the tensors by full name
READ = {"adapter": bottleneck.read, "lora": weights.read, "prefix": prefixes.read}


def recognises(folder: Path) -> bool:
    """True if the adapters library wrote `folder`."""
    if any((folder / name).is_file() for name in (fusions.CONFIG, SETUP)):
        return True
    config = folder / CONFIG
    if not config.is_file() or any((folder / name).is_file() for name in PEFT):
        return False
    if (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file():
        return True
    content = read_start(config)
    return b'"config"' in content and b'"peft_type"' not in content


def translate(folder: Path, model: nn.Module) -> Content:
    """Return an adapters folder as the JSON and tensors that `opendelta.load` finds in ours.

    Of a pickle only tensors are read. The keys of the tensors name the modified modules.

    Args:
        model: the backbone, for the names and roles of its modules.

    Returns:
        The JSON, and the tensors by full name. A union of methods gives one delta per method.

    Raises:
        DeltaLoadError: no delta computes the same, the folder is damaged, or of another model.
    """
    if (folder / SETUP).is_file():
        raise DeltaLoadError(
            f"{folder}: {SETUP} says how several adapters act together; load the folders in it one "
            "by one, a fusion after its adapters"
        )
    if (folder / fusions.CONFIG).is_file():
        return _fusion(folder, model)
    return _adapter(folder, model)


def _adapter(folder: Path, model: nn.Module) -> Content:
    config, backbone = read_json(folder / CONFIG), Backbone.of(model)
    _check_model(folder, config, model)
    given = _sorted(folder / CONFIG, config, _read(folder / CONFIG, WEIGHTS, PICKLE))
    parts = _parts(folder, config, backbone, given)
    for part in parts:
        READ[_terms(folder, part.config).name](part)
    return _content(folder, config, parts)


def _fusion(folder: Path, model: nn.Module) -> Content:
    """Translate a fusion, with those of its adapters that are beside it and not on the model."""
    file, backbone = folder / fusions.CONFIG, Backbone.of(model)
    config = read_json(file)
    _check_model(folder, config, model)
    options = config.get("config")
    if not isinstance(options, dict):
        raise DeltaLoadError(f"{file}: config={shown(options)} must be an object with options")
    given = _read(file, fusions.WEIGHTS, fusions.PICKLE)
    longer = f".{FUSION.slots[0]}.{config.get('name')},"  # the library saves such fusions along
    groups = _sorted(file, config, {k: t for k, t in given.items() if longer not in k})
    full = {**FUSION.defaults, **options}
    part = Part(folder, full, backbone, _own_name(config["name"]), given=groups, file=file.name)
    _check_options(part, FUSION)
    fused, brought, tensors = _fused(folder, config, model, fusions.attached(backbone))
    fusions.read(part, fused)
    facts, own = _content(folder, config, [part])
    return {**facts, "deltas": [*brought, *facts["deltas"]]}, {**tensors, **own}


def _fused(
    folder: Path, config: dict[str, Any], model: nn.Module, attached: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Tensor]]:
    """Return the deltas that a fusion combines, and those of them that are read here.

    Returns:
        All of them and those read, each as in the JSON of a folder of ours, and the tensors read.
    """
    fused: list[dict[str, Any]] = []
    brought: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for name in fusions.names_in(folder, config):
        if (own_name := _own_name(name)) in attached:
            fused.append(attached[own_name])
            continue
        facts, own = _adapter(fusions.beside(folder, name), model)
        fused += facts["deltas"]
        brought += facts["deltas"]
        tensors |= own
    return fused, brought, tensors


def _content(folder: Path, config: dict[str, Any], parts: list[Part]) -> Content:
    """Return finished parts, with the head saved beside them, as in a folder of ours."""
    for part in parts:
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


def _read(config: Path, *names: str) -> dict[str, Tensor]:
    """Return the tensors of the first of these files that exists beside a config."""
    for name in names:
        if (config.parent / name).is_file():
            return _tensors(config.parent / name)
    raise DeltaLoadError(
        f"{config.parent}: {config.name} is there, but neither {' nor '.join(names)}"
    )


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
    file: Path, config: dict[str, Any], given: dict[str, Tensor]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Sort tensors into {slot: {path of the library's module: {name of a tensor: values}}}."""
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise DeltaLoadError(f"{file}: name={shown(name)} must be the adapter's name")
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
            f"{file.parent}: {len(unknown)} of {len(given)} tensors belong to nothing "
            f"called {shown(name)}: {shown(unknown[:3])}",
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
    name, parts = _own_name(config["name"]), []
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


def _own_name(name: str) -> str:
    """Return the name of the delta to be of the library's adapter or fusion `name`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:50]


def _check_options(part: Part, terms: Terms) -> None:
    """Raise for the first option that changes the result and that we do not understand."""
    for option, value in part.config.items():
        if option in terms.refused and value and value != terms.defaults[option]:
            raise part.refusal(option, f"{terms.refused[option]}. Use the adapters library for it")
        if option not in {*terms.defaults, *terms.free, *COMMON} and value:
            raise part.refusal(option, "no such option is known. Use the adapters library for it")
