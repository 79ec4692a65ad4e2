"""Notice that a weight changed after a merge, without a copy of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._modules import tensors

# Words of 8 bytes in a row of the tables that are summed up. It is a prime, so that the rows of a
# weight do not begin in the same columns: values that change places change the sums.
WIDTH = 509


class Mark(NamedTuple):
    """A mark of a parameter: it differs if values differ, or if values change places.

    Attributes:
        sizes: the number of values in each chunk that was read; none of a quantised parameter.
        digest: a number for all bits.
    """

    sizes: tuple[int, ...]
    digest: int


def mark(chunks: Iterable[Tensor]) -> Mark:
    """Return the mark of values that come in chunks, each in the order of its memory."""
    sizes: list[int] = []
    sums: list[Tensor] = []
    for chunk in chunks:
        sizes.append(chunk.numel())
        sums += _sums(chunk.detach().contiguous().view(-1))
    every = torch.cat(sums)
    odd = torch.arange(1, 2 * len(every), 2, device=every.device)
    return Mark(tuple(sizes), int(((every ^ (every >> 29)) * odd).sum()))


def mark_of(parameter: Any, sizes: tuple[int, ...] = ()) -> Mark:
    """Return the mark of a parameter; the mark of a quantised one stands for the object.

    Args:
        sizes: the chunks to read. An empty tuple: all at once.
    """
    if not tensors.is_plain(parameter):
        return Mark((), id(parameter))
    flat = parameter.detach().contiguous().view(-1)
    return mark(flat.split(list(sizes)) if sum(sizes) == len(flat) else [flat])


def _sums(flat: Tensor) -> list[Tensor]:
    """Return sums of the words in a flat tensor, and the words and bytes that are left over.

    Each sum is of an odd number of words: with an even one, flips of all signs could cancel.
    """
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    left: list[Tensor] = []
    if over := flat.numel() * flat.element_size() % 8:
        flat = flat.view(torch.uint8)
        flat, left = flat[:-over], [flat[-over:].to(torch.int64)]
    words = flat.view(torch.int64)
    rows = words.size(0) // WIDTH
    rows -= rows > 0 and rows % 2 == 0
    if rows:
        left += [words[: rows * WIDTH].view(rows, WIDTH).sum(0)]
    return [words[rows * WIDTH :], *left]
