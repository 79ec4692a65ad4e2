"""Gather all that a folder, and a model, tell of a composition."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._checkpoint import hub
from .._checkpoint.contents import Contents, contents, described
from .._checkpoint.saving import facts_of
from .._files.reading import as_path, check_link, parsed
from .._handles.composition import composition
from .._handles.load import LoadReport, load
from .._show.explaining import explain
from .._show.tree import ModelTree
from .._verbs.copying import shared_copy
from ..errors import DeltaError, OptionError, UncheckedWarning, kept_warnings
from .comparison import Comparison
from .composition_report import LABELS, CompositionReport
from .norms import norms, of_tensors


def report(
    folder_or_model: str | os.PathLike | nn.Module, model: nn.Module | None = None
) -> CompositionReport:
    """Tell of a composition all that can be known: for a page that explains it to others.

    The report has the deltas in their order, with options and sizes, the norm of what each layer
    changes, and facts of the training. With a model it also has the tree, the formulas, the changes
    of weights next to the weights, and whether the deltas were trained on this model.

    Args:
        folder_or_model: a saved composition, as for `load`: a folder, or "user/name" on the hub; or
            a model with deltas.
        model: a model for the deltas of the folder. It stays as it is, and its own deltas have no
            part in the report. One on the meta device gives the tree and the formulas.

    Raises:
        DeltaLoadError: the folder is damaged, or does not fit the model.
        DeltaError: the model has no deltas.
        OptionError: an argument is something else.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lora = opendelta.LoraModel(model, modified_modules=["0"], lora_r=2)
        >>> found = opendelta.report(model)
        >>> found.sites[0].formula
        'y = 0(x) + lora(x)'
        >>> found.save("report.html")  # doctest: +SKIP
    """
    if isinstance(folder_or_model, nn.Module):
        if model is not None:
            raise OptionError("report(model) takes no second model; give a folder as the first")
        name = type(folder_or_model).__name__
        live = _of_model(folder_or_model)
        return CompositionReport(source=name, format="", backbone=name, bytes=None, **live)
    if model is not None and not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, not {model!r}")
    given = os.fspath(as_path(folder_or_model, "folder_or_model"))
    held, folder = contents(given, values=True), Path(hub.folder_of(given))
    facts: dict[str, Any] = {"model": "", "deltas": held.deltas, "sites": [], "not_measured": []}
    found = None
    if model is not None:
        copied, found = _loaded(given, model)
        facts = _of_model(copied)
    facts |= {
        "norms": facts.get("norms") or of_tensors(held.values),
        "source": given,
        "format": held.format,
        "backbone": held.backbone or held.model,
        "parameters": sum(tensor.numel() for tensor in held.values.values()),
        "tensors": len(held.values),
        "bytes": held.bytes,
    }
    return CompositionReport(
        **facts,
        backbone_check=_check(held, found),
        training=_beside(folder, "training.json", _training) or {},
        comparison=_beside(folder, "report.json", _comparison),
    )


def _loaded(folder: str, model: nn.Module) -> tuple[nn.Module, LoadReport]:
    """Return a copy of a model, over the same tensors, with the deltas of a folder.

    Raises:
        DeltaLoadError: they do not fit.
    """
    copied = shared_copy(model)
    with kept_warnings(UncheckedWarning):  # the report says what was not compared
        found = load(folder, copied, strict=False)
        if not found:
            load(folder, copied, check_backbone=False)
    return copied, found


def _check(held: Contents, found: LoadReport | None) -> dict[str, Any]:
    """Return what the fingerprint says of the model; None: there is no model."""
    count = held.fingerprint
    status, why = "not compared", f"the folder knows {count or 'no'} weights under the deltas"
    names = {key: getattr(found, key, []) for key in ("differing", "same", "unread")}
    if found is None:
        why = f"no model was given; {why}"
    elif found.differing:
        status = "differing"
        why = f"{len(found.differing)} of {count} weights under the deltas differ"
    elif found.same:
        rest = f"; {len(found.unread)} were not compared" if found.unread else ""
        status = "same"
        why = f"{len(found.same)} weights under the deltas are those of the training{rest}"
    elif found.unread:
        why = "the values of the model are not there"
    return {"status": status, "why": why, **names}


def _of_model(model: nn.Module) -> dict[str, Any]:
    """Return what a model with deltas tells.

    Raises:
        DeltaError: it has none.
    """
    backbone, not_measured = Backbone.of(model), list[str]()
    own = {delta: {id(p): p for p in delta.parameters()} for delta in composition(model)}
    if not own:
        raise DeltaError(f"no delta is attached to {type(model).__name__}: nothing to report")
    tensors = {key: p for each in own.values() for key, p in each.items()}
    counts = {delta: sum(p.numel() for p in each.values()) for delta, each in own.items()}
    where = dict.fromkeys(at for at, _, layer in backbone.delta_layers() if layer.computes)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in tensors.values()),
        "tensors": len(tensors),
        "deltas": [
            {**described(facts_of(delta), delta.config, count), "merged": bool(delta.record.merged)}
            for delta, count in counts.items()
        ],
        "sites": [explain(backbone, name) for name in where],
        "norms": [] if backbone.is_meta else norms(backbone, not_measured),
        "not_measured": not_measured,
        "tree": ModelTree(model),
    }


# --------------------------------------------------------------------------------- the training
def _beside(folder: Path, name: str, read: Callable[[Any], Any]) -> Any:
    """Return what `read` makes of a JSON file in a folder, or in the one around it.

    None: there is no such file, or another program wrote it.
    """
    for path in (folder / name, folder.absolute().parent / name):
        with contextlib.suppress(Exception):
            check_link(path)
            return read(parsed(path))
    return None


def _training(given: dict[str, Any]) -> dict[str, Any]:
    float(given["score"])
    return {key: given[key] for key in LABELS if given.get(key) is not None}


def _comparison(given: dict[str, Any]) -> Comparison:
    found = Comparison.from_dict(given)
    str(found)
    return found
