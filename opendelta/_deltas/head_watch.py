"""Warn of layers on the head that do not run where the model trains: a loss may read its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import PROBING
from .._modules.calls import every
from .._sites import swap
from .._sites.stack import Stack, acting_on
from .._texts.arguments import is_beside_text
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, dotted, is_inside, join
from .resizing import embeddings_of


class HeadWatch:
    """Hooks that warn, once each, of layers on the head that do not run in a forward that trains.

    The first forward of all may have called the head, as sampling and checks do; a loss that comes
    later may read its weight instead.

    Args:
        stack: that of the head.
        where: the head's full name.
    """

    def __init__(self, stack: Stack, where: str) -> None:
        self.stack, self.where = stack, where
        self.ran: set[str] | None = None
        self.told: set[str] = set()

    def __call__(self, model: nn.Module, _args: Any, *output: Any) -> None:
        if torch.compiler.is_compiling() or PROBING.get():
            return
        if not output:
            if _trains(model):
                self.ran, self.stack.ran = self.stack.ran, set()
            return
        if self.ran is None:
            return
        own, self.stack.ran, self.ran = self.stack.ran, self.stack.ran | self.ran, None
        names = self.acting() - own - self.told
        if names and not is_compiled(Backbone.of(model).chain(self._inside(model))):
            self.tell(model, names)

    def _inside(self, model: nn.Module) -> str:
        stacks = Backbone.of(model).stacks.items()
        return next((where for where, stack in stacks if stack is self.stack), "")

    def acting(self) -> set[str]:
        """Return the deltas on the head that would act in a call of it."""
        layers = [layer for layer in acting_on(self.stack) if layer.computes and not layer.missed]
        return {layer.record.name for layer in layers}

    def tell(self, model: nn.Module, names: set[str]) -> None:
        """Warn of deltas that did not run after a forward of `model`, once of each."""
        self.told |= names
        silent = [join(self.where, SLOT, name) for name in sorted(names)]
        warn(
            f"{len(silent)} delta layers on the head did not run in a forward of "
            f"{type(model).__name__} that trains: {listed(silent)}. If a loss, such as TRL's, "
            "reads the head's weight instead of calling it, attach with reads=True",
            UnreachedWarning,
        )


class Counted(set[str]):
    """The names that ran, and how often each did since this was made."""

    def __init__(self, before: Iterable[str]) -> None:
        super().__init__(before)
        self.times: Counter[str] = Counter()

    def add(self, name: str) -> None:
        super().add(name)
        self.times[name] += 1


class PartWatch:
    """A hook of the model beneath the head: a loop may call it, and then read the head's weight.

    When gradients come back to what it gave, the head has been called, or is not. A copy of the
    part alone has no head, so that it takes nothing along.

    Args:
        watch: that of the head, or None.
        chain: the head and the modules around it.
    """

    def __init__(self, watch: HeadWatch | None = None, chain: Sequence[nn.Module] = ()) -> None:
        self.watch, self.chain = watch, chain

    def __reduce__(self) -> tuple[type, tuple]:
        return PartWatch, ()

    def __call__(self, part: nn.Module, _args: Any, output: Any) -> None:
        watch = self.watch
        if watch is None or torch.compiler.is_compiling() or PROBING.get():
            return
        if watch.ran is not None or not _trains(part) or not (names := watch.acting() - watch.told):
            return
        given = next((t for t in every(Tensor, output, objects=True) if t.requires_grad), None)
        if given is None or is_compiled(self.chain):
            return
        ran: Any = watch.stack.ran
        if not isinstance(ran, Counted):
            watch.stack.ran = ran = Counted(ran)
        before = ran.times.copy()

        def look(_: Tensor) -> None:
            silent = {name for name in names - watch.told if ran.times[name] == before[name]}
            if silent and ran is watch.stack.ran:
                watch.tell(part, silent)

        given.register_hook(look)


def _trains(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled() and "_is_replica" not in model.__dict__


def is_compiled(chain: Iterable[nn.Module]) -> bool:
    """True if one of these modules is compiled by itself."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in chain)


HOOKS = HeadWatch, PartWatch


def watch_heads(backbone: Backbone) -> None:
    """Check the heads in all that trains, if their deltas do not show in their weights."""
    take_away(backbone, *HOOKS)
    models = {n: m for n, m in backbone.modules.items() if hasattr(type(m), "base_model")}
    for where, model in models.items():
        inner = {name: m for name, m in models.items() if is_inside(name, where)}
        head, base = embeddings_of(model).get("output"), getattr(model, "base_model", model)
        parts = [base] if base is not model else []
        beside = _beside(backbone, where, [*inner]) if parts else []
        heads = [name for name in backbone.stacks if backbone.modules[name] is head]
        for name in dict.fromkeys([*beside, *heads]):
            if swap.weight_is_read(backbone.modules[name], False):
                continue
            watch = HeadWatch(backbone.stacks[name], name)
            run_before = parts
            if name in heads:
                model.register_forward_pre_hook(watch)
                model.register_forward_hook(watch)
                run_before = [
                    m for n, m in inner.items() if not is_inside(name, n) and not is_beside_text(m)
                ]
            for part in run_before:
                part.register_forward_hook(PartWatch(watch, [*backbone.chain(name)]))


def _beside(backbone: Backbone, where: str, inner: Sequence[str]) -> list[str]:
    """Return the sites of the model `where` that lie beside the models `inner`, in no one."""
    within = tuple(map(dotted, inner))
    sites = [n for n in backbone.stacks if is_inside(n, where) and not n.startswith(within)]
    return [n for n in sites if not any(each == n or is_inside(each, n) for each in inner)]


def take_away(backbone: Backbone, *kinds: type) -> None:
    """Take away the hooks of these kinds."""
    for module in backbone.modules.values():
        for hooks in filter(None, (module._forward_hooks, module._forward_pre_hooks)):
            for key in [k for k, hook in hooks.items() if isinstance(hook, kinds)]:
                del hooks[key]
