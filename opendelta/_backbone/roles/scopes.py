"""The modules in a block that hold one sublayer each, and what is known of attentions together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..._modules.kinds import kind_of
from ..._sites.swap import plain_class
from . import naming
from .blocks import LISTS, class_of
from .flow import is_node


@dataclass
class Scope:
    """A module that holds one sublayer.

    Attributes:
        kind: attn, cross_attn, ff, mixer or other.
        name: its name, relative to the block. For a sublayer without a module of its own: the
            common part of its modules' names with a "*", such as "*" in BERT.
        reason: the evidence for `kind`.
        outer: the scope around it.
        linears: its linear modules, without the linear modules of a scope inside it.
    """

    kind: str
    name: str
    reason: str
    outer: Scope | None = None
    linears: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Return the scope's name in messages."""
        return self.name.rstrip("*") or "the block"

    @property
    def sublayer(self) -> str:
        """Return the kind of the sublayer that the scope is a part of."""
        return self.kind if self.kind != "other" or self.outer is None else self.outer.sublayer


def find_more_attentions(block: Any) -> None:
    """Let modules of the class of an attention be attentions too, whatever their names are.

    Args:
        block: a `Block`, whose scopes are known as far as names tell.
    """
    own = [s for s in block.scopes.values() if s.kind in ("attn", "cross_attn")]
    known = [s for s in reversed(own) if s.name in block.modules]
    first = {_own_class(block.modules[s.name]): s for s in known}
    for name, module in [*block.modules.items()][1:]:
        like = None if name in block.scope_of else first.get(_own_class(module))
        if like is None or is_node(module) or isinstance(module, LISTS):
            continue
        kind = "cross_attn" if naming.CROSS.search(name) else "attn"
        scope = Scope(kind, name, f"its class is that of {like.name!r}")
        block.scopes[name] = scope
        for each in (name, *block.inside(name)):
            block.scope_of[each] = scope
            scope.linears += [each] if kind_of(block.modules[each]) is not None else []


def look_at_crosses(block: Any) -> None:
    """Correct what a name says of an attention that is alone, and a class that all have.

    Args:
        block: a `Block` with all its scopes.
    """
    own = [s for s in block.scopes.values() if s.kind in ("attn", "cross_attn")]
    names = [s for s in own if naming.CROSS.search(s.name)]
    of_class = {s.name: class_of(block.modules[s.name]) for s in own if s.name in block.modules}
    if not own or names or own[0].kind == "attn":
        return
    alone = len(own) == 1 and not naming.CROSS_CLASS.search(of_class.get(own[0].name, ""))
    if alone or (len(own) > 1 and len({*of_class.values()}) == 1):
        own[0].kind = "attn"


def _own_class(module: nn.Module) -> type:
    return plain_class(module) or type(module)
