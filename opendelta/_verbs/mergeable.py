"""Refuse to merge layers that do not act, and into weights that other code reads too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .._backbone import reading, shapes
from .._backbone.apart import apart
from .._backbone.backbone import Backbone
from .._backbone.owned import own_code
from .._deltas import first_forward
from .._layers.record import Record
from .._modules import wrappers
from .._modules.tensors import is_plain
from .._sites import swap
from .._sites.blocks import in_block
from .._sites.merged import Named, changed_by, check_kinds, factor_of
from .._sites.stack import Stack, Step
from ..errors import SiteError
from ..names import ancestors


def _check_above(what: str, where: str, stack: Stack, run: list[Named]) -> None:
    """Raise if a layer that would stay looks at a weight that a factor keeps from being whole."""
    gone = {name for _, layer in run for name in in_block(stack, layer)}
    for name, layer in stack.in_order():
        if name not in gone and name not in stack.merged() and layer.sees_module:
            raise SiteError(
                f"{what}: the module multiplies its weight, and {name!r}, which looks at the "
                "weight, would see another one. Let both act unmerged",
                where=where,
            )


Users = tuple[Mapping[int, Sequence[str]], Mapping[int, nn.Module]]


def users_of(backbone: Backbone, copies: Mapping[str, nn.Module] | None = None) -> Users:
    """Return {id of a parameter: the full names of its modules}, and one that has no name.

    Args:
        copies: {full name of a module: what comes in its place}; it has only what that has.
    """
    named = backbone.users()
    kept = {where: {*map(id, copied.parameters())} for where, copied in (copies or {}).items()}

    def stays(name: str, number: int) -> bool:
        return all(number in kept[around] for around in ancestors(name) if around in kept)

    if kept:
        named = {n: [name for name in names if stays(name, n)] for n, names in named.items()}
    return named, reading.tied_aside(backbone)


def _other_user(
    backbone: Backbone, module: nn.Module, parameter: nn.Parameter, users: Users
) -> str | None:
    """Return what another module that has a parameter is called, or None."""
    named, aside = users
    for other in named[id(parameter)]:
        if backbone.modules[other] is not module:
            return repr(other)
    held = aside.get(id(parameter))
    if held is None:
        return None
    return f"another {type(held).__name__} that the model holds beside its modules"


def check_module(
    backbone: Backbone,
    where: str,
    run: list[Named],
    users: Users,
    stays: bool = True,
) -> None:
    """Raise if the weights of a module cannot be changed without changing another module.

    Args:
        users: who has which parameter; see `users_of`.
        stays: the layers that are not in `run` stay on the module.
    """
    module, names = backbone.modules[where], ", ".join(name for name, _ in run)
    what = f"{where!r} ({type(module).__name__}): {names} cannot be merged"
    if wrappers.hides_forward(module):
        raise SiteError(
            f"{what}: a function was put in the place of its forward since, and no delta acts "
            "there. Take it off the module, or disable the deltas",
            where=where,
        )
    factor, stack = factor_of(where, module, run), backbone.stacks[where]
    for _, layer in run:
        check_kinds(where, module, in_block(stack, layer).values())
    if factor != 1 and stays:
        _check_above(what, where, stack, run)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise SiteError(
            f"{what}: its max_norm shortens the weight whenever it runs, and would shorten the "
            "merged changes along; set it to None, once it has run on all of the weight",
            where=where,
        )
    for key, parameter in module._parameters.items():
        if parameter is None or key not in ("weight", "bias"):
            continue
        other = _other_user(backbone, module, parameter, users)
        if other is not None and key in changed_by(where, module, run, factor):
            raise SiteError(
                f"{what}: its {key} is tied to that of {other}, which would change too. Let "
                f"the delta act unmerged; or train a copy, modules_to_save=[{where!r}]; or "
                f"untie the two before attaching: give {where!r} a {key} of its own, and set "
                "tie_word_embeddings=False in the config",
                where=where,
            )
        if parameter.is_meta:
            raise SiteError(f"{what}: its {key} is on the meta device, without values", where=where)


def reached_by(backbone: Backbone) -> set[tuple[str, str]] | None:
    """Return (site, delta) of the layers that run in a run on shapes; None: it is not possible."""
    reached: set[tuple[str, str]] = set()
    with apart(backbone) as twin:

        def look(_: Any) -> None:
            reached.update((w, name) for w, stack in twin.stacks.items() for name in stack.ran)

        try:
            shapes.dry_run(twin, look)
        except SiteError:  # the user's own run tells
            return None
    return reached


def check_in_place(backbone: Backbone, records: Collection[Record] | None = None) -> None:
    """Raise if an active delta, one of `records`, left a site with the module that was there."""
    for record, where in first_forward.replaced(backbone):
        if records is None or record in records:
            raise SiteError(
                f"{where!r}: {record.name!r} was on another module, which was replaced since, and "
                "would be lost here. Put that module back; or detach the delta and attach it "
                "again, so that it acts on the new one; or disable it",
                where=where,
            )


def check_acting(backbone: Backbone, runs: Mapping[str, Sequence[Named]]) -> None:
    """Raise if a layer may never act, because code uses its module otherwise than by calling it.

    Only layers that have not run are looked at, by a run on shapes: in modules whose code may do
    so, and, if no run is possible, where a forward has missed a module that something else holds.
    """
    called = {w: r for w, r in runs.items() if not swap.weight_is_read(backbone.modules[w], False)}
    _check_missed(backbone, called)
    silent = [
        (where, name)
        for where, run in called.items()
        for name, _ in run
        if name not in backbone.stacks[where].ran
    ]
    unnamed = {where for where, _ in silent if reading.may_be_read(backbone, where)}
    missed = first_forward.missed(backbone)
    held = reading.suspects(backbone, [where for where, name in silent if (where, name) in missed])
    asked = [(where, name) for where, name in silent if where in unnamed or where in held]
    reached = reached_by(backbone) if asked else None
    for where, name in asked:
        if reached is None or (where in unnamed and (where, name) not in reached):
            raise SiteError(
                f"{where!r} ({type(backbone.modules[where]).__name__}): {name!r} has not run, and "
                "other code may use the module otherwise than by calling it: then a merge would "
                "change what the model computes. Run the model on inputs that reach it; if its "
                f"weight is read, attach with reads=True; or disable {name!r}",
                where=where,
            )


def _check_missed(backbone: Backbone, runs: Mapping[str, Sequence[Named]]) -> None:
    """Raise if a forward has missed a layer that ran in another, and code may read its module.

    So it is if one branch of the code around calls the module, and another reads its weight.
    """
    partly = [
        (where, name)
        for where, run in runs.items()
        for _, top in run
        for name, layer in in_block(backbone.stacks[where], top).items()
        if layer.missed and name in backbone.stacks[where].ran
    ]
    own = own_code(backbone) if partly else None
    for where, name in partly:
        if own is not None and reading.code_may_read(backbone, where, own):
            raise SiteError(
                f"{where!r} ({type(backbone.modules[where]).__name__}): {name!r} ran in some "
                "forwards, not in all, and the code around may read the module's weight or "
                "bias instead of calling it: then a merge would change what the model "
                f"computes. Attach with reads=True; or disable {name!r}",
                where=where,
            )


def read_beside(backbone: Backbone, names: Iterable[str]) -> dict[str, set[str] | None]:
    """Return what other code reads of the sites `names`; see `reading.read_beside`."""
    missed = {where for where, _ in first_forward.missed(backbone)}
    return reading.read_beside(backbone, names, missed)


_TELLING = (
    "; or attach it with sample_inputs={argument: tensor, ...}, inputs of the model's forward that "
    "reach that code: then a run on their shapes tells"
)


def check_unread(where: str, module: nn.Module, step: Step, read: set[str] | None) -> None:
    """Raise if a merge has changed a parameter that code around the module reads, too.

    Args:
        step: the merge.
        read: the parameters that are read; None: it is not known.
    """
    changed = sorted(step.originals.keys() if read is None else step.originals.keys() & read)
    plain = all(map(is_plain, [p for p in module._parameters.values() if p is not None]))
    if not changed or (read is None and not plain):
        return
    if swap.weight_is_read(module, False):
        raise SiteError(
            f"{where!r} ({type(module).__name__}): {', '.join(step.layers)} cannot be merged: "
            f"other code computes with its {' and '.join(changed)} and has them otherwise than by "
            "the attribute, as from named_parameters(), where reads=True does not act. Let the "
            "delta act unmerged",
            where=where,
        )
    told = "reads" if read is not None else "may read (no run on shapes tells)"
    cure = "" if read is not None else _TELLING
    raise SiteError(
        f"{where!r} ({type(module).__name__}): {', '.join(step.layers)} cannot be merged: other "
        f"code {told} its {' and '.join(changed)} besides calling it, and would compute with the "
        "merged values. Let the delta act unmerged; or attach it with reads=True, so that it acts "
        f"on both, and train it{cure}",
        where=where,
    )
