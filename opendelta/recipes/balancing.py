"""Losses that keep the deltas of a gate in use, from what `watching` shows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._handles.delta import Delta
from .._handles.watching import Watched


def balance_loss(seen: Watched, block: str | Delta, mask: Tensor | None = None) -> Tensor:
    """Return Switch Transformer's load balancing loss, the mean over a block's modules.

    It is N sum_i f_i P_i for the N deltas that act: f_i is the share of the tokens' choices that
    fell on delta i, P_i its mean probability before `top_k`. A token that takes all deltas chooses
    the most probable; rows of `route` that do not take the block do not count. The loss is 1 if all
    deltas are used alike, and at most N. Add it to the loss with a factor such as 0.01.
    arXiv:2101.03961, equation 4.

    Args:
        seen: what `opendelta.watching` yields.
        block: the name or the handle of a `GateModel`.
        mask: [batch, length]: 0 or False for padding, which does not count.

    Warns:
        LostGradientWarning: the block trains, but its weights have no graph.

    Raises:
        DeltaError: the block did not run, or its weights are no softmax.
        OptionError: the mask is for other positions.
    """
    losses = []
    for _, logits, chosen, _ in seen.counted(block, mask, for_loss=True).values():
        acting = (logits != -torch.inf).any(0).sum()
        share = chosen.sum(0) / chosen.sum().clamp(min=1)
        probability = logits.softmax(-1).sum(0) / max(1, len(logits))
        losses.append(acting * (share * probability).sum())
    return torch.stack(losses).mean()


def z_loss(seen: Watched, block: str | Delta, mask: Tensor | None = None) -> Tensor:
    """Return the router z-loss, which keeps logits small: the mean of logsumexp(logits)^2.

    Add it to the loss with a factor such as 0.001. arXiv:2202.08906, equation 5. The arguments are
    those of `balance_loss`.
    """
    losses = [
        logits.logsumexp(-1).square().sum() / max(1, len(logits))
        for _, logits, *_ in seen.counted(block, mask, for_loss=True).values()
    ]
    return torch.stack(losses).mean()
