"""Warn of layers on the head that do not run where the model trains: a loss may read its weight."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from .._backbone.backbone import Backbone
from .._backbone.embeddings import embeddings_of
from .._backbone.shapes import PROBING
from .._sites import swap
from .._sites.noting import uses_of, when_gradients_come
from .._sites.stack import Stack, acting_on
from .._texts.arguments import is_beside_text
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, dotted, is_inside, join


class HeadWatch:
    """Hooks that warn, once each, of layers on the head that do not run in a forward that trains.

    The first forward of all may have called the head, as sampling and checks do; a loss that comes
    later may read its weight instead.

    Args:
        stack: that of the head.
        where: the head's full name.
        notes: `uses_of` tells who reads the head. Where nobody does, it is for another task.
    """

    def __init__(self, stack: Stack, where: str, notes: bool) -> None:
        self.stack, self.where, self.notes = stack, where, notes
        self.ran: set[str] | None = None
        self.told: set[str] = set()

    def __call__(self, model: nn.Module, _args: Any, *output: Any) -> None:
        if torch.compiler.is_compiling() or PROBING.get():
            return
        if not output:
            if trains(model):
                self.ran, self.stack.ran = self.stack.ran, set()
            return
        if self.ran is None:
            return
        own, self.stack.ran, self.ran = self.stack.ran, self.stack.ran | self.ran, None
        names, uses = self.acting() - own - self.told, uses_of(self.stack)
        if self.notes and uses.reads == uses.judged:
            return
        if names and not is_compiled(Backbone.of(model).chain(self._inside(model))):
            self.tell(names, "did not run in a forward of", model)

    def _inside(self, model: nn.Module) -> str:
        stacks = Backbone.of(model).stacks.items()
        return next((where for where, stack in stacks if stack is self.stack), "")

    def acting(self) -> set[str]:
        """Return the deltas on the head that would act in a call of it."""
        layers = [layer for layer in acting_on(self.stack) if layer.computes and not layer.missed]
        return {layer.record.name for layer in layers}

    def tell(self, names: set[str], what: str, model: nn.Module) -> None:
        """Warn of deltas that a loss does not reach, once of each; `what` happened in `model`."""
        self.told |= names
        silent = [join(self.where, SLOT, name) for name in sorted(names)]
        warn(
            f"{len(silent)} delta layers on the head {what} {type(model).__name__} that trains: "
            f"{listed(silent)}. If a loss, such as TRL's, reads the head's weight instead of "
            "calling it, attach with reads=True",
            UnreachedWarning,
        )


class PartWatch:
    """A hook of the model beneath the head: a loss may call it, and read the head's weight.

    When gradients come back to what it gave, they come to a call of the head in the same backward
    pass, or not. A copy of the part alone has no head, so that it takes nothing along; nor does a
    pickled one.

    Args:
        watch: that of the head, or None.
        chain: the head and the modules around it.
    """

    def __init__(self, watch: HeadWatch | None = None, chain: Sequence[nn.Module] = ()) -> None:
        self.watch, self.chain = watch, chain

    def __reduce__(self) -> tuple[type, tuple]:
        return PartWatch, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> PartWatch:
        if not any(id(module) in memo for module in self.chain[1:]):
            return PartWatch()
        return PartWatch(copy.deepcopy(self.watch, memo), copy.deepcopy(self.chain, memo))

    def __call__(self, part: nn.Module, _args: Any, output: Any) -> None:
        watch = self.watch
        if watch is None or torch.compiler.is_compiling() or PROBING.get() or not trains(part):
            return
        names = watch.acting() - watch.told
        if not names or is_compiled(self.chain):
            return
        uses = uses_of(watch.stack)
        before, reads = uses.reached.copy(), uses.judged

        def look() -> None:
            missed = {name for name, layer in watch.stack.in_order() if layer.missed}
            silent = {n for n in names - watch.told - missed if uses.reached[n] == before[n]}
            if silent and (uses.reads > reads or not uses.called):
                watch.tell(silent, "got no gradient in a backward pass through", part)
            uses.judged = uses.reads

        when_gradients_come(output, functools.partial(at_the_end, look))


def at_the_end(function: Callable[[], None]) -> None:
    """Run a function at the end of this backward pass."""
    Variable._execution_engine.queue_callback(function)


def trains(model: nn.Module) -> bool:
    """True if a forward of the model, which is no replica, trains."""
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
            notes, run_before = swap.note_uses(backbone.modules[name]), parts
            watch = HeadWatch(backbone.stacks[name], name, notes)
            if name in heads:
                model.register_forward_pre_hook(watch)
                model.register_forward_hook(watch)
                run_before = [
                    m for n, m in inner.items() if not is_inside(name, n) and not is_beside_text(m)
                ]
            for part in run_before if notes else ():
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
