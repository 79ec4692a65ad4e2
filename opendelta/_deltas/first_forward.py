"""After the first whole forwards of a backbone, warn of active delta layers that did not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import PROBING
from .._layers.record import Record
from .._sites import swap
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, ancestors, is_inside, join, last, parent, unwrapped
from .head_watch import HOOKS, is_compiled, take_away, trains, watch_heads
from .state_dict import state_hook
from .training_watch import TrainingWatch

FORWARDS = 6  # after so many, a layer that layer drop leaves out now and then has run


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
        if not backbone.stacks[where].holds(name) and not _is_noted(backbone, where, name)
        if compiled or not is_compiled(backbone.chain(where))
    ]


def _is_noted(backbone: Backbone, where: str, name: str) -> bool:
    """True if a layer only notes what a call says, and one of its delta inside has noted it."""
    stacks = backbone.stacks
    layer: Any = stacks[where][name]
    ran: Any = (s[name] for n, s in stacks.items() if name in s.ran and is_inside(n, where))
    return layer.only_notes and any(inner.only_notes for inner in ran)


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
    return _full(silent + [(site, record.name) for record, site in _lost(backbone)])


def _full(layers: list[tuple[str, str]]) -> list[str]:
    return [join(where, SLOT, name) for where, name in layers]


def replaced(backbone: Backbone) -> list[tuple[Record, str]]:
    """Return (active delta, site) where another module has taken the place of the site."""
    return [
        (record, site)
        for record, site in _lost(backbone)
        if record.active
        if any(f".{unwrapped(name)}".endswith(f".{site}") for name in backbone.modules)
    ]


def not_called(backbone: Backbone) -> list[str]:
    """Return the full names of the silent layers in blocks, where layers of alike blocks ran."""
    return _full(_passed_over(backbone))


def left_out(backbone: Backbone) -> set[tuple[str, str]]:
    """Return (site, delta) of the silent layers in blocks that training may leave out at random.

    Layer drop does so. Alike blocks ran, or none of them that has a delta did.
    """
    if not backbone.model.training:
        return set()
    silent = _silent(backbone)
    ran = {_block(backbone, where) for where, stack in backbone.stacks.items() if stack.ran}
    # Where a block ran without a layer, the blocks are not the reason.
    skipped = {(_pattern(backbone, w), n) for w, n in silent if _block(backbone, w) in ran}
    return {*_passed_over(backbone)} | {
        (where, name)
        for where, name in silent
        if _block(backbone, where) and (_pattern(backbone, where), name) not in skipped
    }


def _passed_over(backbone: Backbone) -> list[tuple[str, str]]:
    """Return (site, delta) of the layers of `not_called`."""
    stacks = backbone.stacks.items()
    alike = {(_pattern(backbone, where), n) for where, stack in stacks for n in stack.ran}
    return [(w, n) for w, n in _silent(backbone) if (_pattern(backbone, w), n) in alike]


def _pattern(backbone: Backbone, where: str) -> str:
    """Return a full name with "*" for the steps at which the module is one of many."""
    around = reversed([*ancestors(where)])
    return join(*("*" if _is_one_of_many(backbone, name) else last(name) for name in around))


def _is_one_of_many(backbone: Backbone, name: str) -> bool:
    return last(name).isdigit() or isinstance(backbone.modules.get(parent(name)), nn.ModuleDict)


def _block(backbone: Backbone, where: str) -> str:
    """Return the full name of the innermost block around a site, which a forward may leave out.

    nn.Sequential calls all that it holds.
    """
    for name in ancestors(where):
        within = type(backbone.modules.get(parent(name)))
        if _is_one_of_many(backbone, name) and within is not nn.Sequential:
            return name
    return ""


class FirstForward:
    """A hook that warns, after the next whole forward, of active layers that did not run.

    Of a layer that the forward may have left out at random it warns after more forwards, or after
    one in eval mode.
    """

    def __init__(self) -> None:
        self.count = self.trained = 0
        self.waits: set[tuple[str, str]] = set()

    def __call__(self, model: nn.Module, _args: Any, _output: Any) -> None:
        replica = "_is_replica" in model.__dict__  # its thread does not know which deltas act
        if torch.compiler.is_compiling() or PROBING.get() or replica:
            return
        if self.count >= FORWARDS and not trains(model):
            return
        backbone = Backbone.of(model)
        silent, before = _silent(backbone, compiled=False), self.waits
        self.count += 1
        shown = {(w, n) for w, n in silent if swap.weight_is_read(backbone.modules[w], False)}
        self.waits = left_out(backbone) & {*silent} if self.count < FORWARDS else set()
        self.trained += trains(model)
        if self.trained < FORWARDS:  # a loss may read a weight that is shown
            self.waits |= shown
        if self.count == 1:
            watch_training(backbone)
        if not self.waits:
            take_away(backbone, FirstForward)
        if self.count > 1:  # the others were told after the first
            told = [e for e in silent if e in before - self.waits]
            self.tell(model, _full(told), shown={*told} <= shown)
            return
        for where, name in silent:
            backbone.stacks[where][name].__dict__["missed"] = True
        self.tell(model, _names([e for e in silent if e not in self.waits], backbone))

    def tell(self, model: nn.Module, unrun: list[str], shown: bool = False) -> None:
        """Warn of layers that did not run, if there are any.

        Args:
            shown: their modules show them in the weight.
        """
        if not unrun:
            return
        when = "first forward" if self.count == 1 else f"first {self.count} forwards"
        reads = (
            "Nothing called the module or read its weight: choose one that is used"
            if shown
            else "If other code, such as a loss of TRL's, reads the module's weight instead of "
            "calling it, attach with reads=True, or choose the parent"
        )
        warn(
            f"{len(unrun)} delta layers did not run in the {when} of {type(model).__name__}: "
            f"{listed(unrun)}. {reads}; if the module was replaced since, attach anew; if other "
            "code calls it, or this forward skipped it (experts, layer drop), all is well",
            UnreachedWarning,
        )


def watch_training(backbone: Backbone) -> None:
    """Check the first forwards that train, as others come before."""
    if not any(isinstance(h, TrainingWatch) for h in backbone.model._forward_hooks.values()):
        watch = TrainingWatch()
        backbone.model.register_forward_pre_hook(watch)
        backbone.model.register_forward_hook(watch, prepend=True)  # before `FirstForward`


def watch_forward(backbone: Backbone) -> None:
    """Check the backbone's next whole forward, and the head in all that train."""
    take_away(backbone, FirstForward)
    backbone.model.register_forward_hook(FirstForward())
    watch_heads(backbone)


def unwatch_forward(backbone: Backbone) -> None:
    """Take the hooks away."""
    take_away(backbone, FirstForward, TrainingWatch, *HOOKS)
