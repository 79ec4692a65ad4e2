"""Write the deltas of a model into a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import interop
from .._backbone import sharding
from .._backbone.backbone import Backbone
from .._backbone.heads import warn_of_untrained
from .._deltas import first_forward, making
from .._deltas.base import BaseDelta, tensors_of
from .._deltas.buffers import saved
from .._files import folder as files
from .._files.reading import as_path
from .._layers.record import Record
from .._modules.tensors import full, in_parts, is_finite, is_lazy, size
from .._sites import merged
from ..errors import DeltaError, UnreachedWarning, UnsavedWarning, listed, warn
from ..names import last
from . import fingerprint
from .parts import copied, replaced
from .source import MOST_DELTAS


@making.uncollected()
def save(
    deltas: Sequence[BaseDelta],
    folder: str | os.PathLike,
    argument: str = "folder",
    public: bool = False,
) -> None:
    """Write deltas of one backbone into `folder`, in this order, with all their state.

    Args:
        argument: the name of the argument that is `folder`, for messages.
        public: others will read it: leave out where on this machine the backbone lies.
    """
    path = as_path(folder, argument)
    _check_free(path)
    if len(deltas) > MOST_DELTAS:
        raise DeltaError(
            f"{len(deltas):,} deltas are more than {MOST_DELTAS:,}, which a folder may hold: save "
            "fewer deltas in one"
        )
    backbone = Backbone.of(deltas[0].backbone_model)
    backbone.require_unrouted("cannot save")
    _check_children(deltas)
    _warn_of_replaced(backbone, [delta.record for delta in deltas])
    brought = _backbone_part(backbone, deltas)
    tensors = {**brought, **{k: t for delta in deltas for k, t in tensors_of(delta).items()}}
    whole = {name: full(tensor).detach() for name, tensor in tensors.items()}
    files.check_values(whole)
    config = {
        "opendelta_version": files.own_version(),
        "backbone_class": sharding.own_class(backbone.model).__name__,
        "backbone_config": fingerprint.described(backbone.model),
        **_source_of(backbone.model, public),
        "backbone_tensors": sorted(brought),
        "fingerprint": fingerprint.take(
            backbone,
            list(dict.fromkeys(name for delta in deltas for name in delta.modified_modules)),
            replaced(brought, [delta.config for delta in deltas]),
        ),
        "deltas": [facts_of(delta) for delta in deltas],
    }
    _check_finite(backbone, whole, deltas)
    files.write(path, config, whole)


def _check_children(deltas: Sequence[BaseDelta]) -> None:
    """Raise if a block combines a delta that is not saved with it: nobody could load it."""
    names = [delta.name for delta in deltas]
    for delta in deltas:
        if gone := [name for name in delta.config.children if name not in names]:
            raise DeltaError(
                f"cannot save the block {delta.name!r}: it combines {gone[0]!r}, which is not "
                "attached. Attach it, and disable it if it should not act; or make a block without "
                "it"
            )


def _source_of(model: nn.Module, public: bool) -> dict[str, Any]:
    """Return where a transformers model came from, and the names of its labels, if known."""
    config = model.__dict__.get("config")
    path, labels = getattr(config, "_name_or_path", ""), getattr(config, "id2label", None)
    found: dict[str, Any] = {}
    if path and not (public and os.path.exists(path)):
        found["backbone_path"] = path
    usual = {number: f"LABEL_{number}" for number in range(2)}
    if labels and labels != usual and sorted(labels) == list(range(len(labels))):
        found["backbone_labels"] = [str(labels[number]) for number in range(len(labels))]
    return found


def _check_free(folder: Path) -> None:
    """Raise if `folder` holds other files: they would be lost, or hide the saved deltas."""
    files.check_free(folder)
    if (folder / files.CONFIG).exists():
        return
    if (reader := interop.reader_of(folder)) is not None:
        library = last(reader.__name__)
        raise DeltaError(
            f"{folder} holds files of another library ({library}); save into a folder of its own"
        )


def _check_finite(
    backbone: Backbone, tensors: Mapping[str, Tensor], deltas: Sequence[BaseDelta]
) -> None:
    """Raise if tensors hold NaN or infinite values: `load` would refuse them."""
    bad = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if bad:  # a copy of a backbone tensor may hold the same values as it, such as -inf in a mask
        own = backbone.tensors()
        usual = {**own, **{k: t for d in deltas for k, t in copied(own, bad, d.name).items()}}
        bad = [key for key in bad if not is_finite(tensors[key], usual.get(key))]
    if bad:
        raise DeltaError(
            f"{len(bad)} tensors hold values that are not finite: {listed(bad)}"
            f": the training diverged. Nothing was saved"
        )


def facts_of(delta: BaseDelta) -> dict[str, Any]:
    """Return a delta as JSON: its type, name, switches and resolved options."""
    options = {option: getattr(delta.config, option) for option in delta.config.option_names()}
    del options["name"]
    frozen = [name for name, p in delta.named_parameters() if not p.requires_grad]
    record = delta.record
    return {
        "delta_type": delta.delta_type,
        "name": delta.name,
        "active": record.active if record in record.shared.records else record.enabled,
        **({} if delta.scale == 1 else {"scale": delta.scale}),
        "frozen": frozen,
        "options": options,
    }


def _warn_of_replaced(backbone: Backbone, records: Sequence[Record]) -> None:
    """Warn of layers that are in the file and act no longer, as their module was replaced."""
    found = first_forward.replaced(backbone)
    gone = [f"{where} ({record.name})" for record, where in found if record in records]
    if gone:
        warn(
            f"{len(gone)} delta layers were on modules that others replaced since, and do not act: "
            f"{listed(gone)}. The file holds them as they were; detach the delta and attach it "
            "again, so that it acts on the new modules",
            UnreachedWarning,
        )


def _backbone_part(backbone: Backbone, deltas: Sequence[BaseDelta]) -> dict[str, Tensor]:
    """Return the backbone tensors to save with the deltas; warn of other trainable tensors."""
    named = saved(backbone, [delta.record for delta in deltas])
    known = set(map(id, named.values()))
    others = {
        id(p): p for p in backbone.tensors().values() if p.requires_grad and id(p) not in known
    }
    if others and any(delta.attached for delta in deltas):
        warn(
            f"{len(others)} trainable parameters of the backbone "
            f"({sum(map(size, others.values())):,} values) are not saved with "
            f"{listed(repr(d.name) for d in deltas)}: freeze them with freeze_module(), or name "
            "those that belong to it in freeze_module(exclude=[...]) or unfrozen_modules=[...]",
            UnsavedWarning,
        )
    warn_of_untrained(backbone, "is not saved with the delta")
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise DeltaError(
                f"{name} is to be saved with the deltas, and gets its values in its module's first "
                "forward: run the model once, then save"
            )
        if in_parts(tensor):
            raise DeltaError(
                f"{name} is quantised or sparse ({type(tensor).__name__}), and cannot be saved "
                "with the deltas; take it out of unfrozen_modules or freeze_module(exclude=...)"
            )
        where, _, key = name.rpartition(".")
        kept = merged.original(where, backbone.modules[where], key, "saving")
        named[name] = tensor if kept is None else kept.to(tensor)
    return named
