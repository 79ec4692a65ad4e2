"""Which modules play which role in an architecture: attn.q, ff.w2, embeddings, lm_head.proj."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .addressing import Survey, survey
from .errors import AddressError, nearest
from .layers import Norm, kind_of

# The end of a module's name -> its role, for BERT and RoBERTa, BART, GPT-2, T5, and Llama. The
# longest end that fits decides, so that "attention.output.dense" wins over "output.dense".
ROLES = {
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "crossattention.self.query": "cross_attn.q",
    "crossattention.self.key": "cross_attn.k",
    "crossattention.self.value": "cross_attn.v",
    "crossattention.output.dense": "cross_attn.proj",
    "intermediate.dense": "ff.w1",
    "output.dense": "ff.w2",
    "embeddings.word_embeddings": "embeddings",
    "predictions.decoder": "lm_head.proj",
    "lm_head.decoder": "lm_head.proj",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.proj",
    "encoder_attn.q_proj": "cross_attn.q",
    "encoder_attn.k_proj": "cross_attn.k",
    "encoder_attn.v_proj": "cross_attn.v",
    "encoder_attn.out_proj": "cross_attn.proj",
    "fc1": "ff.w1",
    "fc2": "ff.w2",
    "shared": "embeddings",
    "embed_tokens": "embeddings",
    "lm_head": "lm_head.proj",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj",
    "crossattention.q_attn": "cross_attn.q",
    "crossattention.c_attn": "cross_attn.kv",
    "crossattention.c_proj": "cross_attn.proj",
    "mlp.c_fc": "ff.w1",
    "mlp.c_proj": "ff.w2",
    "wte": "embeddings",
    "SelfAttention.q": "attn.q",
    "SelfAttention.k": "attn.k",
    "SelfAttention.v": "attn.v",
    "SelfAttention.o": "attn.proj",
    "EncDecAttention.q": "cross_attn.q",
    "EncDecAttention.k": "cross_attn.k",
    "EncDecAttention.v": "cross_attn.v",
    "EncDecAttention.o": "cross_attn.proj",
    "DenseReluDense.wi": "ff.w1",
    "DenseReluDense.wi_0": "ff.gate",
    "DenseReluDense.wi_1": "ff.w1",
    "DenseReluDense.wo": "ff.w2",
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "ff.gate",
    "mlp.up_proj": "ff.w1",
    "mlp.down_proj": "ff.w2",
}

# One fused projection plays several roles.
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}


def _role(name: str) -> str | None:
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((ROLES[end] for end in ends if end in ROLES), None)


def roles(model: nn.Module) -> dict[str, str]:
    """{full module name: role}, for every module of `model` whose role is known.

    The roles are `attn.q`, `attn.k`, `attn.v`, `attn.qkv`, `attn.proj`, the same under
    `cross_attn.`, `ff.w1`, `ff.gate`, `ff.w2`, `embeddings` and `lm_head.proj`. Known are BERT,
    RoBERTa, BART, GPT-2, T5, Llama, and whatever names its modules as one of them does.
    """
    return _roles(survey(model))


def _roles(found: Survey) -> dict[str, str]:
    named = {name: _role(name) for name in found.modules}
    return {name: role for name, role in named.items() if role is not None}


def _plays(role: str, wanted: str) -> bool:
    sublayer, _, part = role.partition(".")
    return wanted in (role, *(f"{sublayer}.{p}" for p in FUSED.get(part, ())))


def _sublayers(found: Survey, known: dict[str, str], wanted: str) -> list[str]:
    """The modules that hold all of a sublayer, such as `attn`, or its parts where none holds them.

    A module holds a sublayer if it is around its parts and around no part of another.
    """
    blocks: dict[str, list[str]] = {}
    for name, role in known.items():
        if role.partition(".")[0] == wanted:
            path = name.split(".")
            number = next((i for i in range(len(path), 0, -1) if path[i - 1].isdigit()), 0)
            while number > 2 and path[number - 3].isdigit():  # T5 numbers its sublayers, too
                number -= 2
            blocks.setdefault(".".join(path[:number]), []).append(name)
    chosen = []
    for parts in blocks.values():
        around = found.common(parts)
        inside = {known[n].partition(".")[0] for n in known if n.startswith(f"{around}.")}
        chosen += [around] if inside == {wanted} else parts
    return chosen


def with_roles(found: Survey, wanted: Sequence[str]) -> list[str]:
    """The full names of the modules that play any of the `wanted` roles.

    A fused projection is found by each role it plays: GPT-2's `attn.qkv` is its `attn.q`. A
    sublayer, `attn`, is the module that holds all of it, or else its parts; `layer_norm` is every
    normalisation, `root` the backbone itself. The spelling of OpenDelta's files, `attn@.q@`, is the
    same as `attn.q`.

    Raises:
        AddressError: no module has such a role.
    """
    known = _roles(found)
    chosen = set()
    for role in (w.replace("@", "") for w in wanted):
        hits = {name for name, has in known.items() if _plays(has, role)}
        if role == "root":
            hits = {""}
        elif role == "layer_norm":
            hits = {name for name, module in found.modules.items() if _is_norm(module)}
        elif "." not in role and role not in known.values():
            hits = set(_sublayers(found, known, role))
        if not hits:
            all_roles = sorted(set(known.values()))
            near = ", ".join(nearest(role, all_roles)) or "none"
            reason = (
                f"the roles in it are {', '.join(all_roles)}; nearest: {near}"
                if known
                else "its architecture is not known"
            )
            raise AddressError(
                f"no module of {type(found.root).__name__} has the role {role!r}: {reason}. Name "
                "the modules instead: modified_modules=[...]; opendelta.tree(model) prints their "
                "names"
            )
        chosen |= hits
    return [name for name in found.modules if name in chosen]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(kind_of(module), Norm)
