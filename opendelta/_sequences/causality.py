"""Let gates for each sequence act only in models whose tokens see later ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .._layers.base import Acts, DeltaLayer
from .._modules.calls import every, items_of
from .._texts.arguments import READS, arguments, named
from .._texts.documents import SEQUENCE
from .._texts.later import few, sees_later, sees_later_on_ids
from .._texts.masks import hides_later
from .._texts.rehearsal import is_own
from ..errors import SiteError, quoted
from ..names import ancestors, is_inside, relative

STATED = "is_causal"  # the attribute by which a module says whether its tokens see later ones
MASK = "attention_mask"  # with two axes it shows padding
WHOM = re.compile("mask|bias|causal|attn")  # in the names of what says which tokens see which


class Verdict:
    """Whether it is known that the tokens around gates see later ones.

    Args:
        where: the full names of the gates' modules.
        around: the name of the model's class.
        unknown: those of which no trial has shown it yet; None: all.
    """

    def __init__(self, where: list[str], around: str, unknown: list[str] | None = None) -> None:
        self.known, self.where, self.around = False, where, around
        self.unknown = where if unknown is None else unknown

    def check(self, u: Tensor) -> None:
        """Raise in a forward of modules inside that the model's own forward did not call."""
        if not self.known and u.size(-2) > 1 and not without_values(u):
            self.refuse("its forward has not run yet: call the whole model once")

    def refuse(self, why: str) -> None:
        raise SiteError(
            f'per="sequence": nothing says whether the tokens of {self.around} around '
            f"{', '.join(map(quoted, self.where))} see later ones, as {why}. If they do, set "
            f"model.{STATED} = False before; else choose {SEQUENCE.instead}",
            where=self.where[0],
        )

    def refuse_causal(self, name: str, by: Collection[str] = ()) -> None:
        where = f"where by {', '.join(map(quoted, sorted(by)))}" if by else "where"
        raise SiteError(
            f'per="sequence": {name!r} is inside {self.around}, {where} a token may not see later '
            f"ones: choose {SEQUENCE.instead}",
            where=name,
        )


def without_values(*held: Any) -> bool:
    """True if nothing can be tried with these arguments: they have shapes alone."""
    tensors = [t for each in held for t in every(Tensor, each)]
    return any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)


def _by_name(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return what an argument holds at any depth, with the name or the last key of each."""
    items = items_of(value)
    if items is None:
        return [(name, value)]
    inside = [_by_name(key if isinstance(key, str) else name, item) for key, item in items.items()]
    return [pair for pairs in inside for pair in pairs]


def _may_hide(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that may say which tokens see which, by name."""
    held = [pair for name, value in given.items() for pair in _by_name(name, value)]
    rows = [t.size(0) for name, t in held if isinstance(t, Tensor) and t.ndim and name != MASK]
    found: dict[str, Any] = {}
    for name, value in held:
        if isinstance(value, Tensor):
            square = value.ndim > 1 and value.size(-1) == value.size(-2) > 1
            padding = name == MASK and value.ndim == 2 and value.size(0) in rows
            if square and not padding and not value.is_complex():
                found[name] = value
        elif value is True and "causal" in name:
            found[name] = value
    return found


def _is_of_one(*given: Any) -> bool:
    """True if the arguments of a call are those of a single token."""
    return all(t.size(1) == 1 for t in every(Tensor, given) if t.ndim > 1)


def watched(
    made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], more: dict[str, DeltaLayer]
) -> dict[str, DeltaLayer]:
    """Return what the root needs so that the gates in `made` act where tokens see later ones.

    In others the mean over all tokens would tell each token of the later ones, and generation by
    steps would compute something else.

    Args:
        more: the other layers that the gates need, of which the root may have one.

    Raises:
        SiteError: a layer is inside a model whose tokens see no later ones.
    """
    unknown = list[str]()
    root = modules[""]
    tried = dict[str, dict[str, bool]]()
    own = list[str]()
    for name in made:
        outer = [*ancestors(name), ""]
        where = next((o for o in outer if set(arguments(modules[o])) >= READS), "")
        around, verdict = modules[where], Verdict([name], type(modules[where]).__name__)
        if any(_sees_no_later(part) for part in around.modules()):
            verdict.refuse_causal(name)
        stated = any(getattr(modules[o], STATED, None) is False for o in (where, ""))
        if is_own(around) and not stated and any(around.children()):
            if where not in tried:
                inside = [n for n in made if n == name or is_inside(n, where)]
                tried[where] = sees_later_on_ids(around, [relative(n, where) for n in inside])
            found = tried[where].get(relative(name, where))
            if found is False:
                verdict.refuse_causal(name)
            own.append(name)
            unknown += [] if found else [name]
    if "" in made:
        if unknown:
            Verdict(unknown, type(root).__name__).refuse("the gate is on the model itself")
        return {}
    verdict = Verdict(own, type(root).__name__, unknown)
    verdict.known = not unknown
    for name in unknown:
        made[name].verdict = verdict  # type: ignore[assignment]
    return {"": Tried(verdict, arguments(root), more.get(""))} if own else {}


def _sees_no_later(module: nn.Module) -> bool:
    return any(getattr(module, name, None) is True for name in (STATED, "is_decoder"))


class Tried(DeltaLayer):
    """Tries a model of somebody's own on the inputs of its first forward.

    And again on those of a call whose arguments hide later tokens from earlier ones.

    Args:
        verdict: what is to be found.
        arguments: the names of those of the model's forward.
        inner: another layer of the same delta on the model; or None.
    """

    acts = Acts.SERVES
    routes_itself = True
    watches = True
    sees_module = True

    def __init__(self, verdict: Verdict, arguments: list[str], inner: DeltaLayer | None) -> None:
        super().__init__()
        self.verdict, self.arguments, self.inner = verdict, arguments, inner
        self.looked_at, self.passed = set[str](), set[str]()  # arguments; they hid no later tokens

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        by = self._hiding(args, kwargs)
        if by or not self.verdict.known:
            self._try(call.module, args, kwargs, by)
        if self.inner is not None:
            return self.inner.forward(call, *args, **kwargs)
        return call(*args, **kwargs)

    def _hiding(self, args: tuple, kwargs: dict[str, Any]) -> list[str]:
        """Return the arguments that hide later tokens from earlier ones, by name.

        Those are left out with which a trial has shown that tokens see later ones.
        """
        found = _may_hide(named(self.arguments, args, kwargs))
        if torch.compiler.is_compiling():
            return [n for n in found if n not in self.looked_at and WHOM.search(n)]
        if without_values(found):
            return []
        self.looked_at.update(found)
        left = [name for name in found if name not in self.passed]
        return [n for n in left if found[n] is True or hides_later(found[n])]

    def _try(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], by: list[str]) -> None:
        """Find by the arguments of a call whether tokens see later ones.

        Args:
            by: the arguments that may hide later ones.

        Raises:
            SiteError: they do not, or nothing shows it.
        """
        verdict = self.verdict
        if torch.compiler.is_compiling():
            verdict.refuse("nothing can be tried in compiled code: run a batch without it first")
        if without_values(args, kwargs, [*module.parameters()]) or _is_of_one(args, kwargs):
            return
        found = sees_later(module, verdict.where, *few((args, kwargs)))
        if len(found) < len(verdict.where):
            found |= sees_later(module, verdict.where, args, kwargs)
        for name in verdict.where:
            if found.get(name) is False:
                verdict.refuse_causal(name, by)
            if name not in found and (by or name in verdict.unknown):
                verdict.refuse("a trial on the inputs of this call does not show it")
        verdict.known = True
        self.passed.update(by)
