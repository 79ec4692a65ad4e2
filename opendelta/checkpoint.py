"""Deltas in a folder: what is saved of them, and how they come back, compared first."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import fingerprint, interop, planning, sharding
from . import folder as files
from .addressing import Survey, ancestors, survey
from .delta import Delta
from .errors import (
    AddressError,
    DeltaLoadError,
    OptionError,
    SiteError,
    UncheckedWarning,
    UnsavedWarning,
)
from .freezing import backbone_tensors
from .options import DeltaConfig
from .order import free_name, known_records
from .registry import method


# ------------------------------------------------------------------------------------------- saving
def save(deltas: Sequence[Delta], folder: str | os.PathLike) -> None:
    """Write deltas of one backbone into `folder`, in this order, with all of their state."""
    files.check_free(Path(folder))
    backbone = _backbone_part(deltas)
    tensors = {**backbone, **{k: t for delta in deltas for k, t in delta.state_dict().items()}}
    whole = {name: sharding.full(tensor.detach()) for name, tensor in tensors.items()}
    plain = {name: tensor.cpu().contiguous().clone() for name, tensor in whole.items()}
    config = {
        "opendelta_version": files.own_version(),
        "backbone_class": type(deltas[0].backbone_model).__name__,
        "backbone_tensors": sorted(backbone),
        "fingerprint": fingerprint.take(
            survey(deltas[0].backbone_model),
            list(dict.fromkeys(name for delta in deltas for name in delta.modified_modules)),
            _replaced(backbone, [delta.config for delta in deltas]),
        ),
        "deltas": [_facts(delta) for delta in deltas],
    }
    files.write(Path(folder), config, safetensors.torch.save(plain, metadata={"format": "pt"}))


def _replaced(backbone: Iterable[str], configs: Iterable[DeltaConfig]) -> set[str]:
    """Names of tensors and modules whose values the file brings along."""
    return {*backbone, *(name for config in configs for name in config.modules_to_save or ())}


def _facts(delta: Delta) -> dict[str, Any]:
    """One delta as JSON: its type, name, switches and resolved options."""
    options = delta.config.to_dict()
    frozen = [name for name, p in delta.named_parameters() if not p.requires_grad]
    return {
        "delta_type": options.pop("delta_type"),
        "name": delta.name,
        "active": delta.active,
        "frozen": frozen,
        "options": {name: value for name, value in options.items() if name != "name"},
    }


def _backbone_part(deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """The backbone tensors that are saved with the deltas; warns of other trainable ones."""
    own = backbone_tensors(survey(deltas[0].backbone_model))
    around = {n for d in deltas for n in (*d.unfrozen_modules, *d.record.shared.excluded)}
    named = {name: tensor for name, tensor in own.items() if around & {"", *ancestors(name)}}
    known = set(map(id, named.values()))
    others = {id(p): p for p in own.values() if p.requires_grad and id(p) not in known}
    if others and any(delta.attached for delta in deltas):
        warnings.warn(
            f"{len(others)} trainable parameters of the backbone "
            f"({sum(p.numel() for p in others.values()):,} values) are not saved with "
            f"{', '.join(repr(d.name) for d in deltas)}: freeze them with freeze_module(), or name "
            "those that belong to it in freeze_module(exclude=[...]) or unfrozen_modules=[...]",
            UnsavedWarning,
            stacklevel=4,
        )
    return named


# ------------------------------------------------------------------------------------------ loading
def load(
    folder: str | os.PathLike,
    model: nn.Module,
    name: str | None = None,
    expected: type[Delta] | None = None,
    check_backbone: bool = True,
) -> list[Delta]:
    """Put the deltas that `folder` holds on `model`, after those that are there.

    Everything is compared before memory is taken, and before the model is touched.

    Args:
        name: the delta's name here, if there is one delta. None: its own, or the next free one.
        expected: there must be one delta, and of this method.
        check_backbone: compare a few values of the weights that the deltas stand on with those
            that they had.

    Raises:
        DeltaLoadError: the folder is damaged, of another method, or does not fit `model`.
    """
    path = Path(folder)
    if not isinstance(model, nn.Module):
        raise OptionError(f"backbone_model must be a torch.nn.Module, not {model!r}")
    with _opened(path, model) as (facts, configs, given):
        if expected is not None:
            _check_type(path, configs, expected)
        known = known_records(survey(model))
        taken = {record.name for record in known}
        deltas: list[Delta] = []
        for place, (fact, config) in enumerate(zip(facts["deltas"], configs, strict=True)):
            config.name = name or free_name(fact["name"], taken)
            taken.add(config.name)
            brought = [*(config.unfrozen_modules or ()), *facts["backbone_tensors"]]
            config.unfrozen_modules = list(dict.fromkeys(brought)) or None
            deltas.append(_planned(path, facts, config, model))
            deltas[-1].record.place = (known[-1].place + 1 if known else 0) + place
            deltas[-1].record.active = fact["active"]
        _fill(path, facts, deltas, given, check_backbone)
    if check_backbone and "unchecked" in facts:
        warnings.warn(f"{path}: {facts['unchecked']}", UncheckedWarning, stacklevel=4)
    return deltas


@contextlib.contextmanager
def _opened(
    path: Path, model: nn.Module
) -> Iterator[tuple[dict[str, Any], list[DeltaConfig], Mapping[str, Any]]]:
    """What a folder says, and its tensors by name, of which those in our own files stay on disk."""
    reader = interop.reader_of(path)
    if reader is not None:
        facts, tensors = reader.translate(path, model)
        yield facts, configs_of(path, facts), tensors
        return
    facts = files.read_config(path)
    configs = configs_of(path, facts)
    with files.open_weights(path, facts) as weights:
        yield facts, configs, {key: Stored(weights, key) for key in weights.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file: its shape and dtype, and itself when it is read."""

    file: Any
    key: str

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.key).get_shape()

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.key).get_dtype()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.key)


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


def _planned(path: Path, facts: dict[str, Any], config: DeltaConfig, model: nn.Module) -> Delta:
    """A delta of these resolved options, off the model and without memory."""
    cls = method(config.delta_type)
    delta = cls.__new__(cls)
    try:
        delta._prepare(survey(model), config, "saved")
    except (AddressError, SiteError) as error:
        raise DeltaLoadError(
            f"{path}, saved from a {facts['backbone_class']}, does not fit this "
            f"{type(model).__name__}: {error}"
        ) from None
    return delta


def _fill(
    path: Path,
    facts: dict[str, Any],
    deltas: Sequence[Delta],
    given: Mapping[str, Any],
    check_backbone: bool,
) -> None:
    """Give the planned deltas memory and the tensors in `given`, and put them on their model."""
    found = survey(deltas[0].backbone_model)
    own = backbone_tensors(found)
    backbone: dict[str, Tensor] = {key: own[key] for key in facts["backbone_tensors"]}
    entries = list(zip(facts["deltas"], deltas, strict=True))
    saved = {k: t for fact, d in entries for k, t in d.state_dict(fact["name"]).items()}
    compare({**saved, **backbone}, given, str(path))
    if check_backbone:
        replaced = _replaced(backbone, [delta.config for delta in deltas])
        _check_backbone(path, found, facts["fingerprint"], replaced)
    for fact, delta in entries:
        planning.materialise(found, delta.layers, delta.config)
        _copy(delta.state_dict(fact["name"]), given)
        for name, parameter in delta.named_parameters(fact["name"]):
            parameter.requires_grad_(name not in fact["frozen"] and parameter.is_floating_point())
    entered: list[Delta] = []
    try:
        for delta in deltas:
            delta._enter()
            entered.append(delta)
    except BaseException:
        for delta in entered:
            delta.detach()
        raise
    _copy(backbone, given)


def _check_backbone(
    path: Path, found: Survey, given: dict[str, Any], replaced: Collection[str]
) -> None:
    """Raise if the weights under the deltas are not those that they were saved from."""
    differ, unchecked = fingerprint.differences(found, given, replaced)
    if differ:
        raise DeltaLoadError(
            f"{path} was saved from another backbone: of {len(given)} weights under its deltas "
            f"{len(differ)} differ in this {type(found.root).__name__}: "
            f"{', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''} (relative norm; up to "
            f"{fingerprint.TOLERANCE} is rounding). If that is meant, pass check_backbone=False"
        )
    if unchecked:
        warnings.warn(
            f"{len(unchecked)} of {len(given)} weights under the deltas of {path} cannot be "
            f"compared, being sharded, quantised or without values: {', '.join(unchecked[:3])}",
            UncheckedWarning,
            stacklevel=5,
        )


def configs_of(folder: Path, facts: dict[str, Any]) -> list[DeltaConfig]:
    """The options of the deltas in a folder's JSON.

    Raises:
        DeltaLoadError: it says what no delta can be.
    """
    where = folder / files.CONFIG
    if not _are_names(facts.setdefault("backbone_tensors", [])):
        raise DeltaLoadError(f"{where}: backbone_tensors must be a list of names")
    if not fingerprint.is_fingerprint(facts.setdefault("fingerprint", {})):
        raise DeltaLoadError(f"{where}: fingerprint must hold a shape and values of each weight")
    facts.setdefault("backbone_class", "model")
    given = facts.get("deltas")
    if not isinstance(given, list) or not given:
        raise DeltaLoadError(f"{where}: deltas must be a list of at least one")
    configs = [_config(where, fact) for fact in given]
    names = [fact["name"] for fact in given]
    if len(set(names)) < len(names):
        raise DeltaLoadError(f"{where}: two deltas have the same name: {names}")
    return configs


FACTS = {"delta_type": str, "name": str, "active": bool, "frozen": list, "options": dict}


def _config(where: Path, fact: Any) -> DeltaConfig:
    if not isinstance(fact, dict) or fact.keys() != FACTS.keys():
        raise DeltaLoadError(f"{where}: each of deltas must have just {', '.join(FACTS)}")
    for key, kind in FACTS.items():
        if not isinstance(fact[key], kind):
            raise DeltaLoadError(f"{where}: {key}={fact[key]!r} must be a {kind.__name__}")
    if not _are_names(fact["frozen"]):
        raise DeltaLoadError(f"{where}: frozen must be a list of names")
    try:
        options = {**fact["options"], "name": fact["name"]}
        return method(fact["delta_type"]).config_class.from_dict(options)
    except OptionError as error:
        raise DeltaLoadError(f"{where}: {error}") from None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# ---------------------------------------------------------------------------------------- comparing
def copy_into(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Copy `given` tensors into `own` ones of the same names.

    Args:
        source: where `given` comes from, for the message.

    Raises:
        DeltaLoadError: names, shapes or kinds of numbers differ. Nothing is copied then.
    """
    compare(own, given, source)
    _copy(own, given)


def _copy(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for key, tensor in own.items():
            value = given[key]
            value = value if isinstance(value, Tensor) else value.read()
            tensor.copy_(sharding.spread(value, like=tensor))


def compare(own: Mapping[str, Tensor], given: Mapping[str, Any], source: str) -> None:
    """Raise unless `given` tensors, in memory or in a file, fit `own` ones.

    Raises:
        DeltaLoadError: names, shapes or kinds of numbers differ.
    """
    both = [key for key in own if key in given]
    problems = [
        *_some("missing", [key for key in own if key not in given]),
        *_some("unexpected", [key for key in given if key not in own]),
        *_some("of another shape", list(_misshaped(both, own, given))),
        *_some("not floating", [
            f"{key}: {given[key].dtype}"
            for key in both
            if own[key].is_floating_point() and not _is_floating(str(given[key].dtype))
        ]),
    ]  # fmt: skip
    if problems:
        raise DeltaLoadError(f"{source} does not fit: " + "; ".join(problems))


def _misshaped(
    both: Sequence[str], own: Mapping[str, Tensor], given: Mapping[str, Any]
) -> Iterator[str]:
    for key in both:
        shape = list(given[key].shape)
        if shape != list(own[key].shape):
            yield f"{key}: {shape} instead of {list(own[key].shape)}"


def _is_floating(dtype: str) -> bool:
    """Whether a dtype of torch, or of a safetensors header, is floating."""
    return "float" in dtype or dtype.startswith(("F", "BF"))


def _some(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what}: {', '.join(sorted(names)[:3])}" + ", ..." * (len(names) > 3)]
