"""Derive roles from the names of modules and of their classes."""

from __future__ import annotations

import re
from collections.abc import Collection

TOKEN = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
LETTERS = {
    **dict.fromkeys(["q", "query", "queries", "wq"], "q"),
    **dict.fromkeys(["k", "key", "keys", "wk"], "k"),
    **dict.fromkeys(["v", "value", "values", "wv"], "v"),
    **dict.fromkeys(["qkv", "wqkv"], "qkv"),
    **dict.fromkeys(["kv", "wkv"], "kv"),
    **dict.fromkeys(["qk"], "q"),
}
OUT = {"o", "out", "output", "proj", "projection", "dense", "wo", "post", "final"}
# Words that may be added to a projection's name without changing its role.
BESIDE = OUT | {
    "a", "attention", "attn", "att", "b", "c", "current", "delayed", "down", "e", "fused", "global",
    "head", "in", "latent", "layer", "layout", "lin", "linear", "mqa", "project", "rope", "text",
    "to", "up", "vision", "w", "with", "2",
}  # fmt: skip
CROSS = re.compile(r"cross|encoder_?attn|enc_?dec|(?:src|context|memory)_att", re.I)
BESIDE_ANOTHER = "multihead_attn"  # a cross-attention, where another attention is beside it
CROSS_CLASS = re.compile(r"Cross(?!Encoder)|EncDec|EncoderDecoderAtt")
MIXER = re.compile(
    r"(?:Mixer|GatedDelta(?:Net)?|DeltaAttention|DeltaNet|LinearAttention|LightningAttention|"
    r"RecurrentBlock|ShortConv|RwkvSelfAttention|[mM]?LSTMLayer|Mamba\d?|SSM)$"
)
LINEAR = re.compile(r"LinearAttention$")  # the kind is linear, or the model's name ends so
BIG = {  # the last word of the class of a module around several sublayers
    "layer", "block", "stage", "model", "encoder", "decoder", "stack", "transformer", "group",
    "embeddings", "embedding", "tower",
}  # fmt: skip
ATTENTION = {"attention", "attentions", "attn", "att", "attns", "selfattention"}
FEED_FORWARD = {"mlp", "mlps", "ffn", "ffns", "ff", "feedforward", "moe", "expert", "experts"}
OTHER = {
    "indexer", "compressor", "forget", "downsample", "downsampling", "sconv", "conv", "convolution",
    "lconv", "bottleneck", "position", "positions", "positional", "rel", "relative", "altup",
    "laurel", "ple", "aligner", "merger", "sampler", "ada", "adaln", "modulation", "adapter",
    "pooler", "conditioning",
}  # fmt: skip
OF_ALL = {"time", "timestep", "temb", "pos", "cond", "head"}  # an mlp of these is of no tokens
LISTED = {"layers", "blocks"}  # the last word of a list's name
FIRST = {"1", "0", "in", "up", "wi", "intermediate", "inter", "fc", "key"}
LAST = {"2", "out", "down", "wo", "output", "proj", "value"}
BARE = re.compile(
    r"(?:fc|lin|linear|dense|ffn?|w|layer|ff_layer|ffn_layer|mlp_fc)_?[123]|ffn?(?:_output)?|"
    r"fc_in|fc_out|fc|intermediate|w[io](?:_\d)?|(?:up|down|gate)_proj|gate_up_proj|(?:up|down)"
)
GENERIC = {"linear", "dense", "layer", "base", "proj", "lin"}


def tokens(name: str) -> list[str]:
    """Return the words of a name in lower case: "q_a_proj" gives ["q", "a", "proj"]."""
    return [word.lower() for word in TOKEN.findall(name.replace("MoE", "Moe"))]


def is_cross(name: str, cls: str) -> bool:
    """True if an attention is a cross-attention, by its name and class."""
    return bool(CROSS.search(name) or CROSS_CLASS.search(cls) or BESIDE_ANOTHER in name)


def of_list(name: str) -> str:
    """Return what the name of a list says of its items: nothing if it says that they are blocks."""
    return "" if {*tokens(name)[-1:]} & LISTED else name


def common_words(one: list[str], other: list[str]) -> int:
    """Return the number of words that two lists have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def sublayer(
    name: str, cls: str, around: str | None = None, block: str = ""
) -> tuple[str | None, str]:
    """Return the sublayer that a module holds by its name and class, and the evidence.

    The sublayer is attn, ff, mixer, other or None.

    Args:
        around: the sublayer that the module around it holds.
        block: the class of its block. Words that `cls` and `block` share at their start are the
            architecture's name, and say nothing about the sublayer.
    """
    if around == "other":
        return around, ""
    words, kind = set(tokens(name)), tokens(cls)
    by_class = f"its class {cls}"
    others = words & OTHER - ({"rel", "relative"} if words & ATTENTION else set())
    if others and not MIXER.search(cls):
        return "other", f"its name {name!r}"
    own = "".join(kind[common_words(kind, tokens(block)) :])
    if MIXER.search(cls) and (own.endswith("linearattention") or not LINEAR.search(cls)):
        return "mixer", by_class
    if kind and kind[-1] not in BIG:
        ends = set(kind[-2:])
        if ends & ATTENTION:
            return "attn", by_class
        if ends & FEED_FORWARD or kind[-2:] == ["feed", "forward"]:
            return "ff", by_class
    if kind[-1:] in (["layer"], ["block"]) and {*kind[-2:-1]} & FEED_FORWARD:
        return "ff", by_class
    by_name = f"its name {name!r}"
    if "mixer" in words and {"mamba", "ssm"} & {*kind}:
        return "mixer", by_class
    if words & {"mlp", "mlps"} and words & OF_ALL:
        return "other", by_name
    if {"linear", "attn"} <= words or words & {"mamba", "ssm", "mlstm"}:
        return "mixer", by_name
    if words & ATTENTION and not words & {"norm", "dropout"}:
        return "attn", by_name
    if words & FEED_FORWARD or {"feed", "forward"} <= words or {"dense", "relu"} <= words:
        return "ff", by_name
    return None, ""


def is_weak(name: str) -> bool:
    """True if a name means half a feed-forward even outside of one: "intermediate" in BERT."""
    return bool({"intermediate", "inter", "output"} & set(tokens(name)))


def attention_part(name: str, siblings: Collection[str]) -> str | None:
    """Return the role of a linear of this name in attention: q, k, v, qkv, kv, proj or None.

    Args:
        siblings: the names of the other linears of the same attention.
    """
    words = tokens(name)
    letters = "".join(dict.fromkeys("".join(LETTERS.get(word, "") for word in words)))
    if not set(words) - LETTERS.keys() <= BESIDE:
        return None
    if letters in ("q", "k", "v", "qkv", "kv"):
        return letters
    if letters:
        return {"qk": "q", "vk": "kv"}.get(letters, "qkv" if len(letters) == 3 else None)
    if name in ("c_attn", "in_proj", "att_proj", "attn_in"):
        asks = any(attention_part(other, ()) == "q" for other in siblings if other != name)
        return "kv" if asks else "qkv"
    return "proj" if set(words) & OUT else None


def mixer_part(name: str) -> str | None:
    """Return the role of a linear of this name in a mixer: in, out or None."""
    words = set(tokens(name))
    if "in" in words or name in ("linear_x", "linear_y", "receptance"):
        return "in"
    if words & {"x", "dt", "gate", "preact", "a", "b", "g", "f"}:
        return None
    if any(word in LETTERS for word in words):
        return "in"
    return "out" if words & {"out", "o", "output"} else None


def feed_forward_part(name: str) -> str | None:
    """Return the place of a linear in a feed-forward: first, gate, gate_up, last or None."""
    words = tokens(name)
    some = set(words)
    if some & {"gate", "glu", "receptance"}:
        return "gate_up" if "up" in some else "gate"
    if "h_to_4h" in name or "4h_to_h" in name:
        return "first" if "h_to_4h" in name else "last"
    if some & {"down", "wo", "out", "output"} or (some & {"2"} and "1" not in some):
        return "last"
    if some & FIRST or "3" in some:
        return "first"
    return "last" if some & LAST else None
