"""Read checkpoints of OpenDelta 0.3: a folder of one delta, or a state dict of several deltas.

Both are pickles. Only tensors are unpickled.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._backbone.patterns import as_list
from .._deltas import choosing, former
from .._deltas.base import BaseDelta
from .._deltas.options import DeltaConfig
from .._deltas.order import handle_of, known_records
from .._deltas.registry import method
from .._deltas.state_dict import TRANSLATORS
from .._files.reading import as_path, check_link, undamaged
from .._files.tensors import copy_into
from .._modules.tensors import full, stored_params
from ..errors import DeltaError, DeltaLoadError, OptionError, listed, shown
from ..names import SLOT
from ._draft import fact, has_values, keys_and_values, named
from ._files import read_json, read_pickle, repeats_too_much

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
METHODS = {
    "lora": "lora",
    "adapter": "adapter",
    "parallel_adapter": "parallel_adapter",
    "low_rank_adapter": "low_rank_adapter",
    "compactor": "compacter",
    "bitfit": "bitfit",
    "prefix": "prefix",
}
OURS = rf"(?:.+\.)?{SLOT}\.(?:.+)"  # the name of a tensor here
# With three layers of one method on a module, the second has _1 behind its name, the third _2.
KEY = re.compile(
    rf"(?!{OURS})(?P<where>.+?)\.(?P<slot>{'|'.join(METHODS)})(?:_(?P<nth>\d+))?\.(?P<rest>.+)"
)
NETWORK = re.compile(r".+\.reparams(?:_\d+)?\.(?P<rest>.+)")
PROMPT = re.compile(r"(?:.+\.)?soft_prompt_layer\.soft_embeds")
TOKENS = re.compile(r".+\.reparams(?:_\d+)?\.input_tokens")  # the numbers 0, 1, 2, ...
RENAMED = {  # {our method: [(pattern in a 0.3 name, our text instead)]}
    "adapter": [(r"^modulelist\.", "")],
    "parallel_adapter": [(r"^modulelist\.", "")],
    "compacter": [(r"\.(?=phm_rule)", ".rule."), (r"\.(?=W)", ".blocks.")],
}
# Fields that describe the config itself, or that do not change the result.
FREE = {
    "delta_type", "modified_modules", "exclude_modules", "unfrozen_modules", "common_structure",
    "interactive_modify", "backbone_checkpoint_name", "backbone_class", "backbone_hash",
    "opendelta_version", "transformers_version", "sequential", "name", "dtype", "gate", "reads",
    "modules_to_save",
}  # fmt: skip


@dataclass
class Content:
    """The tensors of a state dict of OpenDelta 0.3, sorted by their owners.

    Attributes:
        sites: {(our name of a method, number of earlier layers of it on the same module): {full
            name of a module: {our name of a tensor: values}}}.
        network: the network that computes the keys and values of prefixes.
        prompt: the rows of a soft prompt.
        others: the backbone's tensors.
    """

    sites: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    network: dict[str, Tensor] = field(default_factory=dict)
    prompt: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)


def _content(given: dict[str, Tensor]) -> Content:
    """Sort a state dict by its keys."""
    content = Content()
    for key, tensor in given.items():
        if PROMPT.fullmatch(key):
            content.prompt = tensor
        elif (found := NETWORK.fullmatch(key)) and "." in found["rest"]:
            content.network[found["rest"]] = tensor
        elif found := KEY.fullmatch(key):
            name, rest = METHODS[found["slot"]], found["rest"]
            for pattern, ours in RENAMED.get(name, ()):
                rest = re.sub(pattern, ours, rest)
            content.sites[name, int(found["nth"] or 0)][found["where"]][rest] = tensor
        elif not TOKENS.fullmatch(key):
            content.others[key] = tensor
    return content


# --------------------------------------------------------------------------------------- a folder
def recognises(folder: Path) -> bool:
    """True if OpenDelta 0.3 wrote `folder`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return False
    given = read_json(folder / CONFIG)
    return "delta_type" in given and "format" not in given


def config_of(folder: Path) -> DeltaConfig:
    """Return the config of the delta that OpenDelta 0.3 saved in `folder`.

    Raises:
        DeltaLoadError: no delta can have this config.
    """
    with undamaged(folder):
        config = read_json(folder / CONFIG)
        if any(_may_run_forever(pattern) for pattern in as_list(config.get("modified_modules"))):
            sites = _content(read_pickle(folder / WEIGHTS)).sites.values()
            config["modified_modules"] = list(
                dict.fromkeys(name for part in sites for name in part)
            )
        return _config(folder, config)


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
    content = _content(read_pickle(folder / WEIGHTS))
    if strangers := {kind for kind, _ in content.sites} - {name}:
        raise DeltaLoadError(
            f"{folder / WEIGHTS} holds tensors of {sorted(strangers)} beside its {name!r}: put the "
            "same deltas on a model and use opendelta.interop.legacy.load_state_dict(model, path)"
        )
    sites = {w: own for part in content.sites.values() for w, own in part.items()}
    modified = _sites_of(folder, config, backbone, content, sites)
    own = _own(name, backbone, content, sites, list(dict.fromkeys(modified)))
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


# ---------------------------------------------------------------------------------- a composition
def load_state_dict(model: nn.Module, path: str | os.PathLike) -> None:
    """Copy the tensors of several deltas of OpenDelta 0.3 into the same deltas on `model`.

    The file was written by `torch.save(model.state_dict(), path)`: the documentation of 0.3 saved
    a composition so. First attach the same deltas in the same order. Give SoftPromptModel
    strip=False, as 0.3 did not strip.

    Args:
        model: carries the deltas; the values of other trainable tensors of it are copied too.

    Raises:
        DeltaLoadError: the file's tensors do not fit these deltas. Nothing is copied then.
    """
    source = as_path(path, "path", hint="; the model comes first, then the path")
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, not {shown(model)}")
    found = Backbone.of(model)
    deltas = [handle_of(found, record) for record in known_records(found)]
    if not deltas:
        raise DeltaLoadError(
            f"{source} holds tensors of deltas, but this {type(model).__name__} has none: attach "
            "the deltas that it was saved from first, in the same order"
        )
    with undamaged(source):
        into, given = _matched(source, found, deltas)
    copy_into(into, given, str(source))


def _matched(
    source: Path, backbone: Backbone, deltas: Iterable[BaseDelta]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's tensors by our full names, and the values for them in a file."""
    content = _content(read_pickle(source))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    into: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for delta in deltas:
        into |= delta.state_dict()
        given |= _of_delta(delta, backbone, content, counts)
    unused = {
        f"{where}.{kind}": value
        for (kind, _), part in content.sites.items()
        for where, own in part.items()
        for value in own.values()
    }
    of_backbone, own = _of_backbone(source, backbone, content.others), backbone.tensors()
    into |= {key: own[key] for key in of_backbone if key in own}
    return into, {**given, **of_backbone, **unused}


def _renamed(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give the tensors of deltas in a state dict of OpenDelta 0.3 the names that they have here.

    Plain biases of its BitFit are the backbone's, and stay so.

    Raises:
        DeltaLoadError: the model has no delta for some of them.
    """
    if not any(expression.fullmatch(k) for k in state for expression in (KEY, NETWORK, PROMPT)):
        return state
    backbone = Backbone.of(model)
    content, counts = _content(state), defaultdict[tuple[str, str], int](int)
    others, content.others = content.others, {}
    given: dict[str, Tensor] = {}
    for record in known_records(backbone):
        given |= _of_delta(handle_of(backbone, record), backbone, content, counts)
    if left := [f"{n} ({kind})" for (kind, _), part in content.sites.items() for n in part]:
        raise DeltaLoadError(
            f"the state dict is OpenDelta 0.3's, and this {type(model).__name__} has no "
            f"delta for {listed(left)}: attach the same deltas in the same order, with these names "
            "as modified_modules"
        )
    return {**others, **given}


TRANSLATORS.append(_renamed)


def _of_delta(
    delta: BaseDelta, backbone: Backbone, content: Content, counts: dict[tuple[str, str], int]
) -> dict[str, Tensor]:
    """Take the tensors of a delta out of `content` and return them by our full names.

    Args:
        counts: {(method, module): layers that earlier deltas have there}; this delta is added.
    """
    kind, wanted = delta.delta_type, list(dict.fromkeys(delta.modified_modules))
    sites: dict[str, dict[str, Tensor]] = {}
    for where in wanted:
        nth = counts[kind, where]
        counts[kind, where] += 1
        part = content.sites.get((kind, nth), {})
        # We put a prefix on the attention module, 0.3 put it on the module around.
        around = (n for n in part if where == n or (kind == "prefix" and where.startswith(f"{n}.")))
        if (theirs := next(around, None)) is not None:
            sites[where] = part.pop(theirs)
        if kind == "bitfit" and (key := f"{where}.bias") in content.others:
            sites.setdefault(where, {})["whole"] = content.others.pop(key)
    return named(_own(kind, backbone, content, sites, wanted), delta.name)


def _of_backbone(source: Path, backbone: Backbone, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the trainable tensors of the backbone, which are to be copied.

    A tensor that does not fit the model is returned too, for `copy_into` to refuse.

    Raises:
        DeltaLoadError: a frozen tensor differs from the model's.
    """
    own = backbone.tensors()
    copied = {}
    for key, tensor in given.items():
        there = own.get(key)
        if there is None or there.shape != tensor.shape or there.requires_grad:
            copied[key] = tensor
        elif not has_values(there, tensor):
            raise DeltaLoadError(
                f"{source} brings other values for {key!r}, which is frozen here: it was saved "
                "from another backbone, or trained it: make it trainable to take them"
            )
    return copied


# -------------------------------------------------------------------------------- by our names
def _own(
    name: str,
    backbone: Backbone,
    content: Content,
    sites: dict[str, dict[str, Tensor]],
    wanted: Iterable[str],
) -> dict[str, dict[str, Tensor]]:
    """Return {full name of a module: {our tensor: values}} for a delta on the modules `wanted`."""
    wanted = list(wanted)
    if name == "soft_prompt" and content.prompt is not None:
        return {wanted[0]: {"soft_embeds": content.prompt}} if wanted else {}
    if name == "bitfit":
        return {where: {"bias": _change(backbone, where, own)} for where, own in sites.items()}
    if name == "prefix" and content.network:
        return _prefixes(backbone, content, wanted)
    if name == "prefix":
        around = {n: next(w for w in wanted if f"{w}.".startswith(f"{n}.")) for n in sites}
        return {around[n]: own for n, own in sites.items()}
    return sites


def _change(backbone: Backbone, where: str, own: dict[str, Tensor]) -> Tensor:
    """Return BitFit's change of a module's bias: 0.3 saved the changed bias, not the change."""
    change = own.get("bias", torch.zeros(()))
    if "whole" in own:
        module = backbone.modules.get(where)
        base = stored_params(module).get("bias") if module is not None else None
        whole = own["whole"]
        if base is not None and base.shape == whole.shape and not base.is_meta:
            whole = whole.float() - full(base.detach()).cpu().float()
        change = change + whole
    return change


def _prefixes(
    backbone: Backbone, content: Content, wanted: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Split the network of all prefixes: a shared part, and the rows of its last layer for each."""
    network = content.network
    try:
        last = [network.pop(f"control_trans.2.{end}") for end in ("weight", "bias")]
        shared = {
            "tensors.embedding": network.pop("wte.weight"),
            "tensors.hidden.weight": network.pop("control_trans.0.weight"),
            "tensors.hidden.bias": network.pop("control_trans.0.bias"),
        }
        weights, biases = (tensor.chunk(2 * len(wanted)) for tensor in last)
    except (KeyError, RuntimeError) as error:
        raise DeltaLoadError(f"the network of the prefix is not whole: {error}") from None
    own: dict[str, dict[str, Tensor]] = {backbone.innermost_around(wanted): shared}
    for where, tensors in keys_and_values(weights, biases, wanted):
        own.setdefault(where, {}).update(tensors)
    return own
