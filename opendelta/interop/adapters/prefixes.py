"""Translate prefix tuning of the adapters library: one tensor or one network for all layers."""

from __future__ import annotations

from torch import Tensor

from ..._sequences import prefix
from ...names import parent
from .._draft import keys_and_values
from .terms import Part

SELF = "self_prefix."


def read(part: Part) -> None:
    """Fill in a part that holds tensors of prefixes."""
    part.method = "prefix"
    if any(name.endswith("relative_attention_bias") for name in part.backbone.modules):
        raise part.error(
            "with a prefix the adapters library shifts the relative positions of T5's tokens by "
            "the prefix's length, and gives the prefix positions of its own; a prefix here has "
            "none, so it would compute something else. Train a PrefixModel, or load another method"
        )
    own = {
        key: t for group in part.given.pop("prefix_tunings").values() for key, t in group.items()
    }
    if others := sorted({key.partition(".")[0] for key in own} - {SELF[:-1]}):
        raise part.error(f"{', '.join(others)}: only prefixes of self-attention are read")
    own = {key.removeprefix(SELF): tensor for key, tensor in own.items()}
    length = part.whole("prefix_length")
    part.options |= {"prefix_token_num": length, "reparameterize": not part.config["flat"]}
    places = _places(part)
    if part.config["flat"]:
        flat = part.take(own, "control_trans", -1)
        if not flat.numel() or flat.numel() % (2 * length * len(places)):
            raise part.error(f"control_trans {list(flat.shape)} is none of {len(places)} layers")
        rows = flat.view(length, 2 * len(places), -1).transpose(0, 1)
        for place, where in enumerate(places):
            keys, values = rows[2 * place : 2 * place + 2].unbind()
            part.sites[where] = {"past_key": keys.contiguous(), "past_value": values.contiguous()}
    else:
        _read_network(part, own, places)
    part.check_empty(own, "the prefixes")


def _places(part: Part) -> list[str]:
    """Return the names of the self-attention modules that have a prefix, in order."""
    around = {parent(n) for n, role in part.roles.items() if role.startswith("attn.")}
    names = [n for n, m in part.backbone.modules.items() if prefix.is_attention(m) and n in around]
    left = part.left_out()
    chosen = [name for place, name in enumerate(names) if place not in left]
    if not chosen:
        what = type(part.backbone.model).__name__
        raise part.error(f"{what} has {len(names)} self-attention modules that take a prefix")
    return chosen


def _read_network(part: Part, own: dict[str, Tensor], places: list[str]) -> None:
    """Split the network of all prefixes: a shared part, and the rows of its last layer for each."""
    if part.config["non_linearity"] != "tanh":
        raise part.refusal("non_linearity", "a prefix here is computed with 'tanh'")
    count = 2 * len(places)
    embedding = part.take(own, "wte.weight", -1, -1)
    hidden = part.take(own, "control_trans.0.weight", -1, embedding.size(1))
    weight = part.take(own, "control_trans.2.weight", -1, hidden.size(0))
    if not weight.size(0) or weight.size(0) % count:
        raise part.error(
            f"control_trans.2.weight {list(weight.shape)} is none of {count // 2} layers"
        )
    biases = part.take(own, "control_trans.2.bias", weight.size(0)).chunk(count)
    for where, tensors in keys_and_values(weight.chunk(count), biases, places):
        part.sites.setdefault(where, {}).update(tensors)
    shared = {
        "embedding": embedding,
        "hidden.weight": hidden,
        "hidden.bias": part.take(own, "control_trans.0.bias"),
    }
    around = part.backbone.innermost_around(places)
    part.others |= {part.key(around, f"tensors.{name}"): t for name, t in shared.items()}
    part.options |= {"embed_dim": embedding.size(1), "mid_dim": hidden.size(0)}
