"""Fold deltas into the weights of their modules, and take them out again bit for bit.

A stack folds from the bottom: a layer can be written into the weight only if all layers beneath it
are. Merged layers stay on their stack and no longer act. The stack keeps the old weights."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .._backbone.backbone import Backbone
from .._layers.base import Acts, DeltaLayer
from .._layers.record import Record
from .._layers.selection import Moment
from .._modules.tensors import lasting
from .._show.notebooks import InNotebooks
from .._sites.blocks import has_blocks, in_block, unmerged
from .._sites.merged import Named, check_unchanged, fold_into, undo
from .._sites.stack import Stack, Step
from ..errors import SiteError, to_the_end
from . import mergeable


@dataclass(frozen=True)
class MergeReport(InNotebooks):
    """The result of `merge`.

    Attributes:
        merged: {full name of a module: names of the deltas in its weight now, the innermost first}.
        left: {full name of a module: names of the deltas that still act outside its weight}.
        errors: {full name of a quantised module: |requantised - exact| / |exact - before|}.
    """

    merged: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        merged = Counter(", ".join(names) for names in self.merged.values())
        left = Counter(", ".join(names) for names in self.left.values())
        lines = [f"merged into {count} modules: {names}" for names, count in merged.items()]
        lines += [f"still acting on {count} modules: {names}" for names, count in left.items()]
        lines += [f"{where}: relative error {e:.1e}" for where, e in self.errors.items()]
        return "\n".join(lines)


def foldable_run(
    stack: Stack,
) -> tuple[list[Named], Named | None]:
    """Return the layers that can be merged now, and the first layer that cannot, or None.

    The innermost layer comes first.
    """
    layers = _in_sequence(stack)
    stops = (n for n, (_, ly) in enumerate(layers) if not (ly.folds and ly.record.active))
    count = next(stops, len(layers))
    while (shared := _shared(stack, layers, count)) is not None:
        count = shared
    return layers[:count], layers[count] if count < len(layers) else None


def _in_sequence(stack: Stack) -> list[Named]:
    """Return the layers that are not merged, the innermost first."""
    return [(ly.record.name, ly) for ly in unmerged(stack) if ly.acts is not Acts.SERVES]


def _shared(stack: Stack, layers: list[Named], count: int) -> int | None:
    """Return which of the first `count` layers has a delta that a block after them has too."""
    if not has_blocks(stack):
        return None
    after = {name for _, layer in layers[count:] for name in in_block(stack, layer)}
    inside = enumerate(in_block(stack, layer) for _, layer in layers[:count])
    return next((number for number, held in inside if after.intersection(held)), None)


def _runs_to_merge(backbone: Backbone, wanted: Collection[Record] | None) -> dict[str, list[Named]]:
    """Return {full name of a site: the layers to merge there, the innermost first}.

    Args:
        wanted: the deltas to merge whole. None: merge all layers that can be merged.

    Raises:
        SiteError: a wanted layer does not fold, or a layer beneath it does not; or nothing folds.
    """
    runs, stopped, users = {}, "", mergeable.users_of(backbone)
    for where, stack in backbone.stacks.items():
        run, stop = foldable_run(stack)
        if stop is not None and not stopped:
            stopped = f"; {_refusal(where, *stop, *stop)}"
        if wanted is not None:
            run = _needed(where, stack, run, stop, wanted)
        if run:
            mergeable.check_module(backbone, where, run, users)
            runs[where] = run
    if not runs:
        raise SiteError(
            "nothing to merge: "
            + (
                "all of it is merged"
                if any(stack.steps for stack in backbone.stacks.values())
                else f"no delta at the bottom of a stack folds into a weight{stopped}"
            )
        )
    return runs


def run_of(stack: Stack) -> list[Named]:
    """Return the layers that a plain model has in its weights, the innermost first."""
    acting = [ly for ly in unmerged(stack) if ly.record.active]
    return [(ly.record.name, ly) for ly in acting if ly.acts.in_the_weights]


def _needed(
    where: str,
    stack: Stack,
    run: list[Named],
    stop: Named | None,
    wanted: Collection[Record],
) -> list[Named]:
    """Return the part of `run` to merge for all of `wanted`; raise if that is not possible."""
    names = {name for name, layer in stack.in_order() if layer.record in wanted}
    names = {n for n in names if n not in stack.merged() and stack[n].acts is not Acts.SERVES}
    in_run = [name for name, _ in run]
    held = {n: name for name, ly in (*run, *([stop] if stop else [])) for n in in_block(stack, ly)}
    for name in sorted(names - set(in_run)):
        block = held.get(name, name)
        if block in names and block != name:
            continue
        if stop is None and block == name:
            raise SiteError(
                f"{where!r}: {name!r} is disabled, or nothing in it acts: enable it, or detach it",
                where=where,
            )
        if block != name:
            raise SiteError(
                f"{where!r}: {name!r} is in the block {block!r}: merge that", where=where
            )
        assert stop is not None
        raise SiteError(_refusal(where, name, stack[name], *stop), where=where)  # type: ignore[arg-type]
    last = max((in_run.index(name) for name in names), default=-1)
    for other in in_run[: last + 1]:
        if other not in names:
            asked = ", ".join(map(repr, sorted(names)))
            raise SiteError(
                f"{where!r}: {other!r} acts beneath {asked} and would no longer; merge it too, or "
                "reorder the composition first",
                where=where,
            )
    if last >= 0 and _shared(stack, _in_sequence(stack), last + 1) is not None:
        name, layer = run[last]
        raise SiteError(_refusal(where, name, layer, name, layer), where=where)
    return run[: last + 1]


def _refusal(where: str, name: str, layer: DeltaLayer, stop: str, blocker: DeltaLayer) -> str:
    def what(which: DeltaLayer) -> str:
        if not which.record.active:
            return "is disabled: enable it, or detach it"
        if which.folds:
            return "shares a delta with a block that would not be merged: detach one of the two"
        return _unfolded(which)

    if name == stop:
        return f"{where!r}: {name!r} {what(blocker)}"
    return f"{where!r}: {name!r} stands on {stop!r}, which {what(blocker)}"


def _unfolded(layer: DeltaLayer) -> str:
    """Return a text that the layer does not fold, with the reason if the class can fold."""
    why = "its gate goes by what it reads" if layer.gate is not None else layer.why_not
    why = why if layer.is_block or type(layer).can_fold() else ""
    kind = type(getattr(layer, "layer", layer)).__name__
    return f"({kind}) does not fold into a weight" + f" ({why})" * (why != "")


@lasting()
def merge(backbone: Backbone, wanted: Collection[Record] | None = None) -> MergeReport:
    """Fold deltas into the weights; see `Composition.merge`."""
    backbone.require_unrouted("cannot merge")
    backbone.recall()
    mergeable.check_in_place(backbone, wanted)
    runs = _runs_to_merge(backbone, wanted)
    mergeable.check_acting(backbone, runs)
    read = mergeable.read_beside(backbone, runs)
    report = MergeReport()
    steps = {where: _step(backbone.stacks[where], run) for where, run in runs.items()}
    if steps:
        _note_merge(backbone)
    try:
        for where, run in runs.items():
            error = fold_into(where, backbone.modules[where], run, steps[where])
            mergeable.check_unread(
                where, backbone.modules[where], steps[where], read.get(where, set())
            )
            backbone.stacks[where].steps.append(steps[where])
            for layer in steps[where].layers.values():
                layer.record.merged.add(steps[where])
            report.errors.update({} if error is None else {where: error})
    except BaseException:  # Ctrl-C, too
        for where, step in steps.items():
            undo(backbone.modules[where], backbone.stacks[where], step)
        raise
    for where, stack in backbone.stacks.items():
        for layer in steps[where].layers.values() if where in steps else ():
            layer.record.enabled = layer.record.active  # it may act just in an open block
        if merged := stack.merged():
            report.merged[where] = merged
        acting = [
            n for n, ly in stack.in_order() if ly.record.active and ly.acts is not Acts.SERVES
        ]
        if left := [name for name in acting if name not in merged]:
            report.left[where] = left
    return report


def _step(stack: Stack, run: Sequence[Named]) -> Step:
    """Return the merge of a run on one module: with all deltas in its blocks."""
    return Step({n: ly for _, layer in run for n, ly in in_block(stack, layer).items()})


def check_whole(backbone: Backbone, copies: Mapping[str, nn.Module]) -> None:
    """Raise unless all active layers can be in the weights after a merge.

    Args:
        copies: {full name of a module: what comes in its place, with parameters of its own}.

    Raises:
        SiteError: an active layer does not fold, or was lost; the message names the first.
    """
    mergeable.check_in_place(backbone)
    users, runs = mergeable.users_of(backbone, copies), {}
    for where, stack in backbone.stacks.items():
        run = run_of(stack)
        for name, layer in run:
            if not layer.folds:
                raise SiteError(
                    f"{where!r}: {name!r} {_unfolded(layer)}, so no plain model computes the same; "
                    "disable it to leave it out",
                    where=where,
                )
        if run:
            mergeable.check_module(backbone, where, run, users, stays=False)
            runs[where] = run
    mergeable.check_acting(backbone, runs)


def unmerge(backbone: Backbone) -> None:
    """Put back the weights from before the merge; see `Composition.unmerge`."""
    for where, stack in backbone.stacks.items():
        for key in dict.fromkeys(key for step in stack.steps for key in step.marks):
            check_unchanged(where, backbone.modules[where], stack, key, "unmerging")
    if any(stack.steps for stack in backbone.stacks.values()):
        _note_merge(backbone)
    to_the_end(functools.partial(_undo_all, backbone))


def _note_merge(backbone: Backbone) -> None:
    """Let the blocks that are open in other threads and tasks know that weights change."""
    moment = Moment()
    for record in backbone.records():
        record.shared.merged = moment


def _undo_all(backbone: Backbone) -> None:
    for where, stack in backbone.stacks.items():
        for step in reversed(stack.steps.copy()):
            undo(backbone.modules[where], stack, step)
