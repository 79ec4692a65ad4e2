"""Find the roles of modules in any architecture: attn.q, ff.w2, embeddings, lm_head.proj."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from ..._modules.calls import has_forward
from ..._modules.kinds import Embedding, kind_of
from ..._sites.showing import own_parts
from ...errors import AddressError, OptionError, nearest
from ...names import ancestors, computes_weight, join, last, parent
from ..backbone import Backbone
from ..patterns import repeated, select, warn_unused
from .blocks import Tree, units
from .deciding import Block, Decision, by_names, is_linear
from .flow import is_norm
from .norms import give_norms
from .unnamed import give_by_flow, give_feed_forward

SUBLAYERS = ("attn", "cross_attn")
ROLES = (
    *(f"{sub}.{part}" for sub in SUBLAYERS for part in ("q", "k", "v", "qkv", "kv", "proj")),
    *(f"{sub}.layer_norm" for sub in (*SUBLAYERS, "ff")),
    *(f"ff.{part}" for part in ("w1", "gate", "gate_up", "w2", "experts", "router")),
    "mixer.in", "mixer.out", "embeddings", "lm_head.proj",
)  # fmt: skip
# What `modified_modules` takes beside roles, each for all modules of a sublayer or for all norms.
GROUPS = (*SUBLAYERS, "ff", "mixer", "layer_norm")
# {part of a fused projection: the parts that it includes}
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "w1")}
# {part: common names of modules that play it}, for messages
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
    """Return {full name of a module: its role} for each module of `model` that plays a role.

    Roles are found in the repeated blocks of any architecture:

    - attention: `attn.q`, `attn.k`, `attn.v`, `attn.qkv` (one projection for all), `attn.kv` (one
      projection for keys and values, or for their latents), `attn.proj` and `attn.layer_norm`;
      cross-attention, whose keys come from another source than its queries: the same under
      `cross_attn.`
    - feed-forward: `ff.w1` (up), `ff.gate` (the activated branch), `ff.gate_up` (both in one),
      `ff.w2` (down), `ff.layer_norm`, `ff.experts` and `ff.router`
    - state-space and linear-attention mixers: `mixer.in` and `mixer.out`
    - outside of blocks: `embeddings` (of tokens, with tied copies) and `lm_head.proj`

    A norm belongs to the sublayer that it feeds, or else to the sublayer that it follows.

    Args:
        override: {pattern: role, or None for no role}, to replace the role that is found. A pattern
            has the same form as in `modified_modules`.
        why: return the reason of each decision too: {name: (role, reason)}.

    Raises:
        AddressError: a pattern of `override` selects nothing.
        OptionError: `override` names an unknown role.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> opendelta.roles(model)["layers.0.linear1"]
        'ff.w1'
        >>> opendelta.roles(model, override={"linear1": None}).get("layers.0.linear1")
    """
    backbone = Backbone.of(model)
    return _decisions(backbone, override) if why else roles_of(backbone, override)


def roles_of(
    backbone: Backbone, override: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """Return {full name of a module: its role}; see `roles`."""
    return {name: role for name, (role, _) in _decisions(backbone, override).items()}


def _decisions(
    backbone: Backbone, override: Mapping[str, str | None] | None = None
) -> dict[str, Decision]:
    if backbone.roles is None:
        backbone.roles = _in_blocks(Tree.of(backbone))
        for name, reason in _embeddings(backbone).items():
            backbone.roles[name] = "embeddings", reason
        for name, reason in _heads(backbone).items():
            backbone.roles[name] = "lm_head.proj", reason
    decided = dict(backbone.roles)
    for pattern, role in (override or {}).items():
        if role is not None and role not in ROLES:
            raise OptionError(
                f"override[{pattern!r}]={role!r} is no role; nearest: "
                f"{', '.join(nearest(role, ROLES)) or ', '.join(ROLES)}"
            )
        for name in select(filter(None, backbone.modules), [pattern], backbone.model):
            decided.pop(name, None)
            if role is not None:
                decided[name] = role, f"override: {pattern!r}"
    return {name: decided[name] for name in backbone.modules if name in decided}


def _in_blocks(tree: Tree) -> dict[str, Decision]:
    """Return the roles inside all blocks; of blocks that are built alike, only one is examined."""
    looks: dict[Hashable, int] = {}
    seen: dict[str, int] = {}
    known: dict[int, Block] = {}
    placed: dict[str, Block] = {}
    for where in units(tree):
        look = tree.look(where, looks, seen)
        if look not in known:
            known[look] = by_names(tree, where)
            give_by_flow(known[look])
        placed[where] = known[look]
    lists = {parent(where) for where, block in placed.items() if block.attends}
    for where, block in placed.items():
        if parent(where) in lists:  # a feed-forward may stand beside its attention
            give_feed_forward(block)
    for block in known.values():
        give_norms(block)
    return {
        join(where, name): decision
        for where, block in placed.items()
        for name, decision in block.roles.items()
    }


def _embeddings(backbone: Backbone) -> dict[str, str]:
    """Return {name of a token embedding: the reason}, with all embeddings of the same weight."""
    chosen: dict[str, str] = {}
    names = {id(module): name for name, module in backbone.modules.items()}
    for name, module in backbone.modules.items():
        where = names.get(id(_given(module, "get_input_embeddings")), "")
        if isinstance(kind_of(module), Embedding) and TOKENS.search(name):
            chosen[name] = f"an embedding called {name.rpartition('.')[2]!r}"
        elif where and isinstance(kind_of(backbone.modules[where]), Embedding):
            chosen.setdefault(where, f"get_input_embeddings() of {type(module).__name__}")
    weights = {id(backbone.modules[name]._parameters.get("weight")): name for name in chosen}
    for name, module in backbone.modules.items():
        weight = module._parameters.get("weight") if not _is_script(module) else None
        if weight is not None and id(weight) in weights and isinstance(kind_of(module), Embedding):
            chosen.setdefault(name, f"it has the weight of {weights[id(weight)]!r}")
    return chosen


def _given(module: nn.Module, method: str) -> Any:
    """Return what a method of a transformers model returns; None if there is nothing."""
    try:
        with own_parts():
            return getattr(module, method)()
    except (NotImplementedError, AttributeError):  # the model embeds no tokens
        return None


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _heads(backbone: Backbone) -> dict[str, str]:
    """Return {name of a linear layer that returns the logits of tokens: the reason}."""
    chosen: dict[str, str] = {}
    names = {id(module): name for name, module in backbone.modules.items()}
    for name, module in backbone.modules.items():
        where = names.get(id(_given(module, "get_output_embeddings")), "")
        if HEADS.search(name) and is_linear(module):
            chosen[name] = f"a linear layer called {name.rpartition('.')[2]!r}"
        elif where and is_linear(backbone.modules[where]):
            chosen.setdefault(where, f"get_output_embeddings() of {type(module).__name__}")
    return chosen


def _plays(role: str, wanted: str) -> bool:
    sublayer, _, part = role.partition(".")
    return wanted in (role, *(f"{sublayer}.{p}" for p in FUSED.get(part, ())))


def _sublayers(backbone: Backbone, known: dict[str, str], wanted: str) -> list[str]:
    """Return the modules that hold a sublayer such as `attn`; else the parts of the sublayer.

    A module holds a sublayer if it is around all its parts, and around no part of another sublayer.
    Of several attentions in one block, each child of the block that has a whole one holds it.
    """
    blocks = set(units(Tree.of(backbone)))
    holders: dict[str, list[str]] = {}
    for name, role in known.items():
        if role.partition(".")[0] == wanted and not role.endswith(".layer_norm"):
            block = next((a for a in ancestors(name) if a in blocks), None)
            if block is None:  # the whole model is one block
                block = _around_whole(known, name, wanted)
            holders.setdefault(block, []).append(name)
    chosen = []
    for block, parts in holders.items():
        around = backbone.innermost_around(parts)
        if _holds_only(known, around, wanted):
            chosen.append(around)
        elif wanted in SUBLAYERS:
            chosen += dict.fromkeys(
                _attention_around(backbone, known, block, part) for part in parts
            )
        else:
            chosen += parts
    return chosen


def _holds_only(known: dict[str, str], around: str, sublayer: str) -> bool:
    """True if all roles inside a module are of one sublayer."""
    held = {role.partition(".")[0] for n, role in known.items() if n.startswith(f"{around}.")}
    return held == {sublayer}


def _attention_around(backbone: Backbone, known: dict[str, str], block: str, part: str) -> str:
    """Return the child of `block` with all of the attention of `part`; else `part` itself."""
    child = next(a for a in ancestors(part) if parent(a) == block or "." not in a)
    held = {last(role) for n, role in known.items() if n.startswith(f"{child}.")}
    whole = "proj" in held and held & {"q", "qkv"} and has_forward(backbone.modules[child])
    return child if whole and _holds_only(known, child, known[part].partition(".")[0]) else part


def _around_whole(known: dict[str, str], name: str, sublayer: str) -> str:
    """Return the module around `name`, where no list holds blocks, that has all of its sublayer.

    It is the item of a list, such as a list of attentions and one of feed-forwards has; or else the
    innermost module with the end of the sublayer and another part.
    """
    item = re.sub(r"(?<![^.])(\d+)\..*", r"\1", name)
    parts = {n: r for n, r in known.items() if r.startswith(f"{sublayer}.")}
    for around in (item, *ancestors(name)):
        held = {last(r) for n, r in parts.items() if n.startswith(f"{around}.")} - {"layer_norm"}
        if held & {"proj", "w2", "out"} and len(held) > 1:
            return around
    return "" if item == name else item


def with_roles(
    backbone: Backbone,
    wanted: Sequence[str],
    override: Mapping[str, str | None] | None = None,
    some: bool = False,
) -> list[str]:
    """Return the full names of the modules that play any of the `wanted` roles.

    A fused projection is found by each role that it plays: GPT-2's `attn.qkv` is also its `attn.q`.
    The name of a sublayer, such as `attn`, means the module that holds all of the sublayer, or else
    its parts. `layer_norm` means each normalisation, `root` the backbone itself. `attn@.q@`, as
    files of OpenDelta 0.3 have it, is the same as `attn.q`, and is left out where no module plays
    it; its `crossattn` is `cross_attn`.

    Args:
        override: see `roles`.
        some: raise only if none of the roles is found.

    Warns:
        UnusedWarning: no module has such a role, and it is written as in 0.3.

    Raises:
        AddressError: no module has such a role.
    """
    known = roles_of(backbone, override)
    chosen = set()
    missing = []
    for text in wanted:
        role = text.replace("@", "").replace("crossattn", "cross_attn")
        hits = {name for name, has in known.items() if _plays(has, role)}
        if role == "root":
            hits = {""}
        elif role == "layer_norm":
            norms = (name for name, module in backbone.modules.items() if is_norm(module))
            hits = {name for name in norms if not computes_weight(name)}
        elif "." not in role and role not in known.values():
            hits = set(_sublayers(backbone, known, role))
        if not hits:
            missing.append((role, "@" in text))
        chosen |= hits
    for role, of_03 in () if some and chosen else missing:
        error = _unknown(backbone, known, role)
        if not (of_03 and chosen):
            raise error
        warn_unused("modified_modules", error)
    return [name for name in backbone.modules if name in chosen]


def _unknown(backbone: Backbone, known: Mapping[str, str], role: str) -> AddressError:
    """Return the error for a role that no module plays, with names to use instead."""
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
        pattern=role,
        nearest=alike,
    )
