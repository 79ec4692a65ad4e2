"""Decide which sublayer a normalisation belongs to: the one it feeds, or the one it follows."""

from __future__ import annotations

from ...names import parent
from .deciding import HIDDEN, INNER, PLACED, Block
from .flow import Flow, Node, downstream, is_norm, upstream

FED = ("attn", "cross_attn", "ff")


def give_norms(block: Block) -> None:
    """Decide the roles of the norms of a block by the flow of data; its sublayers are known."""
    if not block.roles:
        return
    norms = [name for name, module in block.modules.items() if is_norm(module)]
    for name in norms:
        flow = block.flow_of(name)
        found = _by_order(block, name, norms) if flow is None else _by_flow(block, flow, name)
        if found is not None:
            block.give(name, f"{found[0]}.layer_norm", found[1])


def _sublayer(block: Block, node: Node) -> str | None:
    """Return the sublayer that a step belongs to, or None."""
    name = node.name
    if name in block.roles:
        return block.roles[name][0].partition(".")[0]
    if node.op == "weight":
        name = parent(name)
    scope = block.scope_of.get(name)
    return None if scope is None else scope.sublayer


def _is_stop(block: Block, node: Node) -> bool:
    if node.op == "weight":
        return _sublayer(block, node) is not None
    return node.op in ("call", "input")


def _by_flow(block: Block, flow: Flow, name: str) -> tuple[str, str] | None:
    before: list[Node] = []
    after: list[Node] = []
    for node in flow.calls[name]:
        before += upstream(node, lambda n: not _is_stop(block, n))
        after += (n for n in downstream(node, lambda n: n.op != "call") if n.op == "call")
    if not any(_is_boundary(block, flow, node) for node in before):
        return None
    passes = any(flow.reaches_output(node) for node in flow.calls[name])
    passes = passes or any(_is_norm(block, node) for node in after)
    fed = [sub for node in after if (sub := _sublayer(block, node)) in FED]
    if passes:
        ends = [n for n in before if not _is_norm(block, n) and n.op != "input"]
        latest = max(ends, key=lambda n: n.number, default=None)
        if latest is not None:
            sub = _sublayer(block, latest)
            return (sub, f"it follows {latest.name!r}") if sub in FED else None
        if any(n.op == "add" for node in flow.calls[name] for n in node.inputs):
            return None  # the norm follows a step without weights, such as a Fourier transform
    if fed:
        sub = min(fed, key=FED.index)
        node = next(n for n in after if _sublayer(block, n) == sub)
        return sub, f"it feeds {node.name!r}"
    return None


def _is_norm(block: Block, node: Node) -> bool:
    module = block.modules.get(node.name)
    return node.op == "call" and module is not None and is_norm(module)


def _is_boundary(block: Block, flow: Flow, node: Node) -> bool:
    """True if a step returns hidden states as they are between sublayers."""
    if node.op == "input":
        if node.name == flow.first:
            return True
        return bool(HIDDEN.search(node.name)) and not PLACED.search(node.name)
    if _is_norm(block, node):
        return True
    role = block.roles.get(node.name, ("", ""))[0].partition(".")[2]
    if role:
        return role not in INNER and role != "router"
    return _sublayer(block, node) in (None, "other") or node.op == "weight"


def _by_order(block: Block, name: str, norms: list[str]) -> tuple[str, str] | None:
    """Return the sublayer of a norm that the flow did not reach, by its place in the block."""
    scope = block.scope_of.get(name)
    if scope is not None and scope.kind in ("mixer", "other"):
        return None
    kinds = list(dict.fromkeys(r.partition(".")[0] for r, _ in block.roles.values()))
    subs = [kind for kind in FED if kind in kinds]
    if scope is not None:
        deep = name.removeprefix(f"{scope.name}.").count(".")
        return (scope.kind, f"it is in {scope.name}") if deep else None
    outer = [n for n in norms if n not in block.scope_of]
    if len(outer) == len(subs):
        return subs[outer.index(name)], "by order: the flow of data did not reach it"
    return None
