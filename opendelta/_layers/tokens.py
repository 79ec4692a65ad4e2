"""Which tokens of a module's output are the first or the last ones of their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError


def positions(h: Tensor, args: tuple, kwargs: dict[str, Any], first: int, last: int) -> Tensor:
    """Which tokens are among the `first` or the `last` ones: booleans [batch or 1, length].

    Padding is left out, as far as the module was given an attention mask that shows it, and what a
    KV cache holds counts as coming before.

    Args:
        h: the module's output [batch, length, width].
        args, kwargs: what the module was called with, after its own forward.

    Raises:
        SiteError: `last` is asked for while a cache holds what came before.
    """
    length = h.size(-2)
    given = (*args, *kwargs.values())  # blocks call it past_key_values, layer_past or nothing
    cache: Any = next((value for value in given if hasattr(value, "get_seq_length")), None)
    total = max(length, _cached(cache))
    seen = _seen(args, kwargs, total)
    if seen is None:
        seen = torch.ones(1, total, dtype=torch.bool, device=h.device)
    count = seen.cumsum(-1)
    chosen = count <= first
    if last and total > length:
        raise SiteError(
            "last=... needs all tokens at once, and a KV cache holds some of them: call "
            "generate(use_cache=False), or choose first=..."
        )
    if last:
        chosen = chosen | (count > count[:, -1:] - last)
    return (chosen & seen)[:, total - length :]


def _cached(cache: Any) -> int:
    """How many tokens a cache counts; 0 if there is none, or one that counts none, as Mamba's."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except ValueError:
        return 0


def _seen(args: tuple, kwargs: dict[str, Any], total: int) -> Tensor | None:
    """Which of `total` tokens are no padding [batch, total], by the attention mask, if any.

    That is [batch, 1, queries, keys], boolean or additive: the last query sees all but padding.
    """
    given = (*args, *(kwargs[n] for n in ("attention_mask", "mask") if n in kwargs))
    for value in given:
        if isinstance(value, Tensor) and value.ndim == 4 and value.size(-1) >= total:
            row = value[:, 0, -1, :total]
            return row if row.dtype == torch.bool else row >= 0
    return None
