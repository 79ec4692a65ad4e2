"""Fold deltas into the weights of their modules, and take them out again bit for bit.

A stack folds from the bottom: a layer can be written into the weight only if everything beneath it
is. Merged layers stay on their stack, with the weights as they were, and no longer act.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import comparing, products, quantised
from .addressing import Survey
from .bases import DeltaLayer, Params, WeightLayer
from .errors import DeltaError, SiteError
from .layers import is_sharded
from .products import LowRank
from .record import Record
from .site import Stack, Step, stack_of

Named = tuple[str, DeltaLayer]


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        merged: {full name of a module: names of the deltas in its weight now, the innermost first}.
        left: {full name of a module: names of the deltas that still act there, by themselves}.
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
    planned, stopped, users = {}, "", _users(found)
    for where, stack in found.stacks.items():
        run, stop = foldable_run(stack)
        if stop is not None and not stopped:
            stopped = f"; {_refusal(where, *stop, *stop)}"
        if wanted is not None:
            run = _needed(where, stack, run, stop, wanted)
        if run:
            _check_module(found, where, run, users)
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


def _users(found: Survey) -> dict[int, list[str]]:
    """{id of a parameter: the full names of the modules that have it}."""
    users: dict[int, list[str]] = {}
    for name, module in found.modules.items():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    return users


def _check_module(found: Survey, where: str, run: list[Named], users: dict[int, list[str]]) -> None:
    """Raise if the weights of a module cannot be changed for this module alone."""
    module = found.modules[where]
    names = ", ".join(name for name, _ in run)
    what = f"{where!r} ({type(module).__name__}): {names} cannot be merged"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise SiteError(
            f"{what}: its max_norm shortens the weight whenever it runs, and would shorten the "
            "merged changes along; set it to None, once it has run on all of the weight"
        )
    for key, parameter in module._parameters.items():
        if parameter is None or key not in ("weight", "bias"):
            continue
        for other in users[id(parameter)]:
            if found.modules[other] is not module:
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
    check_unrouted(found, "cannot merge")
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
        acting = [n for n, ly in stack.in_order() if ly.record.active and ly.flow != "none"]
        if left := [name for name in acting if name not in merged]:
            report.left[where] = left
    return report


def check_whole(found: Survey) -> None:
    """Raise unless all that acts is in the weights, once it is merged.

    Raises:
        SiteError: names the first that does not fold.
    """
    users = _users(found)
    for where, stack in found.stacks.items():
        for name, layer in stack.in_order():
            aside = layer.flow in ("none", "instead") or not layer.record.active
            if not aside and not layer.folds:
                raise SiteError(
                    f"{where!r}: {name!r} {_unfolded(layer)}, so no plain model computes the same; "
                    "disable it to leave it out"
                )
        acting = [(n, ly) for n, ly in stack.in_order() if ly.record.active]
        run = [(name, layer) for name, layer in acting if layer.flow not in ("none", "instead")]
        if run:
            _check_module(found, where, run, users)


@torch.no_grad()
def fold_into(where: str, module: nn.Module, run: list[Named]) -> tuple[Step, float | None]:
    """Fold layers into the weights of a module; the step that undoes it, and a weight's error."""
    step, error, folded = Step(dict(run)), None, {}
    for key, (new, blocks) in _new_values(where, module, list(step.layers.values())).items():
        bits = 0
        for block in blocks:  # each is checked while the processor's cache still holds it
            if not comparing.is_finite(block):
                raise SiteError(
                    f"{where!r}: merging {', '.join(step.layers)} gives a {key} with values that "
                    "are not finite; check the delta's tensors and its scale"
                )
            bits += _bits(block)
        folded[key] = new, bits
    for key, (new, bits) in folded.items():
        if quantised.is_plain(module._parameters[key]):
            step.kept[key], step.marks[key] = quantised.replace(module, key, new), bits % 2**64
            continue
        change = (new - quantised.in_full(module, key)).norm().clamp_min(1e-30)
        step.kept[key] = quantised.replace(module, key, new)
        step.marks[key] = _mark(module._parameters[key])
        error = float((quantised.in_full(module, key) - new).norm() / change)
    return step, error


def _new_values(
    where: str, module: nn.Module, layers: list[Any]
) -> dict[str, tuple[Tensor, Iterable[Tensor]]]:
    """{name of a parameter that changes: its new values, and the same in blocks}.

    What is yet to be computed is computed as the blocks are read. Values are in the parameter's
    dtype, or in float32 where it is quantised.
    """
    if run := _low_rank(module, layers):
        weight: Any = module._parameters["weight"]
        kind: Any = layers[0].kind
        new = torch.empty_like(weight)
        return {"weight": (new, products.add_to_weight(kind.matrix(weight), kind.matrix(new), run))}
    own = {key: p for key, p in module._parameters.items() if key in ("weight", "bias")}
    exact: Params = {k: quantised.in_full(module, k) for k, p in own.items() if p is not None}
    folded = exact
    try:
        for layer in layers:
            folded = layer.fold(folded)
    except KeyError as error:
        if error.args[0] not in {"weight", "bias"} - exact.keys():
            raise
        raise SiteError(
            f"{where!r} ({type(module).__name__}): its {error.args[0]} is no parameter of its own, "
            "as of a parametrized module: remove the parametrization, or merge the deltas elsewhere"
        ) from None
    changed = {key: tensor for key, tensor in folded.items() if tensor is not exact[key]}
    rounded = {key: tensor.to(_float_of(own[key])) for key, tensor in changed.items()}
    return {key: (tensor, [tensor]) for key, tensor in rounded.items()}


def _low_rank(module: nn.Module, layers: list[Any]) -> list[LowRank]:
    """The changes of a plain weight that are all the layers make; empty where they do more."""
    weight: Any = module._parameters.get("weight")
    if not quantised.is_plain(weight) or not weight.is_contiguous():
        return []
    if any(type(layer).fold is not WeightLayer.fold for layer in layers):
        return []
    run = [layer.low_rank() for layer in layers]
    return [] if None in run else run


def _float_of(parameter: Any) -> torch.dtype:
    """What new values of a parameter are rounded to; float32 where it is quantised."""
    return parameter.dtype if quantised.is_plain(parameter) else torch.float32


def _mark(parameter: Any) -> int:
    """A number that tells whether the bits of a parameter changed."""
    return _bits(parameter) % 2**64 if quantised.is_plain(parameter) else id(parameter)


def _bits(tensor: Tensor) -> int:
    """The sum over a tensor's 8-byte words and the bytes that are left, up to multiples of 2^64."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    if rest := flat.numel() * flat.element_size() % 8:
        flat = flat.view(torch.uint8)
        return int(flat[:-rest].view(torch.int64).sum()) + int(flat[-rest:].sum())
    return int(flat.view(torch.int64).sum())


# ---------------------------------------------------------------------------------------- restoring
def unmerge(found: Survey) -> None:
    """Put the weights back as they were before; see `Composition.unmerge`."""
    for where, stack in found.stacks.items():
        for key in dict.fromkeys(key for step in stack.steps for key in step.marks):
            _check_unchanged(where, found.modules[where], stack, key, "unmerging")
    for where, stack in found.stacks.items():
        while stack.steps:
            _undo(found.modules[where], stack)


def _check_unchanged(where: str, module: nn.Module, stack: Stack, key: str, what: str) -> None:
    """Raise if a merged parameter was changed since, which `what` would lose."""
    newest = [step.marks[key] for step in stack.steps if key in step.marks][-1]
    if _mark(module._parameters[key]) != newest:
        raise DeltaError(
            f"{where}.{key} was changed after the merge, and {what} would lose that; "
            "merge after training and loading, or keep the merged model as it is"
        )


def _undo(module: nn.Module, stack: Stack) -> None:
    """Undo the last step of merging on one site."""
    step = stack.steps.pop()
    for key, kept in step.kept.items():
        quantised.put_back(module, key, kept)
    for layer in step.layers.values():
        layer.record.merged -= 1


def kept(found: Survey, where: str, key: str, what: str = "") -> Tensor | None:
    """A parameter's values from before all merging; None if nothing merged changed them.

    Also None for one that is quantised.

    Args:
        what: what would lose it if the parameter was changed since; "" asks for no such error.

    Raises:
        DeltaError: it was.
    """
    module = found.modules.get(where)
    stack = None if module is None else stack_of(module)
    steps = stack.steps if stack is not None else []
    values = next((step.kept[key] for step in steps if key in step.kept), None)
    if not isinstance(values, Tensor):
        return None
    if what:
        _check_unchanged(where, module, stack, key, what)  # type: ignore[arg-type]
    return values


def check_unrouted(found: Survey, verb: str) -> None:
    """Raise if the rows of batches take different deltas now.

    Raises:
        DeltaError: they do.
    """
    if any(stack.routed is not None for stack in found.stacks.values()):
        raise DeltaError(
            f"{verb} inside opendelta.route(), where rows take different deltas: do so before or "
            "after its block"
        )


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


def check_beneath(found: Survey, layers: Mapping[str, DeltaLayer], order: list[Record]) -> None:
    """Raise if new layers would act beneath merged ones, which the weights already hold.

    Args:
        layers: the new layers by full name of their site.
        order: all deltas, as they are to act.

    Raises:
        DeltaError: they would; sums have no order.
    """
    for where, layer in layers.items():
        stack = found.stacks.get(where)
        for name in stack.merged() if stack is not None and layer.flow != "none" else ():
            over: Any = stack[name]  # type: ignore[index]
            places = order.index(layer.record), order.index(over.record)
            if layer.flow == "instead" or (
                places[0] < places[1] and {layer.flow, over.flow} != {"beside"}
            ):
                check_apart(over.record, f"cannot put {layer.record.name!r} beneath")
