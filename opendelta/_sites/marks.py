"""Notice that a weight changed after a merge, without a copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._modules import tensors

# Words of 8 bytes in a row of the tables that are summed up. It is a prime, so that the rows of a
# weight do not begin in the same columns.
WIDTH = 1021
PIECE = 2**20  # values in a table at most: a processor's cache holds it for the second sum


class Mark(NamedTuple):
    """A mark of a parameter: it differs if values differ, or if values change places.

    Attributes:
        sizes: the number of values in each piece that was read.
        sums: the sums of each piece.
    """

    sizes: tuple[int, ...]
    sums: bytes


def mark(chunks: Iterable[Tensor]) -> Mark:
    """Return the mark of values that come in chunks, each in the order of its memory."""
    sizes: list[int] = []
    sums: list[Tensor] = []
    for chunk in chunks:
        for piece in _pieces(chunk.detach().contiguous().view(-1)):
            sizes.append(piece.numel())
            sums += _sums(piece)
    return Mark(tuple(sizes), torch.cat(sums).cpu().numpy().tobytes())


def mark_of(module: nn.Module, key: str, sizes: tuple[int, ...] = ()) -> Mark:
    """Return the mark of a module's parameter; of a quantised one, that of the tensors it is in.

    Args:
        sizes: the pieces to read. An empty tuple: those of `mark`.
    """
    parameter: Any = module._parameters[key]
    if not tensors.is_plain(parameter):
        return mark(tensors.packed_values(module, key))
    flat = parameter.detach().contiguous().view(-1)
    return mark(flat.split(list(sizes)) if sum(sizes) == len(flat) else [flat])


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    """Cut a flat tensor into the pieces that are summed up apart: a chunk of a merge is one."""
    whole = flat.numel() <= PIECE or flat.device.type != "cpu"
    return [flat] if whole else flat.split(PIECE)


def _sums(flat: Tensor) -> list[Tensor]:
    """Return the sums of the rows and columns of a table of the words in a flat tensor.

    The words and bytes that are left over come last. No two words are in the same row and the same
    column, so that none can change places and leave all sums as they are. A row has an odd number
    of words: with an even one, flips of all signs could cancel.
    """
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    left: list[Tensor] = []
    if over := flat.numel() * flat.element_size() % 8:
        flat = flat.view(torch.uint8)
        flat, left = flat[:-over], [flat[-over:].to(torch.int64)]
    words = flat.view(torch.int64)
    rows = words.numel() // WIDTH
    if not rows:
        return [words, *left]
    table = words[: rows * WIDTH].view(rows, WIDTH)
    by_row = table.sum(1)  # first, as this reads memory faster
    return [by_row, table.sum(0), words[rows * WIDTH :], *left]
