"""Numbers in an argument that may tell of a call's tokens, whatever the argument is called.

A name says what its author thought of; numbers that count, or that part a row in runs, tell of
places, padding or documents under any name. A graph that is compiled has no values to look at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDES = -1e3  # what is added to scores and is not above this hides a token


def may_tell(value: Any, batch: int, length: int) -> bool:
    """True if numbers may say which tokens are padding, where documents begin, or what came before.

    False for numbers that are the same for all tokens, count them from 0 or 1, or do not fit.
    """
    tensor = _tensor(value)
    if tensor is None or are_full(tensor, length):
        return False
    rows = _rows(tensor, batch, length)
    if _parts_pairs(tensor, length, None) or (rows is not None and _parts_rows(rows)):
        return True
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    one_each = tensor.shape in ((batch,), (batch, 1)) and (rows is None or length == batch)
    if one_each and bool((tensor != length).any() and (tensor.abs() <= length).all()):
        return True
    return rows is None and _ends(tensor, batch, length)


def may_part(value: Any, batch: int, length: int, seen: Tensor) -> bool:
    """True if numbers may say where documents begin in rows whose padding is known.

    Args:
        seen: booleans [batch or 1, length], false for padding.
    """
    tensor = _tensor(value)
    if tensor is None:
        return False
    near = (seen[:, 1:] & seen[:, :-1]).to(tensor.device)
    rows = _rows(tensor, batch, length)
    if _parts_pairs(tensor, length, near):
        return True
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    if rows is not None:
        return _count(rows) and bool(((rows.diff() < 0) & near).any())
    return tensor.shape != (batch,) and _ends(tensor, batch, length)


def are_full(value: Any, length: int) -> bool:
    """True if numbers of tokens, or shares, are the `length` of all rows: there is no padding."""
    tensor = _tensor(value)
    if tensor is None:
        return False
    full = 1 if tensor.is_floating_point() and bool((tensor <= 1).all()) else length
    return bool((tensor == full).all())


def _tensor(value: Any) -> Tensor | None:
    """Return an argument as a tensor with values; None: it holds no numbers that can be read."""
    if torch.compiler.is_compiling():
        return None
    if not isinstance(value, Tensor):
        if not isinstance(value, list | tuple) and not hasattr(value, "__array__"):
            return None
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):  # texts, objects, rows of several lengths
            return None
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    if not plain or value.is_meta or value.is_nested or value.is_complex() or not value.numel():
        return None
    return value.detach()


def _rows(tensor: Tensor, batch: int, length: int) -> Tensor | None:
    """Return numbers for each token [batch or 1, length], or None."""
    outer = tensor.shape[:-1]
    fits = (
        tensor.shape[-1:] == (length,)
        and outer.numel() in (1, batch)
        and max(outer[1:], default=1) == 1
    )
    return tensor.reshape(-1, length) if fits else None


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
    if not rows.is_floating_point() and rows.dtype != torch.bool and _count(rows):
        return bool((rows.diff() != 1).any() or (rows[:, 0] > 1).any())
    hidden = _hidden(rows)
    if hidden is None and rows.is_floating_point():
        return False
    changes = (rows.diff() != 0 if hidden is None else hidden[:, 1:] != hidden[:, :-1]).sum(-1)
    return bool(changes.any()) and int(changes.max()) <= (
        2 if hidden is not None else rows.size(1) // 2
    )


def _count(rows: Tensor) -> bool:
    """True if in some row most numbers are by one greater than those before them."""
    return rows.size(1) == 1 or bool(((rows.diff() == 1).sum(-1) * 2 >= rows.size(1) - 1).any())


def _ends(numbers: Tensor, batch: int, length: int) -> bool:
    """True if several numbers may be the lengths or the ends of parts of a row or of all rows."""
    if numbers.ndim != 1 or len(numbers) < 2:
        return False
    totals = (length, batch * length)
    risen = bool((numbers.diff() > 0).all()) and int(numbers[-1]) in totals
    return bool((numbers >= 0).all()) and (risen or int(numbers.sum()) in totals)
