"""Fold deltas into the weights of their modules, and take them out again bit for bit.

A stack folds from the bottom: a layer can be written into the weight only if everything beneath it
is. Merged layers stay on their stack, with the weights as they were, and no longer act.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import comparing, quantised
from .addressing import Survey
from .bases import DeltaLayer, Params
from .errors import DeltaError, SiteError
from .layers import is_sharded
from .record import Record
from .site import Stack, Step

Named = tuple[str, DeltaLayer]


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        merged: {full name of a module: names of the deltas in its weight now, the innermost first}.
        left: {full name of a module: names of the deltas that act on top of it}.
        errors: {full name of a quantised module: |requantised - exact| / |exact - before|}.
    """

    merged: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        merged = Counter(", ".join(names) for names in self.merged.values())
        left = Counter(", ".join(names) for names in self.left.values())
        lines = [f"merged into {count} modules: {names}" for names, count in merged.items()]
        lines += [f"acting on top of {count} modules: {names}" for names, count in left.items()]
        lines += [f"{where}: relative error {e:.1e}" for where, e in self.errors.items()]
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------- planning
def foldable_run(
    stack: Stack,
) -> tuple[list[Named], Named | None]:
    """The layers that can be merged now, the innermost first, and the one that stops them."""
    run: list[Named] = []
    for name, layer in stack.in_order():
        if name in stack.merged() or layer.flow == "none":
            continue
        if not layer.folds or not layer.record.active:
            return run, (name, layer)
        run.append((name, layer))
    return run, None


def plan(found: Survey, wanted: Collection[Record] | None) -> dict[str, list[Named]]:
    """{full name of the site: the layers to merge there, the innermost first}.

    Args:
        wanted: the deltas to merge whole. None: what can be merged.

    Raises:
        SiteError: one of them does not fold, or stands on one that does not; or nothing folds.
    """
    planned, stopped = {}, ""
    for where, stack in found.stacks.items():
        run, stop = foldable_run(stack)
        if stop is not None and not stopped:
            stopped = f"; {_refusal(where, *stop, *stop)}"
        if wanted is not None:
            run = _needed(where, stack, run, stop, wanted)
        if run:
            _check_module(found, where, run)
            planned[where] = run
    if not planned:
        raise SiteError(
            "nothing to merge: "
            + (
                "all of it is merged"
                if any(stack.steps for stack in found.stacks.values())
                else f"no delta at the bottom of a stack folds into a weight{stopped}"
            )
        )
    return planned


def _needed(
    where: str,
    stack: Stack,
    run: list[Named],
    stop: Named | None,
    wanted: Collection[Record],
) -> list[Named]:
    """The part of `run` that merging all of `wanted` takes."""
    names = {name for name, layer in stack.in_order() if layer.record in wanted}
    names = {n for n in names if n not in stack.merged() and stack[n].flow != "none"}
    in_run = [name for name, _ in run]
    for name in names - set(in_run):
        assert stop is not None
        raise SiteError(_refusal(where, name, stack[name], *stop))  # type: ignore[arg-type]
    last = max((in_run.index(name) for name in names), default=-1)
    for other in in_run[: last + 1]:
        if other not in names:
            asked = ", ".join(map(repr, sorted(names)))
            raise SiteError(
                f"{where!r}: {other!r} acts beneath {asked} and would no longer; merge it too, or "
                "reorder the composition first"
            )
    return run[: last + 1]


def _refusal(where: str, name: str, layer: DeltaLayer, stop: str, blocker: DeltaLayer) -> str:
    def what(which: DeltaLayer) -> str:
        if not which.record.active:
            return "is disabled: enable it, or detach it"
        return _unfolded(which)

    if name == stop:
        return f"{where!r}: {name!r} {what(layer)}"
    return f"{where!r}: {name!r} stands on {stop!r}, which {what(blocker)}"


def _unfolded(layer: DeltaLayer) -> str:
    """That a layer does not fold, and what of it or its module keeps it from that."""
    why = "its gate goes by what it reads" if layer.gate is not None else layer.why_not
    able = type(layer).fold is not DeltaLayer.fold
    return f"({type(layer).__name__}) does not fold into a weight" + f" ({why})" * (
        able and why != ""
    )


def _check_module(found: Survey, where: str, run: list[Named]) -> None:
    """Raise if the weights of a module cannot be changed for this module alone."""
    module = found.modules[where]
    names = ", ".join(name for name, _ in run)
    what = f"{where!r} ({type(module).__name__}): {names} cannot be merged"
    for key, parameter in module._parameters.items():
        if parameter is None or key not in ("weight", "bias"):
            continue
        for other, user in found.modules.items():
            shared = any(p is parameter for p in user._parameters.values())
            if shared and user is not module:
                raise SiteError(
                    f"{what}: its {key} is tied to that of {other!r}, which would change too"
                )
        if is_sharded(parameter):
            raise SiteError(f"{what}: its {key} is sharded; merge before sharding")
        if parameter.is_meta:
            raise SiteError(f"{what}: its {key} is on the meta device, without values")


# ------------------------------------------------------------------------------------------ merging
def merge(found: Survey, wanted: Collection[Record] | None = None) -> MergeReport:
    """Fold deltas into the weights; see `Composition.merge`."""
    planned = plan(found, wanted)
    report = MergeReport()
    done: list[str] = []
    try:
        for where, run in planned.items():
            step, error = fold_into(where, found.modules[where], run)
            found.stacks[where].steps.append(step)
            done.append(where)
            for _, layer in run:
                layer.record.merged += 1
            report.errors.update({} if error is None else {where: error})
    except BaseException:
        for where in done:
            _undo(found.modules[where], found.stacks[where])
        raise
    for where, stack in found.stacks.items():
        if merged := stack.merged():
            report.merged[where] = merged
            left = [n for n, ly in stack.in_order() if n not in merged and ly.flow != "none"]
            report.left.update({where: left} if left else {})
    return report


def check_whole(found: Survey) -> None:
    """Raise unless all that acts is in the weights, once it is merged.

    Raises:
        SiteError: names the first that does not fold.
    """
    for where, stack in found.stacks.items():
        for name, layer in stack.in_order():
            aside = layer.flow in ("none", "instead") or not layer.record.active
            if not aside and not layer.folds:
                raise SiteError(
                    f"{where!r}: {name!r} {_unfolded(layer)}, so no plain model computes the same; "
                    "disable it to leave it out"
                )
        run = [(n, ly) for n, ly in stack.in_order() if ly.flow not in ("none", "instead")]
        if run:
            _check_module(found, where, run)


@torch.no_grad()
def fold_into(where: str, module: nn.Module, run: list[Named]) -> tuple[Step, float | None]:
    """Fold layers into the weights of a module; the step that undoes it, and a weight's error."""
    own = {key: p for key, p in module._parameters.items() if key in ("weight", "bias")}
    exact: Params = {k: quantised.in_full(module, k) for k, p in own.items() if p is not None}
    folded, step = dict(exact), Step(dict(run))
    for _, layer in run:
        folded = layer.fold(folded)
    error = None
    changed = {key: tensor for key, tensor in folded.items() if tensor is not exact[key]}
    rounded = {key: tensor.to(_float_of(own[key])) for key, tensor in changed.items()}
    for key, tensor in rounded.items():
        if not comparing.is_finite(tensor):
            raise SiteError(
                f"{where!r}: merging {', '.join(step.layers)} gives a {key} with values that are "
                "not finite; check the delta's tensors and its scale"
            )
    for key, tensor in changed.items():
        plain = quantised.is_plain(own[key])
        step.kept[key] = quantised.replace(module, key, rounded[key])
        step.marks[key] = _mark(module._parameters[key])
        if not plain:
            change = (tensor - exact[key]).norm().clamp_min(1e-30)
            error = float((quantised.in_full(module, key) - tensor).norm() / change)
    return step, error


def _float_of(parameter: Any) -> torch.dtype:
    """What new values of a parameter are rounded to; float32 where it is quantised."""
    return parameter.dtype if quantised.is_plain(parameter) else torch.float32


def _mark(tensor: Any) -> int:
    """A number that tells whether the bits of a tensor changed."""
    if not quantised.is_plain(tensor):
        return id(tensor)
    flat = tensor.detach().contiguous().reshape(-1)
    if (flat.storage_offset() * flat.element_size()) % 8:
        flat = flat.clone()
    flat = flat.view(torch.uint8)
    words = flat.numel() // 8 * 8
    rest = int(flat[words:].sum(dtype=torch.int64))
    return int(flat[:words].view(torch.int64).sum()) + rest


# ---------------------------------------------------------------------------------------- restoring
def unmerge(found: Survey) -> None:
    """Put the weights back as they were before; see `Composition.unmerge`."""
    for where, stack in found.stacks.items():
        now = {key: mark for step in stack.steps for key, mark in step.marks.items()}
        for key, mark in now.items():
            if _mark(found.modules[where]._parameters[key]) != mark:
                raise DeltaError(
                    f"{where}.{key} was changed after the merge, and unmerging would lose that; "
                    "merge after training and loading, or keep the merged model as it is"
                )
    for where, stack in found.stacks.items():
        while stack.steps:
            _undo(found.modules[where], stack)


def _undo(module: nn.Module, stack: Stack) -> None:
    """Undo the last step of merging on one site."""
    step = stack.steps.pop()
    for key, kept in step.kept.items():
        quantised.put_back(module, key, kept)
    for layer in step.layers.values():
        layer.record.merged -= 1


def check_apart(record: Record, verb: str) -> None:
    """Raise if a delta is merged: its layers are in the weights, and do as those do.

    Raises:
        DeltaError: it is.
    """
    if record.merged:
        raise DeltaError(
            f"{verb} {record.name!r}: it is merged into the weights of {record.merged} modules; "
            "call composition(model).unmerge() first"
        )
