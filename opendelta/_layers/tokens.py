"""Find the first or the last tokens of each row in a module's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError


def positions(h: Tensor, args: tuple, kwargs: dict[str, Any], first: int, last: int) -> Tensor:
    """Return booleans [batch or 1, length]: true for the `first` and the `last` tokens of a row.

    Padding does not count, if an attention mask among the arguments shows it. Tokens in a KV cache
    count as the tokens before.

    Args:
        h: the module's output [batch, length, width].
        args, kwargs: the arguments of the module's call, after its own forward.

    Raises:
        SiteError: `last` is not 0, and a cache holds earlier tokens.
    """
    length = h.size(-2)
    given = (*args, *kwargs.values())  # blocks name the cache past_key_values, layer_past or not
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
    """Return the number of tokens in a cache; 0 for no cache, or if it counts none, as Mamba's."""
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except ValueError:
        return 0


def _seen(args: tuple, kwargs: dict[str, Any], total: int) -> Tensor | None:
    """Return booleans [batch, total], false for padding, from the attention mask; None without one.

    The mask is [batch, 1, queries, keys], boolean or additive: its last query sees all but padding.
    """
    given = (*args, *(kwargs[n] for n in ("attention_mask", "mask") if n in kwargs))
    for value in given:
        if isinstance(value, Tensor) and value.ndim == 4 and value.size(-1) >= total:
            row = value[:, 0, -1, :total]
            return row if row.dtype == torch.bool else row >= 0
    return None
