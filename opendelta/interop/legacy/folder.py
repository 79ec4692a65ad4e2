"""Read a folder of OpenDelta 0.3: its config and the tensors of one delta."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._backbone import roles
from ..._backbone.backbone import Backbone, attached_records
from ..._backbone.patterns import as_list, compile_pattern
from ..._deltas import choosing, former
from ..._deltas.options import DeltaConfig
from ..._deltas.registry import method
from ..._files.reading import as_path, check_link, undamaged
from ...errors import AddressError, DeltaError, DeltaLoadError, OptionError, listed
from ...names import ancestors, parent, unnumbered
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


def bare_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the file in `folder` if OpenDelta 0.3 wrote it without a config; else None."""
    file = as_path(folder, "path") / WEIGHTS
    return file if file.is_file() and not file.with_name(CONFIG).exists() else None


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
            sites = content_of(read_pickle(folder / WEIGHTS)).of(config.get("delta_type"))
            config["modified_modules"] = list(
                dict.fromkeys(name for part in sites for name in part)
            )
        found = _config(folder, config)
        found.update({"unfrozen_modules": config.get("unfrozen_modules")})
        return found


def translate(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder of OpenDelta 0.3 as the JSON and tensors that `opendelta.load` finds in ours.

    It holds the tensors of all deltas that were on the backbone; its config says which are meant.
    Its md5 of the backbone is not compared: it depends on the versions of libraries.

    Args:
        model: the backbone. It gives the names of modules, and the biases that 0.3 replaced.

    Returns:
        The JSON, and the tensors by full name.

    Raises:
        DeltaLoadError: the folder is damaged, or its config may mean tensors of several deltas.
    """
    check_link(folder / WEIGHTS)
    config, backbone = read_json(folder / CONFIG), Backbone.of(model)
    name, options = _options(folder, config)
    content = content_of(read_pickle(folder / WEIGHTS))
    modified, sites, unsure = _sites_of(folder, config, backbone, content)
    own = own_names(name, backbone, content, sites, list(dict.fromkeys(modified)))
    if name == "prefix" and content.take_network(modified) is not None:
        raise _several(folder, name, modified[0])
    _leave_to_bitfit(backbone, content)
    if others := {kind for kind, _ in content.sites} - {name}:
        unsure += f"; its tensors of {listed(sorted(others))} are other deltas': load their folders"
    facts = {
        "backbone_class": config.get("backbone_class"),
        "backbone_tensors": sorted(content.others),
        "deltas": [fact(name, name, {**options, "modified_modules": modified})],
        "unchecked": f"OpenDelta 0.3's md5 of the backbone is not compared{unsure}",
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
    if wanted is not None:
        options["modified_modules"] = wanted
        options["common_structure"] = bool(config.get("common_structure")) or None
    options["exclude_modules"] = config.get("exclude_modules")
    try:
        return method(name).config_class.from_options(options)
    except OptionError as error:
        raise DeltaLoadError(f"{folder / CONFIG}: {error}") from None


def _sites_of(
    folder: Path, config: dict[str, Any], backbone: Backbone, content: Content
) -> tuple[list[str], dict[str, dict[str, Tensor]], str]:
    """Return the modules that the delta changes, and its tensors by their module in the file.

    The third value says that there may be tensors of other deltas among them, or is empty.

    Raises:
        DeltaLoadError: there are tensors of several deltas on one module, or none that are meant.
    """
    name = config["delta_type"]
    parts = content.of(name)
    biases = _biases(content) if name == "bitfit" else {}
    held = list(dict.fromkeys([*(where for part in parts for where in part), *biases]))
    cls = method(name)
    by_keys = held and not (cls.layer_class.paired or (name == "prefix" and content.networks))
    own = _config(folder, config if not by_keys else {**config, "modified_modules": None})
    layer_class, unsure = cls.layer_for(own), ""
    if by_keys:
        meant, unsure = _meant(folder, config, own, backbone, held)
        modified = choosing.fitting_inside(backbone, meant, layer_class)
    else:
        own.exclude_modules = _excluded(own, backbone.modules) or None
        try:
            resolved = choosing.resolve(backbone, own, cls.default_modified_modules, layer_class)
        except DeltaError as error:
            where = f"{folder / CONFIG}, on this {type(backbone.model).__name__}"
            raise DeltaLoadError(f"{where}: {error}") from None
        modified = resolved.modified_modules or []
        if layer_class.paired:
            _check_held(folder, backbone, held, modified[::2])
            modified = _pairs(held, modified, backbone)
        meant = [where for where in held if where in modified]
    sites: dict[str, dict[str, Tensor]] = {}
    for where in meant:
        given = [part[where] for part in parts if where in part]
        if len(given) > 1:
            raise _several(folder, name, where)
        sites[where] = given[0] if given else {}
        if where in biases:
            sites[where]["whole"] = content.others.pop(biases[where])
    return modified, sites, unsure


def _several(folder: Path, name: str, where: str) -> DeltaLoadError:
    return DeltaLoadError(
        f"{folder / WEIGHTS} holds tensors of several {name!r} deltas on {where!r}, and its config "
        "does not say which are meant: attach the same deltas in the same order and use "
        "opendelta.interop.legacy.load_state_dict(model, path)"
    )


def _meant(
    folder: Path, config: dict[str, Any], own: DeltaConfig, backbone: Backbone, held: list[str]
) -> tuple[list[str], str]:
    """Return those of the modules `held` that the config of a folder selects.

    The second value is empty, or says that modules of other deltas may be among them.
    """
    wanted, by_role = as_list(config.get("modified_modules")), bool(config.get("common_structure"))
    chosen: set[str] = set()
    unknown = [p for p in wanted if not _add_selected(chosen, backbone, p, by_role)]
    chosen -= {*_excluded(own, chosen)}
    around = {*chosen, *(map(parent, chosen) if by_role else ())}
    inside = by_role or method(own.delta_type).layer_for(own).inside
    meant = [
        name
        for name in held
        if name in around
        or name not in backbone.modules
        or (inside and not chosen.isdisjoint(ancestors(name)))
    ]
    if wanted and not unknown and meant:
        _check_held(folder, backbone, held, _expected(own, backbone, chosen, by_role, held))
    if not wanted or (unknown and len(meant) < len(held)):
        others = f"; what {listed(unknown)} selects cannot be told: all its tensors are taken"
        return held, others if wanted else ""
    if not meant:
        raise DeltaLoadError(
            f"{folder / CONFIG}: modified_modules={wanted} selects none of the modules that "
            f"{WEIGHTS} has tensors of: {listed(held)}"
        )
    return meant, ""


def _add_selected(chosen: set[str], backbone: Backbone, pattern: str, by_role: bool) -> bool:
    """Add the modules that a pattern of 0.3 selects to `chosen`; False if it cannot be told."""
    if _may_run_forever(pattern):
        return False
    try:
        test = compile_pattern(pattern)
        names = roles.with_roles(backbone, [pattern]) if by_role else filter(test, backbone.modules)
        chosen.update(names)
    except AddressError:
        return False
    return True


def _expected(
    own: DeltaConfig, backbone: Backbone, chosen: set[str], by_role: bool, held: list[str]
) -> list[str]:
    """Return the modules that 0.3 put layers on, given those that the config of a folder selects.

    Its BitFit knew fewer kinds of modules than ours: those count that are like one in the file.
    """
    layer_class = method(own.delta_type).layer_for(own)
    names = [name for name in backbone.modules if name in chosen]
    names = choosing.fitting_inside(backbone, names, layer_class, by_role)
    alike = {*map(unnumbered, held)}
    return [n for n in names if own.delta_type != "bitfit" or unnumbered(n) in alike]


def _check_held(folder: Path, backbone: Backbone, held: list[str], expected: list[str]) -> None:
    """Raise if the file has no tensors of a module, or of a module around it.

    If it has tensors of a module that the model lacks, the load says that.
    """
    modules = backbone.modules
    if not modules.keys() >= {*held}:
        return
    known = {id(modules[name]) for name in held}
    lacking = [
        name
        for name in expected
        if known.isdisjoint(id(modules[around]) for around in ancestors(name))
    ]
    if lacking:
        raise DeltaLoadError(
            f"{folder / WEIGHTS} has no tensors for {len(lacking)} modules that modified_modules "
            f"selects: {listed(lacking)}; load it on the model that it was trained on"
        )


def _pairs(starts: list[str], modified: list[str], backbone: Backbone) -> list[str]:
    """Return the pairs of modules of a branch: the starts from the file, the ends from the config.

    On T5 the branch around the attention began and ended at the module around it. A start that the
    model lacks is its own end: nobody knows another, and the load refuses it by its name.
    """
    ends = dict(zip(modified[::2], modified[1::2], strict=True))
    around = {n: n for n in starts if any(w.startswith(f"{n}.") and w == ends[w] for w in ends)}
    gone = {name: name for name in starts if name not in backbone.modules}
    known = {**around, **ends, **gone}
    return [name for start in starts if start in known for name in (start, known[start])]


def _excluded(own: DeltaConfig, names: Iterable[str]) -> list[str]:
    """Return the names that begin with one of the texts in `exclude_modules`, as 0.3 took them."""
    starts = tuple(as_list(own.exclude_modules))
    return [name for name in names if name.startswith(starts)] if starts else []


def _biases(content: Content) -> dict[str, str]:
    """Return {module: name of its bias} if the file has no weight of it: 0.3's BitFit trains it."""
    ends = {key.removesuffix(".bias"): key for key in content.others if key.endswith(".bias")}
    return {where: key for where, key in ends.items() if f"{where}.weight" not in content.others}


def _leave_to_bitfit(backbone: Backbone, content: Content) -> None:
    """Take the biases out of `content.others` whose change a BitFit of the model holds already."""
    there = [record.config for record in attached_records(backbone.model)]
    held = {n for c in there if c.delta_type == "bitfit" for n in c.modified_modules or ()}
    for where, key in _biases(content).items():
        if where in held:
            del content.others[key]
