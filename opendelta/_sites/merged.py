"""Fold layers into the weights of their module, and put the weights back bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import low_rank
from .._layers.base import Acts, DeltaLayer, Params
from .._layers.low_rank import LowRank
from .._modules import probing, tensors, trials
from .._modules.kinds import Kind, Norm, is_packed, kind_of
from ..errors import DeltaError, SiteError
from . import marks
from .stack import Stack, Step, stack_of
from .swap import plain_class

Named = tuple[str, DeltaLayer]


@tensors.lasting()
@torch.no_grad()
def fold_into(where: str, module: nn.Module, run: list[Named], step: Step) -> float | None:
    """Fold layers into the weights of a module.

    Args:
        step: gets what is needed to undo it, before anything of the module changes.

    Returns:
        The relative error of a quantised weight, or None.
    """
    folded, factor = {}, factor_of(where, module, run)
    for key, (new, chunks) in _new_values(where, module, [ly for _, ly in run], factor).items():
        _check_axis(where, module, key)
        what = f"{where!r}: merging {', '.join(name for name, _ in run)} gives a {key}"
        folded[key] = new, marks.mark(_finite(where, what, chunks))
    error = None
    for key, (new, mark) in folded.items():
        step.originals[key], step.marks[key] = tensors.kept(module, key), mark
        if tensors.is_plain(module._parameters[key]):
            tensors.replace(module, key, new)
            continue
        change = (new - tensors.in_full(module, key)).norm().clamp_min(1e-30)
        tensors.replace(module, key, new)
        step.marks[key] = marks.mark_of(module, key)
        error = float((tensors.in_full(module, key) - new).norm() / change)
    return error


def _finite(where: str, what: str, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each chunk while the processor's cache holds it; raise if a value is not finite."""
    for chunk in chunks:
        if not tensors.is_finite(chunk):
            raise SiteError(
                f"{what} with values that are not finite; check the delta's tensors and its scale",
                where=where,
            )
        yield chunk


def _check_whole(where: str, module: nn.Module, run: list[Named]) -> None:
    """Raise if a process holds a part of the weight or bias alone."""
    for key in ("weight", "bias"):
        if tensors.is_sharded(module._parameters.get(key)):
            raise SiteError(
                f"{where!r} ({type(module).__name__}): {', '.join(name for name, _ in run)} cannot "
                f"be merged or combined: its {key} is sharded; merge before sharding",
                where=where,
            )


def factor_of(where: str, module: nn.Module, run: list[Named]) -> float:
    """Return the t of a module that computes t (W x) + b; 1.0 for all classes that are known.

    Raises:
        SiteError: the module computes something else, so no weight holds the layers.
        SiteError: its weight is packed, or sharded.
    """
    _check_whole(where, module, run)
    if is_packed(module):
        raise SiteError(
            f"{where!r} ({type(module).__name__}) keeps its weight packed in tensors of its own, "
            "and no other can be put there; merge into the model in full precision, then quantise "
            "it, or let the delta act as it is",
            where=where,
        )
    bare = trials.bare(module, plain_class(module))
    factor = probing.factor_of(bare)
    refused = [name for name, layer in run if factor is None or layer.sees_module]
    if factor == 1 or not refused:
        return factor  # type: ignore[return-value]
    why = (
        "has a forward of its own, and does not compute, from its input alone and in training too, "
        "its weight times the input plus its bias"
    )
    if factor is not None:
        why = f"multiplies its weight by {factor:.3g}, which layers that look at the weight miss"
    raise SiteError(
        f"{where!r} ({type(module).__name__}): {', '.join(refused)} cannot be merged or "
        f"combined: the module {why}, so no other weight computes the same. Let the delta act as "
        "it is",
        where=where,
    )


def check_kinds(where: str, module: nn.Module, layers: Iterable[Any]) -> None:
    """Raise if a layer was made for a module that computes otherwise than `module` does now.

    Args:
        layers: what may have a kind: delta layers.
    """
    now = kind_of(module)
    for layer in layers:
        was = getattr(layer, "kind", now)
        if isinstance(was, Kind) and was != now:
            raise SiteError(
                f"{where!r} ({type(module).__name__}): {layer.record.name} cannot be merged or "
                "combined: the module has changed since the layer was made, and now "
                f"{_change_of_kind(was, now)}. Make the delta on the model as it is now: save it, "
                "detach it, and load it",
                where=where,
            )


def _change_of_kind(was: Kind, now: Kind | None) -> str:
    """Return in words how a kind differs from what it was."""
    if type(was) is not type(now):
        return "stores its weight in another layout, or is of another kind"
    names = [field.name for field in dataclasses.fields(was)]
    values = [(name, getattr(was, name), getattr(now, name)) for name in names]
    other = [f"{name} {new} instead of {old}" for name, old, new in values if new != old]
    return f"has {', '.join(other)}"


def _check_axis(where: str, module: nn.Module, key: str) -> None:
    """Raise if a parameter of a normalisation acts otherwise than by channel."""
    bare = trials.bare(module, plain_class(module))
    if not isinstance(kind_of(module), Norm) or probing.is_known(type(bare)):
        return
    if not probing.acts_by_channel(bare, key):
        raise SiteError(
            f"{where!r} ({type(module).__name__}): its {key} does not act on each channel of the "
            "output alone, so no other one computes the same. Let the delta act unmerged",
            where=where,
        )


def _new_values(
    where: str, module: nn.Module, layers: list[Any], factor: float
) -> dict[str, tuple[Tensor, Iterable[Tensor]]]:
    """Return {name of a parameter that changes: (its new values, the same values in chunks)}.

    Reading the chunks computes the values. They are in the parameter's dtype; in float32 if it is
    quantised.
    """
    if factor == 1 and (run := _low_rank(module, layers)):
        weight: Any = module._parameters["weight"]
        kind: Any = layers[0].kind
        new = torch.empty_like(weight)
        return {"weight": (new, low_rank.add_to_weight(kind.matrix(weight), kind.matrix(new), run))}
    exact, folded = folded_params(where, module, layers, factor)
    changed = {key: tensor for key, tensor in folded.items() if tensor is not exact[key]}
    if factor != 1 and "weight" in changed:
        changed["weight"] = changed["weight"] / factor
    own = module._parameters
    for key in changed:
        if own.get(key) is None:
            raise _not_own(where, module, key)
    rounded = {key: tensor.to(_float_of(own[key])) for key, tensor in changed.items()}
    return {key: (tensor, [tensor]) for key, tensor in rounded.items()}


@torch.no_grad()
def changed_by(where: str, module: nn.Module, run: list[Named], factor: float) -> set[str]:
    """Return the names of the parameters that `fold_into` would change.

    Args:
        factor: the result of `factor_of`.
    """
    layers = [layer for _, layer in run]
    if any(parameter.is_meta for parameter in module._parameters.values() if parameter is not None):
        return {"weight", "bias"}
    if factor == 1 and _low_rank(module, layers):
        return {"weight"}
    exact, folded = folded_params(where, module, layers, factor)
    return {key for key in folded if folded[key] is not exact[key]}


def folded_params(
    where: str, module: nn.Module, layers: list[Any], factor: float
) -> tuple[Params, Params]:
    """Return the weight and bias of a module as they act, and the same with layers folded in.

    Args:
        factor: the result of `factor_of`.

    Raises:
        SiteError: a layer needs a weight that is no parameter of the module's own.
    """
    exact: Params = tensors.params_in_full(module)
    if factor != 1:
        if "weight" not in exact:
            raise _not_own(where, module, "weight")
        exact["weight"] = factor * exact["weight"]
    folded = exact
    try:
        for layer in layers:
            folded = _folded(where, layer, folded)
    except KeyError as error:
        if error.args[0] not in {"weight", "bias"} - exact.keys():
            raise
        raise _not_own(where, module, error.args[0]) from None
    return exact, folded


@torch.no_grad()
def change_of(where: str, module: nn.Module, layer: Any) -> tuple[Tensor, bool]:
    """Return the change of a module's weight by one layer alone, and if it changes the bias too.

    The change is [out, in], or of the form of a normalisation's weight, in at least float32.

    Raises:
        SiteError: the weight cannot be read, or the module has a forward of its own.
    """
    kind: Any = kind_of(module)
    factor, run = 1.0, [(layer.record.name, layer)]
    _check_whole(where, module, run)
    if layer.acts is not Acts.BESIDE:
        factor = factor_of(where, module, run)
    check_kinds(where, module, [layer])
    params, folded = folded_params(where, module, [layer], factor)
    biased = "bias" in params and not torch.equal(folded["bias"], params["bias"])
    if "weight" not in params:  # no parameter of the module's own, and `layer` did not need it
        return torch.zeros_like(kind.matrix(tensors.stored_params(module)["weight"])), biased
    return kind.matrix(folded["weight"]) - kind.matrix(params["weight"]), biased


def _not_own(where: str, module: nn.Module, key: str) -> SiteError:
    return SiteError(
        f"{where!r} ({type(module).__name__}): its {key} is no parameter of its own, as of a "
        "parametrized or pruned module, or is a buffer. Let the delta act as it is; or detach it, "
        "make that a parameter (such as by remove_parametrizations), and attach it again",
        where=where,
    )


def _folded(where: str, layer: DeltaLayer, params: Params) -> Params:
    """Return what `layer.fold` makes of `params`, if that can take their place.

    Raises:
        SiteError: an author's `fold` changes in place, or gives other names, shapes or things.
    """
    own = type(layer).__module__.startswith("opendelta.")
    given = params if own else {key: tensor.clone() for key, tensor in params.items()}
    folded = layer.fold(given)
    shapes = {key: tensor.shape for key, tensor in params.items()}
    good = isinstance(folded, dict) and shapes == {
        key: getattr(tensor, "shape", None) for key, tensor in folded.items()
    }
    untouched = own or all(torch.equal(given[key], params[key]) for key in params)
    if not good or not untouched:
        what = "returned no dict of the same names and shapes" if untouched else "changed its input"
        raise SiteError(
            f"{where!r}: fold of {type(layer).__name__} {what}; it must return "
            'params | {"weight": ...} and change nothing in place',
            where=where,
        )
    return {key: params[key] if folded[key] is given[key] else folded[key] for key in params}


def _low_rank(module: nn.Module, layers: list[Any]) -> list[LowRank]:
    """Return the layers' changes of a plain weight as factors; [] if a layer changes more."""
    weight: Any = module._parameters.get("weight")
    if not tensors.is_plain(weight) or not weight.is_contiguous():
        return []
    run = [layer.folds_as() for layer in layers]
    return [] if None in run else run


def _float_of(parameter: Any) -> torch.dtype:
    """Return the dtype for new values of a parameter: its own; float32 if it is quantised."""
    return parameter.dtype if tensors.is_plain(parameter) else torch.float32


def check_unchanged(where: str, module: nn.Module, stack: Stack, key: str, what: str) -> None:
    """Raise if a merged parameter was changed since the merge: `what` would lose the change."""
    newest = [step for step in stack.steps if key in step.marks][-1]
    parameter = module._parameters.get(key)
    if parameter is None:
        raise DeltaError(
            f"{where}.{key} is no parameter of its own any more, as of a parametrized or pruned "
            f"module, but was one when deltas were merged into it, and {what} needs it: undo that "
            "first, or keep the merged model as it is"
        )
    if parameter.is_meta:
        raise DeltaError(
            f"{where}.{key} has no values to compare, being on the meta device, and {what} needs "
            "them: if accelerate offloaded the model, call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    mark, then = newest.marks[key], newest.originals[key]
    if marks.mark_of(module, key, mark.sizes) != mark:
        told = ""
        if isinstance(then, Tensor) and then.dtype != parameter.dtype:
            told = f" (it was cast from {then.dtype} to {parameter.dtype}; unmerge before a cast)"
        raise DeltaError(
            f"{where}.{key} was changed after the merge{told}, and {what} would lose that; "
            "merge after training and loading, or keep the merged model as it is"
        )


@tensors.lasting()
def undo(module: nn.Module, stack: Stack, step: Step) -> None:
    """Undo the last step of merging on one site; after an interrupted call, call it again."""
    for key, kept in step.originals.items():
        tensors.put_back(module, key, kept)
    for layer in step.layers.values():
        layer.record.merged.discard(step)
    if step in stack.steps:
        stack.steps.remove(step)


def original(where: str, module: nn.Module, key: str, what: str = "") -> Tensor | None:
    """Return a parameter's values from before all merges.

    None: no merge changed the parameter, or it is quantised.

    Args:
        where: the full name of `module`.
        what: the action that would lose a change since the merge, for the message; "": do not
            check.

    Raises:
        DeltaError: the parameter was changed since the merge.
    """
    stack = stack_of(module)
    steps = stack.steps if stack is not None else []
    values = next((step.originals[key] for step in steps if key in step.originals), None)
    if not isinstance(values, Tensor):
        return None
    if what:
        check_unchanged(where, module, stack, key, what)  # type: ignore[arg-type]
    return values
