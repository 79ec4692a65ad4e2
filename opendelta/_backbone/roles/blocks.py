"""Find the repeated blocks of a model, and the blocks that are built alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import nn

from ..._modules.calls import has_forward
from ..._modules.kinds import Kind, kind_of
from ..._sites.swap import plain_class
from ...names import ancestors, computes_weight, last, parent
from ..backbone import Backbone
from . import naming
from .flow import is_node, is_norm

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def class_of(module: nn.Module) -> str:
    """Return the name of a module's own class, also if deltas replaced the class."""
    return (plain_class(module) or type(module)).__name__


@dataclass
class Tree:
    """A backbone, with the names of the children of each module, without what computes weights."""

    backbone: Backbone
    children: dict[str, list[str]]

    @classmethod
    def of(cls, backbone: Backbone) -> Tree:
        """Return the tree of a backbone."""
        children: dict[str, list[str]] = defaultdict(list)
        for name in backbone.modules:
            if name and not computes_weight(name):
                children[parent(name)].append(name)
        return cls(backbone, children)

    def below(self, name: str) -> Iterator[str]:
        """Yield the names of all modules inside the module `name`, in order."""
        for child in self.children.get(name, ()):
            yield child
            yield from self.below(child)

    def look(self, name: str, looks: dict[Hashable, int], seen: dict[str, int]) -> int:
        """Return a number that is equal for modules that are built alike."""
        if name not in seen:
            module = self.backbone.modules[name]
            kind = kind_of(module)
            size = () if kind is None else (kind.in_features, kind.out_features)
            beneath = tuple(
                (last(child), self.look(child, looks, seen))
                for child in self.children.get(name, ())
            )
            key = (plain_class(module) or type(module), size, beneath)
            seen[name] = looks.setdefault(key, len(looks))
        return seen[name]


def units(tree: Tree) -> list[str]:
    """Return the names of the blocks: items of lists that hold sublayers and are no sublayers.

    A list may be inside another list. If all items of the inner list are of one class, and not each
    with a single layer, they are blocks, as in Swin's stages, unless an attention stands beside the
    list; else they are the parts of a block, as in T5, unless what is around them is no block. The
    heads of an attention are no blocks, whether there is a list around their list or not. A module
    outside of lists is a block if it is of a block's class. A model without lists is one block, and
    so is one whose lists hold only items with a single layer, such as the GEGLU in a feed-forward.
    """
    places = [name for name in tree.backbone.modules if not computes_weight(name)]
    items = [name for name in places if _is_item(tree, name)]
    known = set(items)
    inner: set[str] = set()
    for name in items:
        around = next((a for a in [*ancestors(name)][1:] if a in known), None)
        if around is not None:
            siblings = tree.children[parent(name)]
            kinds = {type(tree.backbone.modules[s]) for s in siblings}
            alike = len(kinds) == 1 and len(siblings) > 1
            several = alike and any(_holds_several(tree, s) for s in siblings)
            several = several and not _attends(tree, around)
            inner |= {around} if several else {name}
    blocks = [name for name in items if name not in inner]
    kept = {around for name in blocks for around in ancestors(name)}
    # beside other blocks in an item that is none, as the attentions of a U-Net beside its resnets
    blocks += [n for n in items if n in inner - kept and not {*ancestors(n)} & {*blocks}]
    classes = {type(tree.backbone.modules[name]) for name in blocks}
    once = [n for n, m in tree.backbone.modules.items() if type(m) in classes and n not in known]
    blocks += [n for n in once if not any(a in known for a in ancestors(n))]
    if not any(_holds_several(tree, name) for name in blocks):
        return [""]
    return [n for n in tree.backbone.modules if n in set(blocks)]


def _holds_several(tree: Tree, name: str) -> bool:
    """True if a module has two layers with weights in it, norms aside."""
    inside = (tree.backbone.modules[n] for n in tree.below(name))
    return sum(is_node(module) and not is_norm(module) for module in inside) > 1


def _attends(tree: Tree, around: str) -> bool:
    """True if a part of a module is an attention by its name, and no list of them."""
    parts = {n: tree.backbone.modules[n] for n in tree.children[around]}
    alone = {n: m for n, m in parts.items() if not isinstance(m, LISTS)}
    kinds = (naming.sublayer(last(n), class_of(m))[0] for n, m in alone.items())
    return any(kind in ("attn", "cross_attn") for kind in kinds)


def _is_item(tree: Tree, name: str) -> bool:
    around, _, key = name.rpartition(".")
    module, holder = tree.backbone.modules[name], tree.backbone.modules.get(around)
    if not isinstance(holder, LISTS) or not has_forward(module) or is_node(module):
        return False
    if isinstance(module, LISTS) and not isinstance(module, nn.Sequential):
        return False
    held = naming.of_list(last(around))
    names = (held, key) if not key.isdigit() else (held,)
    for step in names:
        if naming.sublayer(step, class_of(module))[0] is not None:
            return False
    named = any(not last(child).isdigit() for child in tree.below(name))
    return named and not _is_head(tree, name)


def _is_head(tree: Tree, name: str) -> bool:
    """True if an item of a list is one head of an attention.

    It has only linears of queries, keys and values, and its list is one of heads, or the values
    have fewer channels than the input, so that it cannot be a layer among others.
    """
    modules = tree.backbone.modules
    kinds = {n: kind for n in tree.below(name) if (kind := kind_of(modules[n])) is not None}
    linears = {last(n): kind for n, kind in kinds.items() if kind.name == Kind.name}
    parts = {naming.attention_part(n, linears): kind for n, kind in linears.items()}
    if not parts or not parts.keys() <= {"q", "k", "v", "qkv", "kv"}:
        return False
    narrow = "v" in parts and parts["v"].out_features < parts["v"].in_features
    return narrow or "heads" in naming.tokens(last(parent(name)))
