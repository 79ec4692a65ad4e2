"""Read a folder of OpenDelta 0.3: its config and the tensors of one delta."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._backbone.backbone import Backbone
from ..._backbone.patterns import as_list
from ..._deltas import choosing, former
from ..._deltas.options import DeltaConfig
from ..._deltas.registry import method
from ..._files.reading import check_link, undamaged
from ...errors import DeltaError, DeltaLoadError, OptionError
from .._draft import fact, named
from .._files import read_json, read_pickle, repeats_too_much
from .content import METHODS, Content, content_of, own_names

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
# Fields that describe the config itself, or that do not change the result.
FREE = {
    "delta_type", "modified_modules", "exclude_modules", "unfrozen_modules", "common_structure",
    "interactive_modify", "backbone_checkpoint_name", "backbone_class", "backbone_hash",
    "opendelta_version", "transformers_version", "sequential", "name", "dtype", "gate", "reads",
    "modules_to_save",
}  # fmt: skip


def recognises(folder: Path) -> bool:
    """True if OpenDelta 0.3 wrote `folder`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return False
    given = read_json(folder / CONFIG)
    return "delta_type" in given and "format" not in given


def holds_options(folder: Path) -> bool:
    """True if OpenDelta 0.3 wrote a config without weights into `folder`."""
    if not (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
        return False
    given = read_json(folder / CONFIG)
    return "delta_type" in given and "format" not in given


def options_in(folder: Path) -> dict[str, Any]:
    """Return the options of such a config."""
    return read_json(folder / CONFIG)


def config_of(folder: Path) -> DeltaConfig:
    """Return the config of the delta that OpenDelta 0.3 saved in `folder`.

    Raises:
        DeltaLoadError: no delta can have this config.
    """
    with undamaged(folder):
        config = read_json(folder / CONFIG)
        if any(_may_run_forever(pattern) for pattern in as_list(config.get("modified_modules"))):
            sites = content_of(read_pickle(folder / WEIGHTS)).sites.values()
            config["modified_modules"] = list(
                dict.fromkeys(name for part in sites for name in part)
            )
        found = _config(folder, config)
        found.update({name: config.get(name) for name in ("exclude_modules", "unfrozen_modules")})
        return found


def translate(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder of OpenDelta 0.3 as the JSON and tensors that `opendelta.load` finds in ours.

    Its md5 of the backbone is not compared: it depends on the versions of libraries.

    Args:
        model: the backbone. It gives the names of modules, and the biases that 0.3 replaced.

    Returns:
        The JSON, and the tensors by full name.

    Raises:
        DeltaLoadError: the folder is damaged, or holds tensors of several methods.
    """
    check_link(folder / WEIGHTS)
    config, backbone = read_json(folder / CONFIG), Backbone.of(model)
    name, options = _options(folder, config)
    content = content_of(read_pickle(folder / WEIGHTS))
    if strangers := {kind for kind, _ in content.sites} - {name}:
        raise DeltaLoadError(
            f"{folder / WEIGHTS} holds tensors of {sorted(strangers)} beside its {name!r}: put the "
            "same deltas on a model and use opendelta.interop.legacy.load_state_dict(model, path)"
        )
    sites = {w: own for part in content.sites.values() for w, own in part.items()}
    modified = _sites_of(folder, config, backbone, content, sites)
    own = own_names(name, backbone, content, sites, list(dict.fromkeys(modified)))
    facts = {
        "backbone_class": config.get("backbone_class"),
        "backbone_tensors": sorted(content.others),
        "deltas": [fact(name, name, {**options, "modified_modules": modified})],
        "unchecked": "OpenDelta 0.3's md5 of the backbone is not compared",
    }
    return facts, {**named(own, name), **content.others}


def _options(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the method's name and its options that are not null; null means 0.3's default."""
    name = config["delta_type"]
    if str(name) not in {*METHODS.values(), "soft_prompt"}:
        raise DeltaLoadError(
            f"{folder / CONFIG}: delta_type={name!r} is none of OpenDelta 0.3's: "
            f"{', '.join(METHODS.values())}, soft_prompt"
        )
    known = {option.name for option in dataclasses.fields(method(name).config_class)} - FREE
    known |= {*former.of(name)}
    given = {key: value for key, value in config.items() if key not in FREE and value is not None}
    if unknown := sorted(given.keys() - known):
        raise DeltaLoadError(
            f"{folder / CONFIG}: {unknown[0]}={given[unknown[0]]!r} is no option of {name!r} in "
            "OpenDelta 0.3; remove it if it changes nothing"
        )
    if name == "soft_prompt":
        given |= {"strip": False, "token_init": False}
    return name, given


def _may_run_forever(pattern: Any) -> bool:
    return str(pattern).startswith("[r]") and repeats_too_much(pattern)


def _config(folder: Path, config: dict[str, Any]) -> DeltaConfig:
    name, options = _options(folder, config)
    wanted = None if name == "soft_prompt" else config.get("modified_modules")
    if pattern := next(filter(_may_run_forever, as_list(wanted)), None):
        raise DeltaLoadError(
            f"{folder / CONFIG}: {pattern!r} repeats too much; write names of modules"
        )
    if wanted is not None:  # 0.3 put an @ into names that it found by a role
        options["modified_modules"] = [pattern.replace("@", "") for pattern in as_list(wanted)]
        options["common_structure"] = bool(config.get("common_structure")) or None
    try:
        return method(name).config_class.from_options(options)
    except OptionError as error:
        raise DeltaLoadError(f"{folder / CONFIG}: {error}") from None


def _sites_of(
    folder: Path,
    config: dict[str, Any],
    backbone: Backbone,
    content: Content,
    sites: dict[str, dict[str, Tensor]],
) -> list[str]:
    """Return the modules that the delta changes: from the keys, else from the config."""
    name = config["delta_type"]
    if name == "bitfit":
        _take_biases(content, sites)
    cls = method(name)
    by_keys = sites and not (content.network or cls.layer_class.paired)
    own = _config(folder, config if not by_keys else {**config, "modified_modules": None})
    layer_class = cls.layer_for(own)
    if by_keys:
        return choosing.fitting_inside(backbone, list(sites), layer_class)
    try:
        resolved = choosing.resolve(backbone, own, cls.default_modified_modules, layer_class)
    except DeltaError as error:
        where = f"{folder / CONFIG}, on this {type(backbone.model).__name__}"
        raise DeltaLoadError(f"{where}: {error}") from None
    modified = resolved.modified_modules or []
    return _pairs(list(sites), modified) if layer_class.paired else modified


def _pairs(starts: list[str], modified: list[str]) -> list[str]:
    """Return the pairs of modules of a branch: the starts from the file, the ends from the config.

    On T5 the branch around the attention began and ended at the module around it.
    """
    ends = dict(zip(modified[::2], modified[1::2], strict=True))
    around = {n: n for n in starts if any(w.startswith(f"{n}.") and w == ends[w] for w in ends)}
    known = {**around, **ends}
    return [name for start in starts if start in known for name in (start, known[start])]


def _take_biases(content: Content, sites: dict[str, dict[str, Tensor]]) -> None:
    """Move a bias from `content.others` to BitFit if the file has no weight of its module."""
    for key in [key for key in content.others if key.endswith(".bias")]:
        where = key.removesuffix(".bias")
        if f"{where}.weight" not in content.others:
            sites.setdefault(where, {})["whole"] = content.others.pop(key)
