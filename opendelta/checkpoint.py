"""Deltas in a folder: what is saved of them, and how they come back, compared first."""

from __future__ import annotations

import functools
import os
import warnings
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import comparing, fingerprint, merging, planning, sharding
from . import folder as files
from .addressing import Survey, ancestors, survey
from .comparing import compare
from .delta import Delta
from .errors import (
    DeltaError,
    DeltaLoadError,
    OptionError,
    UncheckedWarning,
    UnsavedWarning,
)
from .freezing import backbone_tensors
from .options import DeltaConfig
from .order import free_name, known_records
from .record import SLOT
from .registry import method
from .source import Source, opened


# ------------------------------------------------------------------------------------------- saving
@planning.uncollected()
def save(deltas: Sequence[Delta], folder: str | os.PathLike) -> None:
    """Write deltas of one backbone into `folder`, in this order, with all of their state."""
    files.check_free(Path(folder))
    found = survey(deltas[0].backbone_model)
    merging.check_unrouted(found, "cannot save")
    backbone = _backbone_part(found, deltas)
    tensors = {**backbone, **{k: t for delta in deltas for k, t in delta.state_dict().items()}}
    whole = {name: sharding.full(tensor.detach()) for name, tensor in tensors.items()}
    config = {
        "opendelta_version": files.own_version(),
        "backbone_class": type(found.root).__name__,
        "backbone_config": fingerprint.described(found.root),
        "backbone_tensors": sorted(backbone),
        "fingerprint": fingerprint.take(
            found,
            list(dict.fromkeys(name for delta in deltas for name in delta.modified_modules)),
            _replaced(backbone, [delta.config for delta in deltas]),
        ),
        "deltas": [_facts(delta) for delta in deltas],
    }
    _check_finite(found, whole, deltas)
    files.write(Path(folder), config, whole)


def _check_finite(found: Survey, tensors: Mapping[str, Tensor], deltas: Sequence[Delta]) -> None:
    """Raise if values of tensors by full name are NaN or infinite: no loader would take them."""
    bad = [key for key, tensor in tensors.items() if not comparing.is_finite(tensor)]
    if bad:  # unless the backbone has the same, such as the -inf of a mask
        own = backbone_tensors(found)
        usual = {**own, **{k: t for d in deltas for k, t in _copied(own, bad, d.name).items()}}
        bad = [key for key in bad if not comparing.is_finite(tensors[key], usual.get(key))]
    if bad:
        raise DeltaError(
            f"{len(bad)} tensors hold values that are not finite: {', '.join(bad[:3])}"
            f"{', ...' * (len(bad) > 3)}: the training diverged. Nothing was saved"
        )


def _copied(own: Mapping[str, Tensor], keys: Iterable[str], name: str) -> dict[str, Tensor]:
    """{key of a tensor in a module that the delta called `name` owns: the backbone's own one}."""
    slot = f".{SLOT}.{name}.module."
    plain = {key: key.replace(slot, ".") for key in keys if slot in key}
    return {key: own[place] for key, place in plain.items() if place in own}


def _replaced(backbone: Iterable[str], configs: Iterable[DeltaConfig]) -> set[str]:
    """Names of tensors and modules whose values the file brings along."""
    return {*backbone, *(name for config in configs for name in config.modules_to_save or ())}


def _facts(delta: Delta) -> dict[str, Any]:
    """One delta as JSON: its type, name, switches and resolved options."""
    options = {option: getattr(delta.config, option) for option in delta.config.option_names()}
    del options["name"]
    frozen = [name for name, p in delta.named_parameters() if not p.requires_grad]
    return {
        "delta_type": delta.delta_type,
        "name": delta.name,
        "active": delta.active,
        **({} if delta.scale == 1 else {"scale": delta.scale}),
        "frozen": frozen,
        "options": options,
    }


def _backbone_part(found: Survey, deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """The backbone tensors that are saved with the deltas; warns of other trainable ones."""
    own = backbone_tensors(found)
    around = {n for d in deltas for n in (*d.unfrozen_modules, *d.record.shared.excluded)}
    named = {n: t for n, t in own.items() if around and around & {"", *ancestors(n)}}
    known = set(map(id, named.values()))
    others = {id(p): p for p in own.values() if p.requires_grad and id(p) not in known}
    if others and any(delta.attached for delta in deltas):
        warnings.warn(
            f"{len(others)} trainable parameters of the backbone "
            f"({sum(p.numel() for p in others.values()):,} values) are not saved with "
            f"{', '.join(repr(d.name) for d in deltas)}: freeze them with freeze_module(), or name "
            "those that belong to it in freeze_module(exclude=[...]) or unfrozen_modules=[...]",
            UnsavedWarning,
            stacklevel=5,  # one is of the decorator
        )
    for name, tensor in named.items():
        where, _, key = name.rpartition(".")
        kept = merging.kept(found, where, key, "saving")
        named[name] = tensor if kept is None else kept.to(tensor)
    return named


# ------------------------------------------------------------------------------------------ loading
def load(
    folder: str | os.PathLike,
    model: nn.Module,
    name: str | None = None,
    expected: type[Delta] | None = None,
    check_backbone: bool = True,
) -> tuple[list[Delta], Source]:
    """Put the deltas that `folder` holds on `model`, after those that are there.

    Everything is compared before memory is taken, and before the model is touched.

    Args:
        name: the delta's name here, if there is one delta. None: its own, or the next free one.
        expected: there must be one delta, and of this method.
        check_backbone: compare a few values of the weights that the deltas stand on with those
            that they had.

    Returns:
        The deltas, and what the folder says.

    Raises:
        DeltaLoadError: the folder is damaged, of another method, or does not fit `model`.
    """
    path = Path(folder)
    if not isinstance(model, nn.Module):
        raise OptionError(f"backbone_model must be a torch.nn.Module, not {model!r}")
    with planning.uncollected(), opened(path, model) as source:
        facts, configs = source.facts, source.configs
        if expected is not None:
            _check_type(path, configs, expected)
        found = survey(model)
        known = known_records(found)
        taken = {record.name for record in known}
        deltas: list[Delta] = []
        for place, (fact, config) in enumerate(zip(facts["deltas"], configs, strict=True)):
            config.name = name or free_name(fact["name"], taken)
            taken.add(config.name)
            brought = [*(config.unfrozen_modules or ()), *facts["backbone_tensors"]]
            config.unfrozen_modules = list(dict.fromkeys(brought)) or None
            deltas.append(_planned(path, source.saved_from, fact, config, found))
            deltas[-1].record.place = (known[-1].place + 1 if known else 0) + place
            deltas[-1].record.active = fact["active"]
        _fill(path, source, found, deltas, check_backbone)
    if check_backbone and "unchecked" in facts:
        warnings.warn(f"{path}: {facts['unchecked']}", UncheckedWarning, stacklevel=4)
    return deltas, source


def _check_type(path: Path, configs: Sequence[DeltaConfig], expected: type[Delta]) -> None:
    if len(configs) != 1:
        raise DeltaLoadError(
            f"{path} holds {len(configs)} deltas: {', '.join(str(c.name) for c in configs)}; use "
            "opendelta.load(folder, model)"
        )
    cls = method(configs[0].delta_type)
    if not issubclass(cls, expected):
        raise DeltaLoadError(
            f"{path} holds a {cls.delta_type!r}, which {expected.__name__} is not; use "
            f"AutoDeltaModel.from_finetuned or {cls.__name__}.from_finetuned"
        )


def _planned(
    path: Path, saved_from: str | None, fact: dict[str, Any], config: DeltaConfig, found: Survey
) -> Delta:
    """A delta of these resolved options, off the model and without memory."""
    cls = method(config.delta_type)
    delta = cls.__new__(cls)
    unfit = f"{path}, saved from a {saved_from or 'model'}, does not fit this "
    unfit += type(found.root).__name__
    try:
        delta._prepare(found, config, "saved")
        delta.scale = fact.get("scale", 1.0)
    except DeltaError as error:
        raise DeltaLoadError(f"{unfit}: {error}") from None
    except Exception as error:  # of a method, or of torch, for options that no delta can have
        raise DeltaLoadError(f"{unfit}: {type(error).__name__}: {error}") from error
    if not delta.layers:
        raise DeltaLoadError(f"{path}: {config.name!r} changes no module")
    return delta


def _fill(
    path: Path, source: Source, found: Survey, deltas: Sequence[Delta], check_backbone: bool
) -> None:
    """Give the planned deltas memory and the tensors of `source`, and put them on their model."""
    facts, given = source.facts, source.tensors
    own = backbone_tensors(found)
    if strangers := [key for key in facts["backbone_tensors"] if key not in own]:
        raise DeltaLoadError(f"{path}: backbone_tensors names {strangers[0]!r}, which is no tensor")
    backbone = {key: own[key] for key in facts["backbone_tensors"]}
    entries = list(zip(facts["deltas"], deltas, strict=True))
    states = [delta.state_dict(fact["name"]) for fact, delta in entries]
    compare({**dict(ChainMap(*states)), **backbone}, given, str(path))
    _check_frozen(path, entries)
    if check_backbone:
        replaced = _replaced(backbone, [delta.config for delta in deltas])
        _check_backbone(path, found, facts["fingerprint"], replaced)
    source.verify()
    brought = dict(comparing.values(backbone, given, str(path), own))
    for (fact, delta), state in zip(entries, states, strict=True):
        usual = _copied(own, state, fact["name"])
        value_of = functools.partial(_value_of, state, given, str(path), usual)
        with torch.no_grad():
            for where, layer in delta.layers.items():
                device, _ = planning.placement(found, where, delta.config)
                planning.materialise(layer, device, delta._prefix(where, fact["name"]), value_of)
        made = {key: tensor for key, tensor in state.items() if not tensor.is_meta}
        comparing.copy(made, dict(comparing.values(made, given, str(path), usual)))
        for name, parameter in delta.named_parameters(fact["name"]):
            parameter.requires_grad_(name not in fact["frozen"] and parameter.is_floating_point())
    _enter(path, found, deltas)
    comparing.copy(backbone, brought)


def _value_of(
    own: Mapping[str, Tensor],
    given: Mapping[str, Any],
    source: str,
    usual: Mapping[str, Tensor],
    key: str,
) -> Tensor | None:
    """The values for the tensor called `key`, in new memory; None if they are not saved."""
    if key not in own:
        return None
    value = comparing.value(key, own[key], given, source, usual)
    return value.clone(
        memory_format=torch.contiguous_format
    )  # it lies in the file, or is another's


def _check_frozen(path: Path, entries: Sequence[tuple[dict[str, Any], Delta]]) -> None:
    """Raise if a name in `frozen` is no parameter of its delta."""
    for fact, delta in entries:
        names = {n for n, _ in delta.named_parameters(fact["name"])} if fact["frozen"] else ()
        if strangers := [name for name in fact["frozen"] if name not in names]:
            raise DeltaLoadError(
                f"{path}: frozen names {strangers[0]!r}, which is no parameter of {fact['name']!r}"
            )


def _enter(path: Path, found: Survey, deltas: Sequence[Delta]) -> None:
    """Put deltas on their model, all or none."""
    entered: list[Delta] = []
    try:
        for delta in deltas:
            delta._enter(found=found)
            entered.append(delta)
    except BaseException as error:
        for delta in entered:
            delta.detach()
        if isinstance(error, DeltaError):
            raise DeltaLoadError(f"{path} does not fit: {error}") from None
        raise


def _check_backbone(
    path: Path, found: Survey, given: dict[str, Any], replaced: Collection[str]
) -> None:
    """Raise if the weights under the deltas are not those that they were saved from."""
    differ, unchecked = fingerprint.differences(found, given, replaced)
    if differ:
        first = ", ".join(f"{name} {how}" for name, how in [*differ.items()][:3])
        raise DeltaLoadError(
            f"{path} was saved from another backbone: of {len(given)} weights under its deltas "
            f"{len(differ)} differ in this {type(found.root).__name__}: "
            f"{first}{', ...' if len(differ) > 3 else ''} (relative norm; up to "
            f"{fingerprint.TOLERANCE} is rounding). If that is meant, pass check_backbone=False, "
            "or --no-check-backbone to the command merge",
            differing=differ,
        )
    if unchecked:
        warnings.warn(
            f"{len(unchecked)} of {len(given)} weights under the deltas of {path} cannot be "
            f"compared, being sharded, quantised or without values: {', '.join(unchecked[:3])}",
            UncheckedWarning,
            stacklevel=5,
        )
