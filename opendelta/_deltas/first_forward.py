"""After the first whole forward of a backbone, warn of active delta layers that did not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import PROBING
from .._layers.record import Record
from .._sites import swap
from .._sites.stack import Stack, acting_on, stack_of
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, join, unwrapped
from .resizing import embeddings_of
from .state_dict import state_hook


def unreached(model: nn.Module) -> list[str]:
    """Return the full names of active delta layers that have not run outside of compiled code."""
    return unreached_in(Backbone.of(model))


def unreached_in(backbone: Backbone) -> list[str]:
    """Return the layers of `unreached` for a known backbone."""
    return _names(_silent(backbone), backbone)


def missed(backbone: Backbone) -> set[tuple[str, str]]:
    """Return (site, delta) of the active layers that a first forward has not reached.

    A layer that was merged or switched off in that forward could not run there, and is not one.
    """
    silent = _silent(backbone, compiled=False)
    return {(where, name) for where, name in silent if backbone.stacks[where][name].missed}


def _silent(backbone: Backbone, compiled: bool = True) -> list[tuple[str, str]]:
    """Return (site, delta) of the active layers that have not run.

    Args:
        compiled: count layers in compiled code too.
    """
    return [
        (where, name)
        for where, name, layer in backbone.delta_layers()
        if layer.computes and layer.record.active and name not in backbone.stacks[where].ran
        if not backbone.stacks[where].holds(name)
        if compiled or not _in_compiled(backbone, where)
    ]


def _in_compiled(backbone: Backbone, where: str) -> bool:
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in backbone.chain(where)
    )


def _lost(backbone: Backbone) -> Iterator[tuple[Record, str]]:
    """Yield (delta, site) of the layers that left with their module, as another one replaced it."""
    hooks = filter(None, map(state_hook, backbone.modules.values()))
    sites = {r: list[str]() for hook in hooks if hook.on_root for r in hook.shared.records}
    for where, _, layer in backbone.delta_layers():
        sites.setdefault(layer.record, []).append(where)
    for record in sorted(sites, key=lambda record: record.rank):
        own = [f".{unwrapped(where)}" for where in sites[record]]
        if len(own) == len(record.sites):
            continue
        for name in sorted(record.sites):
            # The name is relative to the module that the delta was attached to.
            if not any(w.endswith(f".{name}") or f".{name}".endswith(w) for w in own):
                yield record, name


def _names(silent: list[tuple[str, str]], backbone: Backbone) -> list[str]:
    """Return the full names of silent layers, and of those that are lost."""
    lost = [(site, record.name) for record, site in _lost(backbone)]
    return [join(where, SLOT, name) for where, name in silent + lost]


def replaced(backbone: Backbone) -> list[tuple[Record, str]]:
    """Return (active delta, site) where another module has taken the place of the site."""
    return [
        (record, site)
        for record, site in _lost(backbone)
        if record.active
        if any(f".{unwrapped(name)}".endswith(f".{site}") for name in backbone.modules)
    ]


class FirstForward:
    """A hook that warns, after the next whole forward, of active layers that did not run."""

    def __call__(self, model: nn.Module, _args: Any, _output: Any) -> None:
        replica = "_is_replica" in model.__dict__  # its thread does not know which deltas act
        if torch.compiler.is_compiling() or PROBING.get() or replica:
            return
        backbone = Backbone.of(model)
        _take_away(backbone, FirstForward)
        silent = _silent(backbone, compiled=False)
        for where, name in silent:
            backbone.stacks[where][name].__dict__["missed"] = True
        unrun = _names(silent, backbone)
        if unrun:
            shown = listed(unrun)
            warn(
                f"{len(unrun)} delta layers did not run in the first forward of "
                f"{type(model).__name__}: {shown}. If other code, such as a loss of TRL's, reads "
                "the module's weight instead of calling it, attach with reads=True, or choose the "
                "parent; if the module was replaced since, attach anew; if this forward skipped it "
                "(experts, layer drop), all is well",
                UnreachedWarning,
            )


class HeadWatch:
    """Hooks that warn, once each, of layers on the head that do not run in a forward that trains.

    The first forward of all may have called the head, as sampling and checks do; a loss that comes
    later may read its weight instead.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.ran: set[str] | None = None
        self.told: set[str] = set()

    def __call__(self, model: nn.Module, _args: Any, *output: Any) -> None:
        if torch.compiler.is_compiling() or PROBING.get():
            return
        if not output:
            if model.training and torch.is_grad_enabled() and "_is_replica" not in model.__dict__:
                self.ran, self.stack.ran = self.stack.ran, set()
            return
        if self.ran is None:
            return
        own, self.stack.ran, self.ran = self.stack.ran, self.stack.ran | self.ran, None
        names = {
            layer.record.name for layer in acting_on(self.stack)
            if layer.computes and not layer.missed
        } - own - self.told  # fmt: skip
        if names:
            self._tell(model, names)

    def _tell(self, model: nn.Module, names: set[str]) -> None:
        backbone = Backbone.of(model)
        where = next((w for w, stack in backbone.stacks.items() if stack is self.stack), None)
        if where is None or _in_compiled(backbone, where):
            return
        self.told |= names
        silent = [join(where, SLOT, name) for name in sorted(names)]
        warn(
            f"{len(silent)} delta layers on the head did not run in a forward of "
            f"{type(model).__name__} that trains: {listed(silent)}. If a loss, such as TRL's, "
            "reads the head's weight instead of calling it, attach with reads=True",
            UnreachedWarning,
        )


def watch_forward(backbone: Backbone) -> None:
    """Check the backbone's next whole forward, and the head in all that train."""
    _take_away(backbone, FirstForward)
    backbone.model.register_forward_hook(FirstForward())
    watch_head(backbone)


def watch_head(backbone: Backbone) -> None:
    """Check the head in all forwards that train, if its deltas do not show in its weight."""
    _take_away(backbone, HeadWatch)
    head = embeddings_of(backbone.model).get("output")
    stack = None if head is None else stack_of(head)
    if head is not None and stack is not None and not swap.weight_is_read(head, False):
        watch = HeadWatch(stack)
        backbone.model.register_forward_pre_hook(watch)
        backbone.model.register_forward_hook(watch)


def unwatch_forward(backbone: Backbone) -> None:
    """Take the hooks away."""
    _take_away(backbone, FirstForward, HeadWatch)


def _take_away(backbone: Backbone, *kinds: type) -> None:
    for module in backbone.modules.values():
        for hooks in filter(None, (module._forward_hooks, module._forward_pre_hooks)):
            for key in [k for k, hook in hooks.items() if isinstance(hook, kinds)]:
                del hooks[key]
