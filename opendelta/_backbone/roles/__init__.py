"""Which modules play which role in any architecture: attn.q, ff.w2, embeddings, lm_head.proj."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, overload

import torch
from torch import nn

from ..._modules.kinds import Embedding, kind_of
from ...errors import AddressError, OptionError, nearest
from ...names import ancestors, last
from ..backbone import Backbone
from ..patterns import compile_pattern, no_match, repeated
from .blocks import Tree, units
from .deciding import Decision, by_names, is_linear
from .flow import is_norm
from .norms import give_norms
from .unnamed import give_by_flow

SUBLAYERS = ("attn", "cross_attn")
ROLES = (
    *(f"{sub}.{part}" for sub in SUBLAYERS for part in ("q", "k", "v", "qkv", "kv", "proj")),
    *(f"{sub}.layer_norm" for sub in (*SUBLAYERS, "ff")),
    *(f"ff.{part}" for part in ("w1", "gate", "gate_up", "w2", "experts", "router")),
    "mixer.in", "mixer.out", "embeddings", "lm_head.proj",
)  # fmt: skip
# One fused projection plays several roles.
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "w1")}
# What modules that play a part are often called, for messages.
ALIKE = {
    "q": ("query", "q_proj"), "k": ("key", "k_proj"), "v": ("value", "v_proj"),
    "proj": ("out_proj", "o_proj"), "w1": ("fc1", "up_proj"), "w2": ("fc2", "down_proj"),
}  # fmt: skip
TOKENS = re.compile(
    r"(?:embed_tokens|(?:word|tok|token)_embed(?:ding|dings)?|wte|shared|embed_in|tok_emb|"
    r"embeddings?\.(?:word|token)_embeddings?)(?:\.\d+)?$"
)
HEADS = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|generator_lm_head|pred_layer\.proj|output_projection|"
    r"lm_head\.decoder|predictions\.decoder|decoder\.output_projection)$"
)


@overload
def roles(
    model: nn.Module, override: Mapping[str, str | None] | None = None, why: Literal[False] = False
) -> dict[str, str]: ...


@overload
def roles(
    model: nn.Module, override: Mapping[str, str | None] | None = None, *, why: Literal[True]
) -> dict[str, Decision]: ...


def roles(
    model: nn.Module, override: Mapping[str, str | None] | None = None, why: bool = False
) -> dict[str, str] | dict[str, Decision]:
    """{full name of a module: its role}, for every module of `model` that plays one.

    Roles are found in repeated blocks of any architecture: in attention `attn.q`, `attn.k`,
    `attn.v`, `attn.qkv` (one projection for all), `attn.kv` (one for keys and values, or their
    latents), `attn.proj` and `attn.layer_norm`, the same under `cross_attn.`; in feed-forwards
    `ff.w1` (up), `ff.gate` (the branch that is activated), `ff.gate_up` (both in one), `ff.w2`
    (down), `ff.layer_norm`, `ff.experts` and `ff.router`; in state-space and linear-attention
    mixers `mixer.in` and `mixer.out`; outside of blocks `embeddings` (of tokens, tied copies too)
    and `lm_head.proj`. A norm belongs to the sublayer that it feeds, or else follows.

    Args:
        override: {pattern: role, or None for no role}, for modules that are to have another role
            than the one found; the patterns are those of `modified_modules`.
        why: whether to give the reason of each decision too: {name: (role, reason)}.

    Raises:
        AddressError: a pattern of `override` selects nothing.
        OptionError: `override` names a role that there is not.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> opendelta.roles(model)["layers.0.linear1"]
        'ff.w1'
        >>> opendelta.roles(model, override={"linear1": None}).get("layers.0.linear1")
    """
    found = _decisions(Backbone.of(model), override)
    return found if why else {name: role for name, (role, _) in found.items()}


def _decisions(
    backbone: Backbone, override: Mapping[str, str | None] | None = None
) -> dict[str, Decision]:
    decided = _in_blocks(Tree.of(backbone))
    for name, reason in _embeddings(backbone).items():
        decided[name] = "embeddings", reason
    for name, reason in _heads(backbone).items():
        decided[name] = "lm_head.proj", reason
    for pattern, role in (override or {}).items():
        if role is not None and role not in ROLES:
            raise OptionError(
                f"override[{pattern!r}]={role!r} is no role; nearest: "
                f"{', '.join(nearest(role, ROLES)) or ', '.join(ROLES)}"
            )
        matches = compile_pattern(pattern)
        chosen = [name for name in backbone.modules if name and matches(name)]
        if not chosen:
            raise no_match(pattern, backbone.modules, backbone.model)
        for name in chosen:
            decided.pop(name, None)
            if role is not None:
                decided[name] = role, f"override: {pattern!r}"
    return {name: decided[name] for name in backbone.modules if name in decided}


def _in_blocks(tree: Tree) -> dict[str, Decision]:
    """The roles inside all blocks; of those that are built alike, one is looked into."""
    looks: dict[Hashable, int] = {}
    seen: dict[str, int] = {}
    known: dict[int, dict[str, Decision]] = {}
    decided: dict[str, Decision] = {}
    for where in units(tree):
        look = tree.look(where, looks, seen)
        if look not in known:
            block = by_names(tree, where)
            give_by_flow(block)
            give_norms(block)
            known[look] = block.roles
        start = f"{where}." if where else ""
        decided |= {f"{start}{name}": decision for name, decision in known[look].items()}
    return decided


def _embeddings(backbone: Backbone) -> dict[str, str]:
    """{name of a token embedding: the reason}, with all modules that hold the same weight."""
    chosen: dict[str, str] = {}
    names = {id(module): name for name, module in backbone.modules.items()}
    for name, module in backbone.modules.items():
        if isinstance(kind_of(module), Embedding) and TOKENS.search(name):
            chosen[name] = f"an embedding called {name.rpartition('.')[2]!r}"
        elif hasattr(module, "get_input_embeddings"):
            try:
                held = module.get_input_embeddings()  # type: ignore[operator]
            except (NotImplementedError, AttributeError):  # as models of other inputs say
                continue
            where = names.get(id(held))
            if where is not None and isinstance(kind_of(backbone.modules[where]), Embedding):
                chosen.setdefault(where, f"get_input_embeddings() of {type(module).__name__}")
    weights = {id(backbone.modules[name]._parameters.get("weight")): name for name in chosen}
    for name, module in backbone.modules.items():
        weight = module._parameters.get("weight") if not _is_script(module) else None
        if weight is not None and id(weight) in weights and isinstance(kind_of(module), Embedding):
            chosen.setdefault(name, f"it has the weight of {weights[id(weight)]!r}")
    return chosen


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _heads(backbone: Backbone) -> dict[str, str]:
    """{name of a linear layer that gives the logits of tokens: the reason}."""
    chosen: dict[str, str] = {}
    names = {id(module): name for name, module in backbone.modules.items()}
    for name, module in backbone.modules.items():
        if HEADS.search(name) and is_linear(module):
            chosen[name] = f"a linear layer called {name.rpartition('.')[2]!r}"
        elif hasattr(module, "get_output_embeddings"):
            try:
                held = module.get_output_embeddings()  # type: ignore[operator]
            except (NotImplementedError, AttributeError):
                continue
            where = names.get(id(held))
            if where is not None and is_linear(backbone.modules[where]):
                chosen.setdefault(where, f"get_output_embeddings() of {type(module).__name__}")
    return chosen


def _plays(role: str, wanted: str) -> bool:
    sublayer, _, part = role.partition(".")
    return wanted in (role, *(f"{sublayer}.{p}" for p in FUSED.get(part, ())))


def _sublayers(backbone: Backbone, known: dict[str, str], wanted: str) -> list[str]:
    """The modules that hold all of a sublayer, such as `attn`, or its parts where none holds them.

    A module holds a sublayer if it is around its parts and around no part of another.
    """
    blocks = set(units(Tree.of(backbone)))
    holders: dict[str, list[str]] = {}
    for name, role in known.items():
        if role.partition(".")[0] == wanted and not role.endswith(".layer_norm"):
            block = next((a for a in ancestors(name) if a in blocks), None)
            if block is None:  # no block, but a list of attentions and one of feed-forwards
                block = re.sub(r"(?<![^.])(\d+)\..*", r"\1", name)
            holders.setdefault(block, []).append(name)
    chosen = []
    for parts in holders.values():
        around = backbone.innermost_around(parts)
        inside = {known[n].partition(".")[0] for n in known if n.startswith(f"{around}.")}
        chosen += [around] if inside == {wanted} else parts
    return chosen


def with_roles(
    backbone: Backbone,
    wanted: Sequence[str],
    override: Mapping[str, str | None] | None = None,
    some: bool = False,
) -> list[str]:
    """The full names of the modules that play any of the `wanted` roles.

    A fused projection is found by each role it plays: GPT-2's `attn.qkv` is its `attn.q`. A
    sublayer, `attn`, is the module that holds all of it, or else its parts; `layer_norm` is every
    normalisation, `root` the backbone itself. The spelling of OpenDelta's files, `attn@.q@`, is the
    same as `attn.q`.

    Args:
        override: see `roles`.
        some: it is enough if one of the roles is found.

    Raises:
        AddressError: no module has such a role.
    """
    known = {name: role for name, (role, _) in _decisions(backbone, override).items()}
    chosen = set()
    missing = []
    for role in (w.replace("@", "") for w in wanted):
        hits = {name for name, has in known.items() if _plays(has, role)}
        if role == "root":
            hits = {""}
        elif role == "layer_norm":
            hits = {name for name, module in backbone.modules.items() if is_norm(module)}
        elif "." not in role and role not in known.values():
            hits = set(_sublayers(backbone, known, role))
        if not hits:
            missing.append(role)
        chosen |= hits
    if missing and not (some and chosen):
        raise _unknown(backbone, known, missing[0])
    return [name for name in backbone.modules if name in chosen]


def _unknown(backbone: Backbone, known: Mapping[str, str], role: str) -> AddressError:
    """The error for a role that no module plays, with what could be named in its place."""
    held = sorted(set(known.values()))
    alike = nearest(role, held)
    near = ", ".join(alike) or "none"
    reason = (
        f"the roles in it are {', '.join(held)}; nearest: {near}"
        if known
        else "its architecture is not known"
    )
    linears = [name for name, module in backbone.modules.items() if name and is_linear(module)]
    ends = Counter(last(name) for name in linears)
    part = last(role)
    likely = [end for word in (*ALIKE.get(part, ()), part) for end in nearest(word, ends, 1)]
    likely = list(dict.fromkeys([*likely, *(end for end, _ in ends.most_common())]))[:2]
    hints = " or ".join(f"{end!r} ({ends[end]} module{'s' * (ends[end] > 1)})" for end in likely)
    blocks = repeated(backbone.modules)
    return AddressError(
        f"no module of {type(backbone.model).__name__} has the role {role!r}: {reason}. Name the "
        "modules instead: modified_modules=[...]"
        + (f", such as {hints}" if hints else "")
        + (f"; its repeated blocks are {blocks}" if blocks else "")
        + "; opendelta.tree(model) prints all names",
        role,
        alike,
    )
