"""Masks: one `[batch, length]` shows which tokens are no padding, others who sees whom.

Each is of numbers that are 0 for what is hidden, or is added to scores.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

NUMBERED = (
    "attention_mask numbers the documents of a row: give a mask of 0 and 1, and position_ids that "
    "begin anew with each document"
)
HIDDEN = -1000.0  # an additive mask hides what has less than this; biases of neighbours are small


def shown(mask: Tensor) -> Tensor:
    """Return booleans like a mask [batch, length], true for what it shows.

    One of floating numbers that are 0 or less is added to scores.
    """
    if not mask.is_floating_point():
        return mask != 0
    return torch.where((mask <= 0).all(), mask > HIDDEN, mask != 0)


def marks(mask: Tensor) -> tuple[Any, Any]:
    """Return the numbers by which a mask [batch, length] shows and hides a token."""
    if not mask.is_floating_point():
        return 1, 0
    added = (mask <= 0).all()
    return torch.where(added, 0.0, 1.0), torch.where(added, torch.finfo(mask.dtype).min, 0.0)


def numbers_documents(mask: Tensor) -> bool:
    """True if a mask [batch, length] has 1 for the tokens of a row's first document, 2, 3, ..."""
    recorded = torch.compiler.is_compiling()  # then nothing can be looked at
    recorded = recorded or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if recorded or mask.is_floating_point() or mask.dtype == torch.bool:
        return False
    before, after = mask[:, :-1], mask[:, 1:]
    grows = (after >= before) | (after == 0)  # unlike Longformer's 2 for a global token
    return bool(((mask > 1).any() & grows.all()).item())


def agrees(mask: Any, number: Tensor, held: int | None) -> bool:
    """False if a mask hides tokens of one document from themselves, or one from the next.

    Then some of them are padding, of which the numbers say nothing.

    Args:
        mask: [batch or 1, heads or 1, length or 1, keys], boolean or additive, or a dict of such
            masks of which some modules take the one and some the other; masks of other forms are
            not looked at.
        number: integers [batch or 1, length], which change where a document begins.
        held: number of keys before those of these tokens; None: the last keys are theirs.
    """
    masks = [*mask.values()] if isinstance(mask, dict) else [mask]
    known = [each for each in masks if isinstance(each, Tensor) and each.ndim == 4]
    if not known or number.size(-1) < 2 or torch.compiler.is_compiling():
        return True
    linked = (_linked(each, held, number.size(-1)) for each in known)
    apart = number[:, 1:] != number[:, :-1]
    return bool((apart | functools.reduce(torch.logical_or, linked)).all())


def _linked(mask: Tensor, held: int | None, length: int) -> Tensor:
    """Return booleans [batch or 1, length - 1]: neighbours see themselves and the one before."""
    before = mask.size(-1) - length
    before = max(before if held is None else min(held, before), 0)
    sees = mask[..., before : before + length]
    sees = (sees > HIDDEN) if sees.is_floating_point() else (sees != 0)
    sees = sees.any(1).expand(-1, length, -1)
    own = sees.diagonal(0, -2, -1)
    return own[:, 1:] & own[:, :-1] & sees.diagonal(-1, -2, -1)


def hides_later(mask: Tensor) -> bool:
    """True if a mask [..., length, length] hides later tokens from some that those see.

    And no earlier ones so. Padding, neighbours and documents apart are hidden both ways. A mask of
    0 and 1 may show by either.
    """
    readings = [mask > HIDDEN] if mask.is_floating_point() else []
    shows = mask != 0
    if mask.dtype == torch.bool or bool((~shows | (mask == 1)).all()):
        readings += [shows, ~shows]
    return any(map(_is_one_sided, readings))


def _is_one_sided(sees: Tensor) -> bool:
    own = sees.diagonal(0, -2, -1)
    alone = sees & ~sees.mT & own.unsqueeze(-1) & own.unsqueeze(-2)
    earlier, later = (part.flatten(-2).any(-1) for part in (alone.tril(-1), alone.triu(1)))
    return bool((earlier & ~later).any())
