"""Find the embeddings of tokens of a transformers model, and its head."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._sites.showing import own_parts

TOKENS = "resize_token_embeddings"  # all models of transformers have it


def embeddings_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a transformers model's embeddings of inputs and outputs, as "input" and "output"."""
    if not hasattr(type(model), TOKENS):
        return {}
    found: dict[str, Any] = {}
    for which in ("input", "output"):
        try:
            with own_parts():
                found[which] = getattr(model, f"get_{which}_embeddings")()
        except Exception:  # models without one raise whatever they like
            continue
    return {which: module for which, module in found.items() if isinstance(module, nn.Module)}
