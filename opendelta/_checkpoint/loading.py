"""Load deltas from a folder onto a model; compare all before the model is touched."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone import engines
from .._backbone.backbone import Backbone
from .._backbone.inputs import Samples
from .._deltas.base import BaseDelta, require_whole
from .._deltas.blocks import BlockConfig
from .._deltas.choosing import as_chosen
from .._deltas.committing import commit, take_off
from .._deltas.making import make, materialise, uncollected
from .._deltas.options import COMMON, DeltaConfig
from .._deltas.order import check_root, free_name, known_records
from .._deltas.placing import Placed, place
from .._deltas.registry import method
from .._files import tensors
from .._files.tensors import compare
from .._layers.dtypes import dtype_for
from .._layers.record import Record
from .._modules.process import one_at_a_time
from .._modules.tensors import lasting
from .._sites.stack import check_name
from ..errors import (
    DeltaError,
    DeltaLoadError,
    OptionError,
    UncheckedWarning,
    listed,
    shown,
    warn,
)
from . import fingerprint
from .fingerprint import Comparison
from .parts import copied, replaced
from .source import Source, opened

# Options that only say how a delta starts.
STARTS = {
    "token_init", "tokenizer", "init_range", "init", "low_rank_w_init", "phm_c_init",
    "phm_init_range", "hypercomplex_nonlinearity", "d_initial",
}  # fmt: skip


@lasting()
@one_at_a_time
def load(
    folder: str | os.PathLike,
    model: nn.Module,
    name: str | None = None,
    expected: type[BaseDelta] | None = None,
    check_backbone: bool = True,
    samples: Samples | None = None,
    wanted: DeltaConfig | None = None,
    absent: Sequence[str] = (),
) -> tuple[list[BaseDelta], Source, Comparison]:
    """Put the deltas in `folder` on `model`, after the deltas that are on it.

    Everything is compared before memory is taken, and before the model is touched.

    Args:
        name: the new name of a single delta. None: its saved name, or the next free one.
        expected: the folder must hold one delta, and of this class.
        check_backbone: compare a few values of the weights under the deltas with the saved values.
        samples: inputs of the model, to find sizes by.
        wanted: the options that the first delta must have been saved with. None: any.
        absent: full names of modules; what the folder holds on them and inside them is left out.

    Returns:
        The deltas, the source that the folder holds, and the compared weights of the backbone.

    Raises:
        DeltaLoadError: the folder is damaged, of another method, or does not fit `model`.
    """
    path = Path(folder)
    if not isinstance(model, nn.Module):
        raise OptionError(f"backbone_model must be a torch.nn.Module, not {model!r}")
    if name is not None:
        check_name(name)
    with uncollected(), opened(path, model, absent) as source:
        _check_wanted(path, source.configs, expected, wanted)
        backbone, facts, given = Backbone.of(model, samples), source.facts, source.tensors
        made_for = source.saved_from or "model"
        unfit = f"{path}, saved from a {made_for}, does not fit this {type(model).__name__}"
        deltas = _made(path, unfit, source, backbone, name)
        entries = list(zip(facts["deltas"], deltas, strict=True))
        states = [delta.state_dict(fact["name"]) for fact, delta in entries]
        own = backbone.tensors()
        brought = _brought(path, facts, own)
        compare({k: t for state in (*states, brought) for k, t in state.items()}, given, str(path))
        _check_frozen(path, entries)
        known = check_backbone and source.has_fingerprint
        compared = _check_backbone(path, backbone, facts, deltas) if known else Comparison()
        source.verify()
        new = dict(tensors.values(brought, given, str(path), own))
        for (fact, delta), state in zip(entries, states, strict=True):
            usual = copied(own, state, fact["name"])
            value_of = functools.partial(_value_of, state, given, str(path), usual)
            _fill(backbone, fact, delta, state, value_of)
        placed = _placed(unfit, backbone, deltas)
        if check_backbone:
            _warn_of_unchecked(path, facts, compared, deltas)
        _attach(unfit, backbone, placed, brought, new)
    return deltas, source, compared


def refill(folder: str | os.PathLike, delta: BaseDelta) -> None:
    """Copy the values of the one delta that `folder` holds into `delta`.

    Raises:
        DeltaLoadError: the folder is damaged, holds another method or other options, or does not
            fit. Nothing is copied then.
    """
    path, backbone = Path(folder), Backbone.of(delta.backbone_model)
    delta.record.require_apart("cannot load")
    require_whole(delta, "cannot load values into")
    with opened(path, backbone.model) as source:
        _check_wanted(path, source.configs, type(delta), delta.config)
        facts, own = source.facts, backbone.tensors()
        brought = {key: own[key] for key in facts["backbone_tensors"] if key in own}
        source.verify()
        into = {**delta.state_dict(facts["deltas"][0]["name"]), **brought}
        tensors.copy_into(into, source.tensors, str(path))


def _check_wanted(
    path: Path,
    configs: Sequence[DeltaConfig],
    expected: type[BaseDelta] | None,
    wanted: DeltaConfig | None,
) -> None:
    """Raise unless a folder holds what is asked for; see `load`."""
    if expected is not None:
        _check_type(path, configs, expected)
    if wanted is not None:
        _check_options(path, configs[0], wanted)


def _check_options(path: Path, saved: DeltaConfig, config: DeltaConfig) -> None:
    """Raise unless the method's own options are the same, where no names of modules are in them."""
    own = {field.name: field for field in dataclasses.fields(saved) if field.name not in COMMON}
    for name, field in own.items():
        then, now = getattr(saved, name), getattr(config, name)
        if "modules" not in field.metadata and name not in STARTS and then != now:
            raise DeltaLoadError(f"{path} was saved with {name}={shown(then)}, not {shown(now)}")


def _check_type(path: Path, configs: Sequence[DeltaConfig], expected: type[BaseDelta]) -> None:
    outer = _in_no_block(configs)
    if len(outer) != 1:
        raise DeltaLoadError(
            f"{path} holds {len(outer)} deltas: {', '.join(str(c.name) for c in outer)}; use "
            "opendelta.load(folder, model)"
        )
    cls = method(outer[0].delta_type)
    if not issubclass(cls, expected):
        raise DeltaLoadError(
            f"{path} holds a {cls.delta_type!r}, which {expected.__name__} is not; use "
            f"AutoDeltaModel.from_finetuned or {cls.__name__}.from_finetuned"
        )


def _known(unfit: str, backbone: Backbone) -> list[Record]:
    """Return the deltas of a backbone; raise if one was attached through another model.

    Args:
        unfit: the start of the message that the folder does not fit.
    """
    try:
        check_root(backbone)
    except DeltaError as error:
        raise DeltaLoadError(f"{unfit}: {error}") from None
    return known_records(backbone)


def _made(
    path: Path, unfit: str, source: Source, backbone: Backbone, name: str | None
) -> list[BaseDelta]:
    """Make the deltas of a folder, off the model and without memory, with names that are free.

    Args:
        unfit: the start of the message that the folder does not fit.
        name: as for `load`.
    """
    known = _known(unfit, backbone)
    taken = {record.name for record in known}
    first = known[-1].rank + 1 if known else 0
    deltas: list[BaseDelta] = []
    outer = _in_no_block(source.configs)
    new: dict[str, str] = {}
    for fact, config in zip(source.facts["deltas"], source.configs, strict=True):
        asked = name if config in outer else None
        new[fact["name"]] = config.name = asked or free_name(fact["name"], taken)
        taken.add(config.name)
    _rename_children(path, source.configs, new, {record.name for record in backbone.records()})
    for fact, config in zip(source.facts["deltas"], source.configs, strict=True):
        brought = [*(config.unfrozen_modules or ()), *source.facts["backbone_tensors"]]
        config.unfrozen_modules = list(dict.fromkeys(brought)) or None
        delta = _made_one(path, unfit, fact, config, backbone, known)
        delta.record.rank, delta.record.enabled = first + len(deltas), fact["active"]
        deltas.append(delta)
    return deltas


def _in_no_block(configs: Sequence[DeltaConfig]) -> list[DeltaConfig]:
    """Return the deltas of a folder that no block in it combines."""
    named = {name for config in configs for name in config.children}
    return [config for config in configs if config.name not in named]


def _rename_children(
    path: Path, configs: Sequence[DeltaConfig], new: Mapping[str, str], attached: set[str]
) -> None:
    """Give blocks the new names of the deltas in them.

    Args:
        new: {name in the file: name on the model}.
        attached: the names of the deltas that are on the model.

    Raises:
        DeltaLoadError: a delta is neither in the file nor on the model.
    """
    for config in configs:
        for name in config.children:
            if name not in new and name not in attached:
                raise DeltaLoadError(
                    f"{path}: the block {config.name!r} combines {name!r}, which is neither in the "
                    "folder nor attached to the model: attach it first, or save the block with all "
                    "that is in it, by save_finetuned() of the block or of the composition"
                )
        if isinstance(config, BlockConfig):
            config.deltas = [new.get(name, name) for name in config.children]


def _made_one(
    path: Path,
    unfit: str,
    fact: dict[str, Any],
    config: DeltaConfig,
    backbone: Backbone,
    known: list[Record],
) -> BaseDelta:
    try:
        choice = as_chosen(backbone, method(config.delta_type), config, known)
        delta = make(backbone, choice, values="saved")
        delta.scale = fact.get("scale", 1.0)
    except DeltaError as error:
        raise DeltaLoadError(f"{unfit}: {error}") from None
    except Exception as error:  # methods and torch raise anything for options that are impossible
        raise DeltaLoadError(f"{unfit}: {type(error).__name__}: {error}") from error
    if not delta.layers:
        raise DeltaLoadError(f"{path}: {config.name!r} changes no module")
    return delta


def _brought(path: Path, facts: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the backbone's tensors whose values the file brings along."""
    if strangers := [key for key in facts["backbone_tensors"] if key not in own]:
        raise DeltaLoadError(
            f"{path}: backbone_tensors names {strangers[0]!r}, which is no tensor",
            unexpected=strangers,
        )
    return {key: own[key] for key in facts["backbone_tensors"]}


def _fill(
    backbone: Backbone,
    fact: dict[str, Any],
    delta: BaseDelta,
    state: Mapping[str, Tensor],
    value_of: Callable[..., Any],
) -> None:
    """Give a delta memory, and the tensors of a file that are known to fit.

    Args:
        state: the delta's tensors by the names in the file.
        value_of: `_value_of` for this delta.
    """
    with torch.no_grad():
        for where, layer in delta.layers.items():
            device, computes = backbone.device_and_dtype_of(where)
            kept = functools.partial(dtype_for, None, computes)
            value = functools.partial(value_of, None if delta.config.dtype else kept)
            materialise(layer, device, delta.prefix(where, fact["name"]), value)
    made = {key: tensor for key, tensor in state.items() if not tensor.is_meta}
    tensors.copy(made, {key: value_of(None, key) for key in made})
    for name, parameter in delta.named_parameters(fact["name"]):
        parameter.requires_grad_(name not in fact["frozen"] and parameter.is_floating_point())


def _value_of(
    own: Mapping[str, Tensor],
    given: Mapping[str, Any],
    source: str,
    usual: Mapping[str, Tensor],
    dtype_of: Callable[[torch.dtype], torch.dtype] | None,
    key: str,
) -> Tensor | None:
    """Return the saved values of the tensor `key` in new memory; None if they are not saved."""
    if key not in own:
        return None
    value = tensors.value(key, own[key], given, source, usual, dtype_of)
    return value.clone(
        memory_format=torch.contiguous_format
    )  # `value` may be memory of the file, or of another tensor


def _check_frozen(path: Path, entries: Sequence[tuple[dict[str, Any], BaseDelta]]) -> None:
    """Raise if a name in the field `frozen` is no parameter of its delta."""
    for fact, delta in entries:
        names = {n for n, _ in delta.named_parameters(fact["name"])} if fact["frozen"] else ()
        if strangers := [name for name in fact["frozen"] if name not in names]:
            raise DeltaLoadError(
                f"{path}: frozen names {strangers[0]!r}, which is no parameter of {fact['name']!r}",
                unexpected=strangers,
            )


def _placed(unfit: str, backbone: Backbone, deltas: Sequence[BaseDelta]) -> list[Placed]:
    """Place all deltas on their model, which stays as it is; raise if one cannot be there.

    Args:
        unfit: as for `_made`.
    """
    placed, known = list[Placed](), known_records(backbone)
    try:
        with engines.one_look():
            for delta in deltas:
                placed.append(place(backbone, delta, known=known))
                placed[-1].pretend()
                known = placed[-1].order
    except DeltaError as error:
        raise DeltaLoadError(f"{unfit}: {error}") from None
    return placed


def _attach(
    unfit: str,
    backbone: Backbone,
    placed: Sequence[Placed],
    own: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
) -> None:
    """Put deltas on their model and copy backbone tensors: all or nothing.

    Args:
        unfit: as for `_made`.
        own: the backbone tensors that the file brings along.
        new: their new values.
    """
    old = {key: tensor.detach().clone() for key, tensor in own.items()}
    try:
        for each in placed:
            commit(each)
        tensors.copy(own, new)
    except BaseException as error:
        for each in placed:
            take_off(Backbone.of(backbone.model), each.delta)
        with contextlib.suppress(RuntimeError):  # a tensor that cannot be written to is as it was
            tensors.copy(own, old)
        if isinstance(error, RuntimeError):
            raise DeltaLoadError(f"{unfit}: {error}") from None
        raise


def _check_backbone(
    path: Path, backbone: Backbone, facts: dict[str, Any], deltas: Sequence[BaseDelta]
) -> Comparison:
    """Compare the weights under the deltas with the fingerprint; raise if some differ."""
    names = list(dict.fromkeys(name for delta in deltas for name in delta.modified_modules))
    without = replaced(facts["backbone_tensors"], [delta.config for delta in deltas])
    compared = fingerprint.compare(backbone, facts["fingerprint"], names, without)
    if differ := compared.differing:
        first = listed(f"{name} {how}" for name, how in differ.items())
        raise DeltaLoadError(
            f"{path} was saved from another backbone: of {len(compared)} weights under its deltas "
            f"{len(differ)} differ in this {type(backbone.model).__name__}: "
            f"{first} (relative norm; up to "
            f"{fingerprint.TOLERANCE} is rounding). If that is meant, pass check_backbone=False, "
            "or --no-check-backbone to the command merge",
            differing=differ,
        )
    return compared


def _warn_of_unchecked(
    path: Path, facts: dict[str, Any], compared: Comparison, deltas: Sequence[BaseDelta]
) -> None:
    """Warn of weights that cannot be compared, and of values that no memory was there for."""
    if empty := [each.name for each in deltas if any(p.is_meta for p in each.parameters())]:
        told = f"the values of {listed(empty)} in {path} were not read, as the model is on the meta"
        what = "load them again once it has values, or give it a state dict that has them"
        warn(f"{told} device: {what}", UncheckedWarning)
    if "unchecked" in facts:
        warn(f"{path}: {facts['unchecked']}", UncheckedWarning)
    if unread := compared.unread:
        warn(
            f"{len(unread)} of {len(compared)} weights under the deltas of {path} cannot be "
            "compared, being not in its fingerprint, sharded, quantised or without values: "
            f"{listed(unread)}",
            UncheckedWarning,
        )
