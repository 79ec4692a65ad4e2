"""Numbers in an argument that may tell of a call's tokens, whatever the argument is called.

A name says what its author thought of; numbers that count, or that part a row in runs, tell of
places, padding or documents under any name. A graph that is compiled has no values to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.calls import every, items_of

HIDES = -1e3  # what is added to scores and is not above this hides a token


def may_tell(value: Any, batch: int, length: int) -> bool:
    """True if numbers may say which tokens are padding, where documents begin, or what came before.

    False for numbers that are the same for all tokens, count them from 0 or 1, or do not fit.
    """
    rows = value if isinstance(value, list | tuple) and len(value) == batch else [None]
    if all(isinstance(each, Mapping | slice | range) for each in rows):
        return True  # something is said of each row
    return any(_tells(tensor, batch, length) for tensor in _tensors(value))


def may_part(value: Any, batch: int, length: int, seen: Tensor) -> bool:
    """True if numbers may say where documents begin in rows whose padding is known.

    Args:
        seen: booleans [batch or 1, length], false for padding.
    """
    near = seen[:, 1:] & seen[:, :-1]
    return any(_parts(tensor, batch, length, near) for tensor in _tensors(value))


def are_full(value: Any, length: int) -> bool:
    """True if numbers of tokens, or shares, are the `length` of all rows: there is no padding."""
    tensors = [*_tensors(value)]
    return bool(tensors) and all(_is_full(tensor, length) for tensor in tensors)


def shows(tensor: Tensor) -> bool:
    """True if numbers are ones, for what is shown, and zeros."""
    return not torch.compiler.is_compiling() and bool(((tensor == 0) | (tensor == 1)).all())


def is_causal(tensor: Tensor) -> bool:
    """True if a square shows that no token sees later ones, and nothing else."""
    hidden = None if torch.compiler.is_compiling() else _hidden(tensor)
    if hidden is None or hidden.ndim != 2:
        return False
    later = torch.ones_like(hidden).triu(1)
    return torch.equal(hidden, later) or torch.equal(~hidden, later)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the numbers in an argument as tensors, at any depth."""
    if torch.compiler.is_compiling() or isinstance(value, str | bytes | int | float | None):
        return
    if isinstance(value, list | tuple) or (
        hasattr(value, "__array__") and not torch.is_tensor(value)
    ):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):  # texts, objects, rows of several lengths
            value = dict(enumerate(value))
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if plain and not (value.is_meta or value.is_nested or value.is_complex()) and value.numel():
            yield value.detach()
    elif (items := items_of(value)) is not None:
        for each in items.values():
            yield from _tensors(each)
    else:
        for each in every(Tensor, value, objects=True):
            yield from _tensors(each)


def _tells(tensor: Tensor, batch: int, length: int) -> bool:
    if _is_full(tensor, length) or (tensor.shape == (length, length) and is_causal(tensor)):
        return False
    if tensor.ndim == 3 and tensor.shape[:2] == (batch, length):  # of each channel
        hidden = _hidden(tensor)
        return hidden is not None and any(map(_parts_rows, (hidden.all(-1), hidden.any(-1))))
    rows = _rows(tensor, batch, length)
    if _parts_pairs(tensor, length, None) or (rows is not None and _parts_rows(rows)):
        return True
    one_each = tensor.shape in ((batch,), (batch, 1)) and (rows is None or length == batch)
    if tensor.is_floating_point():  # shares of the longest row
        return one_each and bool((tensor > 0).all() and tensor.max() == 1)
    if one_each and tensor.dtype != torch.bool and bool((tensor.abs() <= length).all()):
        return True
    return rows is None and _ends(tensor, batch, length)


def _parts(tensor: Tensor, batch: int, length: int, near: Tensor) -> bool:
    near, rows = near.to(tensor.device), _rows(tensor, batch, length)
    if _parts_pairs(tensor, length, near):
        return True
    if not _is_whole(tensor):
        return False
    if rows is not None:
        return _count(rows) and bool(((rows.diff() < 0) & near).any())
    return tensor.shape != (batch,) and _ends(tensor, batch, length)


def _is_full(tensor: Tensor, length: int) -> bool:
    share = tensor.is_floating_point() and bool((tensor <= 1).all())
    return bool((tensor == (1 if share else length)).all())


def _is_whole(tensor: Tensor) -> bool:
    """True for integers, also in floating numbers."""
    if tensor.is_floating_point():
        return bool((tensor == tensor.round()).all())
    return tensor.dtype != torch.bool


def _rows(tensor: Tensor, batch: int, length: int) -> Tensor | None:
    """Return numbers for each token [batch or 1, length], or None."""
    outer = tensor.shape[:-1]
    fits = outer.numel() in (1, batch) and max(outer[1:], default=1) == 1
    return tensor.reshape(-1, length) if fits and tensor.shape[-1:] == (length,) else None


def _hidden(tensor: Tensor) -> Tensor | None:
    """Return booleans of a mask, one sort of it true; None: the numbers are no mask."""
    if tensor.is_floating_point() and bool((tensor <= HIDES).any()):
        return tensor <= HIDES
    return tensor == 0 if bool(((tensor == 0) | (tensor == 1)).all()) else None


def _parts_pairs(tensor: Tensor, length: int, near: Tensor | None) -> bool:
    """True if numbers [..., length, length] treat some neighbours in rows otherwise than others.

    A mask that is causal, a window, or all alike, tells of no padding and no documents.

    Args:
        near: booleans [batch or 1, length - 1], true for neighbours that are no padding; None: for
            all, and each token for itself.
    """
    pairs = tensor.ndim > 1 and tensor.shape[-2:] == (length, length) and length > 2
    hidden = _hidden(tensor) if pairs else None
    if hidden is None:
        return False
    diagonals = [hidden.diagonal(offset, -2, -1) for offset in (-1, 1)]
    if near is None:
        diagonals.append(hidden.diagonal(0, -2, -1))
        return any(bool((each != each[..., :1]).any()) for each in diagonals)
    if hidden.ndim > 2 and hidden.size(0) == near.size(0):
        near = near.view(near.size(0), *[1] * (hidden.ndim - 3), -1)
    else:
        near = near.all(0)
    return any(bool((each & near).any() and (~each & near).any()) for each in diagonals)


def _parts_rows(rows: Tensor) -> bool:
    """True if numbers [rows, length] part the tokens in runs, or count them from elsewhere."""
    if _is_whole(rows) and _count(rows):
        return bool((rows.diff() != 1).any() or (rows[:, 0] > 1).any())
    hidden = rows if rows.dtype == torch.bool else _hidden(rows)
    if hidden is not None:
        return bool((hidden != hidden[:, :1]).any())
    changes = (rows.diff() != 0).sum(-1)
    return _is_whole(rows) and 0 < int(changes.max()) <= rows.size(1) // 2


def _count(rows: Tensor) -> bool:
    """True if in some row most numbers are by one greater than those before them."""
    return rows.size(1) == 1 or bool(((rows.diff() == 1).sum(-1) * 2 >= rows.size(1) - 1).any())


def _ends(numbers: Tensor, batch: int, length: int) -> bool:
    """True if several numbers may be the lengths, the ends or the bounds of parts of rows."""
    if numbers.ndim == 2 and numbers.size(1) == 2:
        numbers = torch.cat([numbers[:1, 0], numbers[:, 1]])
    if numbers.ndim != 1 or len(numbers) < 2:
        return False
    totals = (length, batch * length)
    risen = bool((numbers.diff() > 0).all()) and int(numbers[-1]) in totals
    return bool((numbers >= 0).all()) and (risen or int(numbers.sum()) in totals)
