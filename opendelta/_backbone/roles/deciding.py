"""Decide the role of each module in a block: by names and shapes, or else by the flow of data."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ..._modules.kinds import Kind, kind_of
from ...names import dotted, join, last, parent
from . import naming
from .blocks import Tree, class_of
from .flow import Flow, Node, holds_many, is_node, is_norm, outputs, trace, upstream, walk
from .scopes import Scope, find_more_attentions, look_at_crosses

Decision = tuple[str, str]  # a role, the reason
INNER = {"q", "k", "v", "qkv", "kv", "in", "w1", "gate", "gate_up"}
ACTIVATED = re.compile(r"silu|gelu|relu|sigmoid|tanh|swish|mish|elu|softplus|act", re.I)
HIDDEN = re.compile(
    r"hidden|input|^x$|^h$|embed|state|src|tgt|query|memory|latent|output|feat", re.I
)
PLACED = re.compile(r"rope|rotary|cos|sin|freq|position|mask", re.I)
# What a feed-forward has not between its linears: attention, and weights that are bare parameters.
MIXING = re.compile(r"matmul|mm$|einsum|^linear$|attention|attn")
ROUTER = {"router", "gate", "gating"}
GATES = re.compile(r"(hard_?)?sigmoid_?", re.I)


class Block:
    """One block, with the roles and scopes of its modules that are known so far.

    Args:
        tree: the tree of the whole model.
        where: the name of the block.
    """

    def __init__(self, tree: Tree, where: str) -> None:
        self.where, self.tree = where, tree
        start = dotted(where)
        self.modules: dict[str, nn.Module] = {"": tree.backbone.modules[where]}
        self.modules |= {n.removeprefix(start): tree.backbone.modules[n] for n in tree.below(where)}
        self.roles: dict[str, Decision] = {}
        self.scopes: dict[str, Scope] = {}
        self.scope_of: dict[str, Scope] = {}
        self._find_scopes()

    @functools.cached_property
    def flows(self) -> list[Flow]:
        """Return the flows of data through the block, for forwards with fewer or more arguments."""
        return trace(self.tree.backbone.modules[self.where])

    def flow_of(self, *names: str) -> Flow | None:
        """Return a flow that calls all the named modules; None if there is none."""
        return next((f for f in self.flows if all(name in f.calls for name in names)), None)

    def keeps_state(self, node: Node) -> bool:
        """True if a step only reshapes, weighs or normalises: an operation, or a normalisation."""
        if node.op == "call":
            return node.name in self.modules and is_norm(self.modules[node.name])
        return node.op not in ("input", "weight")

    def fed_by(self, flow: Flow, name: str) -> set[str]:
        """Return the names of what gives the input of a module, past norms but no products."""
        before = upstream(
            flow.calls[name][0], lambda n: self.keeps_state(n) and not MIXING.search(n.op)
        )
        return {node.name for node in before}

    @property
    def attends(self) -> bool:
        """Whether modules of an attention or a mixer are known in the block."""
        return any(role.startswith(("attn.", "mixer.")) for role, _ in self.roles.values())

    def give(self, name: str, role: str, reason: str) -> None:
        """Decide the role of a module, unless it is decided already."""
        self.roles.setdefault(name, (role, reason))

    def _find_scopes(self) -> None:
        kinds: dict[str, Scope | None] = {"": None}
        for name, module in list(self.modules.items())[1:]:
            around = kinds[name] = kinds[parent(name)]
            if is_node(module) and not isinstance(module, nn.MultiheadAttention):
                if around is not None and kind_of(module) is not None:
                    around.linears.append(name)
                if around is not None:
                    self.scope_of[name] = around
                continue
            scope = self._scope(name, module, around)
            if scope is not None:
                kinds[name] = self.scopes.setdefault(scope.name, scope)
            if kinds[name] is not None:
                self.scope_of[name] = kinds[name]  # type: ignore[assignment]
        find_more_attentions(self)
        look_at_crosses(self)

    def _scope(self, name: str, module: nn.Module, around: Scope | None) -> Scope | None:
        """Return the scope that a module itself begins; None if it begins none."""
        key, cls = name.rpartition(".")[2], class_of(module)
        if key.isdigit() and around is not None:  # an item of a list of experts, or of sublayers
            fits = around.kind != "other" and len(self.linears_in(name)) > 1
            return Scope(around.kind, name, around.reason, around) if fits else None
        kind = None if around is None else around.kind
        own, reason = naming.sublayer(key, cls, kind, class_of(self.modules[""]))
        if own is None:
            if around is None and naming.is_weak(key):
                shared = re.sub(r"_?(?:intermediate|inter|output)", "", name)
                return Scope("ff", f"{shared}*", f"its name {key!r}")
            return None
        if kind in ("attn", "cross_attn", "mixer") and own != "other":
            return None  # the module is a part of the scope around it
        if kind == own == "ff" and len(self.linears_in(name)) == 1:
            return None
        if own == "attn" and naming.is_cross(name, cls):
            return Scope("cross_attn", name, f"{reason}, which says cross-attention")
        return Scope(own, name, reason, around)

    def inside(self, name: str) -> list[str]:
        """Return the names of the modules inside the module `name`, in order."""
        start = dotted(self.where)
        return [n.removeprefix(start) for n in self.tree.below(join(self.where, name))]

    def linears_in(self, name: str) -> list[str]:
        """Return the names of the linear modules inside the module `name`, in order."""
        return [n for n in self.inside(name) if is_linear(self.modules[n])]

    def linears(self, scope: Scope) -> list[str]:
        """Return the linear modules of a scope."""
        return [name for name in scope.linears if is_linear(self.modules[name])]

    def size(self, name: str) -> tuple[int, int]:
        """Return (in_features, out_features) of a linear module."""
        kind = kind_of(self.modules[name])
        assert kind is not None
        return kind.in_features, kind.out_features

    def own_name(self, name: str, scope: Scope) -> str:
        """Return the last step of a linear's name that says something; `dense` says nothing."""
        parts = name.removeprefix(f"{scope.name}.").split(".")
        while len(parts) > 1 and (parts[-1] in naming.GENERIC or parts[-1].isdigit()):
            parts.pop()
        return parts[-1]


def is_linear(module: nn.Module) -> bool:
    """True if a module is a linear layer, quantised or not."""
    kind = kind_of(module)
    return kind is not None and kind.name == Kind.name and not is_norm(module)


def by_names(tree: Tree, where: str) -> Block:
    """Return the block at `where` with the roles that follow from names and sizes."""
    block = Block(tree, where)
    for scope in list(block.scopes.values()):
        if scope.kind in ("attn", "cross_attn"):
            _attention(block, scope)
        elif scope.kind == "mixer":
            _mixer(block, scope)
        elif scope.kind == "ff":
            _feed_forward(block, scope)
    return block


# ------------------------------------------------------------------- attention and mixers
def _attention(block: Block, scope: Scope) -> None:
    names = {name: block.own_name(name, scope) for name in block.linears(scope)}
    for name, own in names.items():
        part = naming.attention_part(own, list(names.values()))
        if part is not None and block.size(name)[1] > 1:  # one output is a score
            block.give(name, f"{scope.kind}.{part}", f"{own!r} in {scope.label}: {scope.reason}")


def _mixer(block: Block, scope: Scope) -> None:
    for name in block.linears(scope):
        own = block.own_name(name, scope)
        part = naming.mixer_part(own)
        if part is not None:
            block.give(name, f"mixer.{part}", f"{own!r} in {scope.label}: {scope.reason}")


# ------------------------------------------------------------------------------ feed-forward
def _feed_forward(block: Block, scope: Scope) -> None:
    _experts(block, scope)
    names = {}
    for name in block.linears(scope):
        own = block.own_name(name, scope)
        if name not in block.roles and not own.endswith("expert_gate"):
            names[name] = None if own.isdigit() else naming.feed_forward_part(own)
    parts_of_feed_forward(block, names, scope)


def _experts(block: Block, scope: Scope) -> None:
    """Decide the router and the experts, if the scope holds a mixture of experts."""
    inner = block.inside(scope.name)
    experts = [n for n in inner if _holds_experts(n, block.modules[n])]
    for name in experts:
        block.give(name, "ff.experts", f"{name!r} holds the experts")
    if not experts:
        return
    for name in inner:
        key = name.rpartition(".")[2]
        first = name.removeprefix(f"{scope.name}.")
        routes = set(naming.tokens(key)) & ROUTER and not key.endswith("expert_gate")
        if routes and "." not in first and not name.startswith(tuple(f"{e}." for e in experts)):
            held = block.linears_in(name)
            target = held[0] if len(held) == 1 else name
            block.give(target, "ff.router", f"{key!r} beside the experts of {scope.label}")


def _holds_experts(name: str, module: nn.Module) -> bool:
    if holds_many(module):
        return name.endswith("experts") or class_of(module).endswith("Experts")
    return name.endswith("experts") and "shared" not in name and not is_linear(module)


def parts_of_feed_forward(block: Block, names: dict[str, str | None], scope: Scope) -> None:
    """Decide the roles of the linears of one feed-forward, by their names, sizes and flow.

    Args:
        names: {name of a linear: "first", "gate", "gate_up", "last", or None if unknown}.
    """
    if not names:
        return
    flow, ends = block.flow_of(*names), None
    if flow is not None:
        names = {name: names[name] for name in sorted(names, key=flow.place)}
        ends = _ends_in_flow(block, names, flow)
    last, first = ends or _ends_by_names(block, names)
    if not last or not first or not _gives_back(block, last[0], first):
        return  # it gives logits, or goes to another width
    if any(_is_gate(block, name) for name in last):
        return
    why = f"in {scope.label}: {scope.reason}"
    for name in last:
        block.give(name, "ff.w2", f"{block.own_name(name, scope)!r} {why}")
    width = block.size(last[0])[0]
    wide = [n for n in first if block.size(n)[1] == width]
    for name in first:
        own, out = block.own_name(name, scope), block.size(name)[1]
        if out == 2 * width:
            block.give(name, "ff.gate_up", f"{own!r} {why}; it is twice as wide as {last[0]!r} in")
        elif names[name] == "gate" and out == block.size(last[0])[1] != width:
            block.give(name, "ff.gate", f"{own!r} {why}; it gates what {last[0]!r} gives")
    if len(wide) == 2 and (_feeds(block, *wide) or _feeds(block, *wide[::-1])):
        wide.pop()  # one of them is between the other and the last
    if len(wide) == 2:
        gate, reason = _gate(block, wide, names)
        block.give(gate, "ff.gate", f"{reason} {why}")
        wide.remove(gate)
    for name in wide:
        block.give(name, "ff.w1", f"{block.own_name(name, scope)!r} {why}")


def _gives_back(block: Block, end: str, first: list[str]) -> bool:
    """True if a linear gives the width that the first ones take, or that an attention beside takes.

    The first ones may take what an attention gives along with the states, as in LightGlue. The
    items of a list may go to another width, as between the stages of a vision model.
    """
    out = block.size(end)[1]
    if last(block.where).isdigit():
        return out > 1
    beside = [s for s in block.scopes.values() if s.kind in ("attn", "cross_attn")]
    taking = [*first, *(name for scope in beside for name in block.linears(scope))]
    return out in {block.size(name)[0] for name in taking}


def _is_gate(block: Block, name: str) -> bool:
    """True if what a linear gives becomes a gate, as in squeeze and excitation (arXiv:1709.01507).

    That is a factor of what others give; or they are shares of a router.
    """
    flow = block.flow_of(name)

    def alone(node: Node) -> bool:
        before = upstream(node, lambda n: n.op not in ("call", "input"))
        return node.op != "call" and all(n.name == name for n in before)

    after = () if flow is None else walk(flow.calls[name][0], outputs, alone)
    own = [node for node in after if alone(node)]
    gates = [node for node in own if GATES.fullmatch(node.op)]
    met = (node for gate in gates for node in walk(gate, outputs, alone) if not alone(node))
    return any(node.op.lower() == "softmax" for node in own) or any("mul" in n.op for n in met)


def _ends_in_flow(
    block: Block, names: dict[str, str | None], flow: Flow
) -> tuple[list[str], list[str]] | None:
    """Return the last linear of a feed-forward and those before it, as the flow of data shows.

    None if it is not so that one of the linears takes what one or two others give. A gate that the
    last one does not take gates what that one gives.
    """
    taken = {name: block.fed_by(flow, name) & names.keys() for name in names}
    ends = [name for name in names if taken[name]]
    if len(ends) != 1 or len(taken[ends[0]]) > 2:
        return None
    starts = taken[ends[0]]
    return ends, [n for n in names if n in starts or (names[n] == "gate" and n not in ends)]


def _ends_by_names(block: Block, names: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """Return the last linears of a feed-forward and those before them, as their names show."""
    last = [n for n, part in names.items() if part == "last"]
    unknown = [n for n, part in names.items() if part is None]
    if not last and len(names) > 1:
        last = [list(names)[-1]]
    beside = _beside_gate(block, names, last[-1:])
    last = [n for n in last if n not in beside]
    if len(last) == 1:  # as the third of w1, w2 and w3, which may gate or not
        last = [n for n in names if names[n] == "first" and _feeds(block, last[0], n)][-1:] or last
    first = [n for n, part in names.items() if (part or n in beside) and n not in last]
    first += [n for n in unknown if n not in last and not first]
    return last, first


def _beside_gate(block: Block, names: dict[str, str | None], last: list[str]) -> list[str]:
    """Return the linears that a gate gates, if no name says which: those of the gate's sizes."""
    sizes = {block.size(n) for n, part in names.items() if part == "gate"}
    if "first" in names.values():
        return []
    others = (n for n, part in names.items() if part != "gate" and n not in last)
    return [n for n in others if block.size(n) in sizes]


def _feeds(block: Block, one: str, other: str) -> bool:
    """True if what the linear `one` gives reaches `other`, as the flow of data shows."""
    flow = block.flow_of(one, other)
    after = () if flow is None else walk(flow.calls[one][0], outputs, lambda _: True)
    return flow is not None and flow.calls[other][0] in after


def _gate(block: Block, pair: list[str], names: dict[str, str | None]) -> tuple[str, str]:
    """Return the gate, which is the activated one of two parallel linears, and the reason."""
    one, other = pair
    flow = block.flow_of(one, other)
    if flow is not None:
        calls = flow.calls
        found = {n: _activations(calls[n][0], calls[o][0]) for n, o in ((one, other), (other, one))}
        if found[one] != found[other]:
            gate = one if found[one] else other
            return gate, f"its output is activated, that of {other if gate == one else one!r} not:"
    named = [n for n in pair if names[n] in ("gate", "gate_up")]
    return (named[0], "its name") if named else (one, "the first of two")


def _activations(node: Node, other: Node) -> bool:
    """True if the output of `node` passes an activation before it meets the output of `other`."""
    mine, its = _after(node), _after(other)
    meet = min((n.number for n in mine & its), default=None)
    return any(
        ACTIVATED.search(n.op) for n in mine - its if meet is None or n.number < meet
    )  # fmt: skip


def _after(node: Node) -> set[Node]:
    return {*walk(node, outputs, lambda n: n.op != "call")}


def give_bare(block: Block) -> None:
    """Decide the roles of feed-forwards without a module of their own, such as fc1 and fc2."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, module in block.modules.items():
        parent, _, key = name.rpartition(".")
        scope = block.scope_of.get(name)
        free = scope is None and name not in block.roles and is_linear(module)
        if free and naming.BARE.fullmatch(key):
            groups[parent].append(name)
    for parent, linears in groups.items():
        scope = Scope(
            "ff", parent or block.where, "names like those of a feed-forward", None, linears
        )
        if _fit(block, linears):
            linears += _beside(block, linears)
            names = {n: naming.feed_forward_part(n.rpartition(".")[2]) for n in linears}
            for name in linears:
                block.scope_of[name] = scope
            parts_of_feed_forward(block, names, scope)


def _beside(block: Block, linears: list[str]) -> list[str]:
    """Return the other linears that feed the last of some linears, of the size of one of these."""
    flow = block.flow_of(*linears)
    if flow is None:
        return []
    before = block.fed_by(flow, max(linears, key=flow.place))
    sizes = {block.size(name) for name in linears if name in before}
    others = (n for n in block.modules if n in before and n not in {*linears, *block.roles})
    free = (n for n in others if n not in block.scope_of and is_linear(block.modules[n]))
    return [name for name in free if block.size(name) in sizes]


def _fit(block: Block, linears: Iterable[str]) -> bool:
    sizes = [block.size(name) for name in linears]
    return len(sizes) > 1 and sizes[0][0] == sizes[-1][1]
