"""Decide roles by the flow of data, for modules whose names say nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from ..._modules.kinds import kind_of
from ...names import last
from .deciding import (
    ACTIVATED,
    MIXING,
    PLACED,
    Block,
    Scope,
    give_bare,
    is_linear,
    parts_of_feed_forward,
)
from .flow import Flow, Node, downstream, inputs, is_norm, outputs, upstream, walk
from .naming import attention_part, tokens

PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm", "rmatmul", "__matmul__", "__rmatmul__"}
POOLS = {"mean", "max", "amax", "logsumexp"}  # of all tokens: what follows is a head
LETTERS = {"q": "q", "k": "k", "v": "v", "qkv": "qkv", "kv": "kv", "qk": "q"}


def give_by_flow(block: Block) -> None:
    """Decide the roles in attention and feed-forward that the names of sublayers do not show."""
    held = {role for role, _ in block.roles.values()}
    if not held & {"attn.q", "attn.qkv", "mixer.in"} or not held & {"attn.proj", "mixer.out"}:
        for flow in block.flows:
            _attention(block, flow)
    give_bare(block)
    if block.attends:
        give_feed_forward(block)


def give_feed_forward(block: Block) -> None:
    """Decide the roles in a feed-forward by the flow of data, if the block has none yet."""
    if not any(role.startswith("ff.") for role, _ in block.roles.values()):
        for flow in block.flows:
            _feed_forward(block, flow)


def _attention(block: Block, flow: Flow) -> None:
    for queries, keys, values, out in _attentions(block, flow):
        letters: dict[str, str] = defaultdict(str)
        for letter, start in (("q", queries), ("k", keys), ("v", values)):
            for node in _linears(block, flow, start):
                letters[node.name] += letter if letter not in letters[node.name] else ""
        said = {name: attention_part(last(name), ()) or "" for name in letters}
        if sorted(said.values()) == sorted(letters.values()) == ["k", "q", "v"]:
            letters |= said  # a softmax over the queries looks like one of swapped products
        sub = _kind(block, flow, letters)
        for name, found in letters.items():
            if found in LETTERS:
                why = f"its output is the attention's {', '.join(found)}"
                block.give(name, f"{sub}.{LETTERS[found]}", why)
        asked = [n for n, found in letters.items() if "q" in found]
        for node in _first_after(block, out, queries) if letters else ():
            if node.name not in letters and _gives_back(block, node.name, asked):
                block.give(node.name, f"{sub}.proj", "it is the first after the attention")


def _gives_back(block: Block, name: str, asked: list[str]) -> bool:
    """True if a linear gives as many values as those that give the queries take, or none is known.

    Else it is a head, as of a classifier.
    """
    widths = {block.size(each)[0] for each in asked}
    return not widths or block.size(name)[1] in widths


def _kind(block: Block, flow: Flow, letters: dict[str, str]) -> str:
    """Return attn or cross_attn, for the {name of a linear: those of "qkv" that it gives}.

    It is what the names said of some of these linears; else what the flow of data says.
    """
    known = {block.roles[name][0].partition(".")[0] for name in letters if name in block.roles}
    if len(known) == 1 and known <= {"attn", "cross_attn"}:
        return known.pop()
    return "cross_attn" if _is_cross(block, flow, letters) else "attn"


def _is_cross(block: Block, flow: Flow, letters: dict[str, str]) -> bool:
    """True if keys come from another source than queries, or if a name beside another says so.

    It is no proof that the block takes queries, keys and values apart, by these names.
    """
    queries, keys = (
        {node for name in names for node in _sources(block, flow, name)}
        for names in ([n for n, found in letters.items() if letter in found] for letter in "qk")
    )
    asked = {n for name in letters for n in _asked(flow, name) if "k" in letters[name]}
    apart = all(attention_part(name, ()) in ("q", "k", "v") for name in (flow.first, *asked))
    if queries and keys and queries.isdisjoint(keys):
        return not (apart and asked)
    kinds = [s.kind for s in block.scopes.values() if s.kind in ("attn", "cross_attn")]
    scopes = (block.scope_of.get(name) for name in letters)
    return len(kinds) > 1 and any(scope and scope.kind == "cross_attn" for scope in scopes)


def _sources(block: Block, flow: Flow, name: str) -> set[Node]:
    """Return the calls and inputs that what the named linear takes comes from.

    What an attention gives comes from where its queries do, its first input.
    """

    def before(node: Node) -> list[Node]:
        mixes = MIXING.search(node.op) or (node.op == "call" and node.name not in layers)
        return node.inputs[:1] if mixes else node.inputs

    layers = {n for n, m in block.modules.items() if kind_of(m) is not None or is_norm(m)}
    found = {n for call in flow.calls[name] for n in walk(call, before, lambda _: True)}
    return {n for n in found if n.op == "call" or (n.op == "input" and not PLACED.search(n.name))}


def _first_after(block: Block, out: Node, queries: Node) -> Iterator[Node]:
    """Yield the first linears after an attention, before the residual connection around it."""
    before = {queries, *walk(queries, inputs, lambda _: True)}

    def ends(node: Node) -> bool:
        adds_to_old = node.op.startswith("add") and not before.isdisjoint(node.inputs)
        return adds_to_old or node.op in POOLS or _is_linear(block, node)

    return (n for n in downstream(out, lambda n: not ends(n)) if _is_linear(block, n))


def _attentions(block: Block, flow: Flow) -> Iterator[tuple[Node, Node, Node, Node]]:
    """Yield the steps (query, key, value, output) of each attention in a flow."""
    for node in flow.nodes:
        if node.op == "scaled_dot_product_attention" and len(node.inputs) > 2:
            yield node.inputs[0], node.inputs[1], node.inputs[2], node
        elif node.op.lower() == "softmax":
            scores = [n for n in upstream(node, _keeps) if n.op in PRODUCTS and n.inputs[1:]]
            after = [node, *walk(node, outputs, _keeps)]
            sums = [n for n in after if n.op in PRODUCTS]
            if scores and sums and sums[0].inputs[1:]:
                weighed = [n for n in sums[0].inputs[:2] if n not in after]
                values = weighed[0] if weighed else sums[0].inputs[1]
                product = _of_keys(block, flow, scores, values)
                yield product.inputs[0], product.inputs[1], values, sums[0]


def _of_keys(block: Block, flow: Flow, scores: list[Node], values: Node) -> Node:
    """Return the last of the products in the scores whose keys come from where the values do.

    The keys of others are of relative positions. It is the last of all if there is no such product.
    """

    def origin(start: Node) -> set[str]:
        return {n for node in _linears(block, flow, start) for n in _asked(flow, node.name)}

    own = [n for n in scores if origin(n.inputs[1]) & origin(values)]
    return max(own or scores, key=lambda n: n.number)


def _keeps(node: Node) -> bool:
    """True if a search between the products of an attention goes on through this step."""
    return node.op not in PRODUCTS and node.op not in ("call", "input")


def _linears(block: Block, flow: Flow, start: Node) -> list[Node]:
    """Return the step itself if it is a linear; else the nearest linears before it, past norms."""
    if _is_linear(block, start):
        return [start]
    before = upstream(start, block.keeps_state)
    return [n for n in before if _is_linear(block, n) and "router" not in tokens(n.name)]


def _is_linear(block: Block, node: Node) -> bool:
    return node.op == "call" and node.name in block.modules and is_linear(block.modules[node.name])


def _asked(flow: Flow, name: str) -> set[str]:
    """Return the names of the block's inputs that reach the named module."""
    before = (n for node in flow.calls[name] for n in upstream(node, lambda n: n.op != "input"))
    return {n.name for n in before if n.op == "input" and not PLACED.search(n.name)}


def _feed_forward(block: Block, flow: Flow) -> None:
    """Decide the roles of linears whose output is activated, and of the linear that takes it.

    What goes into several linears is no part of a feed-forward, as an embedding of the time.
    """
    starts: dict[str, list[str]] = defaultdict(list)
    for name, calls in flow.calls.items():
        if name in block.roles or name not in block.modules or not _is_linear(block, calls[0]):
            continue
        for node in downstream(calls[0], block.keeps_state):
            fits = _is_linear(block, node) and node.name not in block.roles
            if fits and block.size(name)[0] == block.size(node.name)[1]:
                starts[node.name].append(name)
    taken = Counter(name for names in starts.values() for name in names)
    for end, names in starts.items():
        names = [name for name in names if taken[name] == 1]
        between = (n for s in names for n in _between(block, flow, s, end))
        activated = any(ACTIVATED.search(n.op) for n in between)
        if activated and end not in names:
            scope = Scope("ff", "", f"its output is activated and goes into {end!r}")
            parts_of_feed_forward(block, {**dict.fromkeys(names, "first"), end: "last"}, scope)


def _between(block: Block, flow: Flow, start: str, end: str) -> set[Node]:
    """Return the steps by which what a linear gives goes into another one."""
    after = walk(flow.calls[start][0], outputs, block.keeps_state)
    return {*after}.intersection(walk(flow.calls[end][0], inputs, block.keeps_state))
