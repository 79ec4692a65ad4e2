"""Load deltas from a folder or the hub onto a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from .._backbone.inputs import Samples
from .._checkpoint import hub, loading
from .._show.notebooks import InNotebooks
from ..errors import DeltaLoadError, printable
from .composition import Composition, Model


@dataclass(frozen=True)
class LoadReport(InNotebooks):
    """The result of `load(..., strict=False)`; true if the deltas are on the model.

    If tensors do not fit, the fields from `missing` on name them, as `DeltaLoadError.details` does.

    Attributes:
        names: the deltas that were put on the model.
        problem: why no delta was put on the model, in words; None: all were.
        saved_from: the class of the model that the deltas were saved from; None if unknown.
        other_config: {setting that differs: (its value in that model's config, its value here)}.
        missing: the tensors that the file lacks.
        unexpected: the tensors in the file that the deltas do not have.
        misshaped: {tensor: (its shape in the file, the shape it must have)}.
        other_kind: {tensor: its dtype in the file} of floats for integers, or integers for floats.
        not_finite: a tensor with NaN or infinite values.
        differing: {weight of the backbone: how it differs from the weight at the training}.
        same: the weights under the deltas whose values are those of the training.
        unread: the weights under the deltas of which only names and shapes could be compared.
    """

    names: list[str]
    problem: str | None = None
    saved_from: str | None = None
    other_config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    other_kind: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        source = f", saved from a {self.saved_from}" if self.saved_from else ""
        other = [f"{k}={was!r} (here {now!r})" for k, (was, now) in self.other_config.items()]
        there = f" with {', '.join(other)}" if other else ""
        of = f"{len(self.unread)} of {len(self.same) + len(self.unread)}"
        unread = f"; the values of {of} weights under them were not compared" * bool(self.unread)
        loaded = f"loaded {', '.join(self.names)}{source}{there}{unread}"
        return printable(loaded if self else f"nothing was loaded: {self.problem}")


@overload
def load(
    folder: str | os.PathLike,
    model: Model,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    sample_inputs: Samples | None = None,
    absent: Sequence[str] = (),
    strict: Literal[True] = True,
) -> Composition[Model]: ...


@overload
def load(
    folder: str | os.PathLike,
    model: Model,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    sample_inputs: Samples | None = None,
    absent: Sequence[str] = (),
    strict: Literal[False],
) -> LoadReport: ...


@overload
def load(
    folder: str | os.PathLike,
    model: Model,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    sample_inputs: Samples | None = None,
    absent: Sequence[str] = (),
    strict: bool,
) -> Composition[Model] | LoadReport: ...


def load(
    folder: str | os.PathLike,
    model: Model,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    sample_inputs: Samples | None = None,
    absent: Sequence[str] = (),
    strict: bool = True,
) -> Composition[Model] | LoadReport:
    """Put the deltas that `composition(...).save` or `save_finetuned` wrote on `model`.

    They act after the deltas that are on the model, in their saved order, with their saved
    switches. A delta whose name is taken gets the next free name. Everything is compared before the
    model is touched. Folders of OpenDelta 0.3, PEFT and adapters are read too.

    Args:
        folder: the folder, or "user/name" on the hub.
        check_backbone: raise if the weights under the deltas differ from the weights that they were
            trained on. A few values of each weight are compared.
        local_files_only: use only files that were downloaded from the hub before.
        sample_inputs: inputs of the model, to find sizes by; see `Delta`.
        absent: full names of modules that the folder has deltas on and `model` lacks, being another
            stage of a pipeline. What is on them and inside them is left out.
        strict: if False, return a report instead of raising.

    Raises:
        DeltaLoadError: the folder is damaged, or does not fit `model`. Nothing is loaded then.
    """
    try:
        path = hub.folder_of(folder, local_files_only)
        loaded, source, compared = loading.load(
            path, model, check_backbone=check_backbone, samples=sample_inputs, absent=absent
        )
    except DeltaLoadError as error:
        if strict:
            raise
        return LoadReport([], str(error), **error.details)
    names = [delta.name for delta in loaded]
    if strict:
        return Composition(model)
    other = source.other_config(model)
    return LoadReport(
        names,
        saved_from=source.saved_from,
        other_config=other,
        same=compared.same,
        unread=compared.unread,
    )
