"""After the first whole forward of a backbone, warn of active delta layers that did not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import PROBING
from .._layers.record import Record
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, join, unwrapped
from .head_watch import HOOKS, is_compiled, take_away, watch_heads
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
        if compiled or not is_compiled(backbone.chain(where))
    ]


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
        take_away(backbone, FirstForward)
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


def watch_forward(backbone: Backbone) -> None:
    """Check the backbone's next whole forward, and the head in all that train."""
    take_away(backbone, FirstForward)
    backbone.model.register_forward_hook(FirstForward())
    watch_heads(backbone)


def unwatch_forward(backbone: Backbone) -> None:
    """Take the hooks away."""
    take_away(backbone, FirstForward, *HOOKS)
