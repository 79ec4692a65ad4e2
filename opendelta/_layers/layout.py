"""Where prompts and tokens stand in rows that have a prompt before each document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._modules import calls
from ..errors import SiteError
from .documents import latest

ONE_GRAPH = (
    "a soft prompt cannot be in one graph with position_ids, whose values say how many documents a "
    "row holds: leave position_ids out; each row is then one document"
)


class Layout:
    """The slots of rows in which a prompt stands before each document.

    Args:
        firsts: booleans [batch, length], true for the first token of each document. In a row
            without any, the prompt stands before all.
        length: number of rows of the prompt.
        several: rows may have several documents.

    Attributes:
        slot_of: the slot [batch, length] of each token.
        full: number of slots of a row.
        ragged: some rows have fewer documents than others; their last slots hold nothing.
        filler: booleans [batch, slots], true for these slots.
    """

    def __init__(self, firsts: Tensor, length: int, several: bool = False) -> None:
        batch, self.count = firsts.shape
        self.length = length
        columns = torch.arange(self.count, device=firsts.device)
        firsts = firsts | ((columns == 0) & ~firsts.any(-1, keepdim=True))
        self.shift = firsts.cumsum(-1) * length
        if several:
            _check_values()
        most = int(self.shift[:, -1].max()) if several else length
        self.slot_of, self.full = columns + self.shift, self.count + most
        self.ragged = several and int(self.shift[:, -1].min()) < most
        slots = torch.arange(self.full, device=firsts.device)
        taken = torch.zeros(batch, self.full, dtype=torch.long, device=firsts.device)
        taken = taken.scatter(1, self.slot_of, 1)
        self.taken = taken == 1
        self.next = taken.cumsum(-1) - taken  # the token of the slot, or the next one after it
        self.filler = self.next == self.count
        self.row = slots - 1 - latest(self.taken)

    def filled(self, prompt: Tensor, embeds: Tensor) -> Tensor:
        """Return the rows [batch, slots, width] of `prompt` and of `embeds` in their slots."""
        prompt = prompt.expand(embeds.size(0), -1, -1)
        with torch.autocast(embeds.device.type, enabled=False):  # it joins no float16 with bfloat16
            every = torch.cat([prompt, embeds, torch.zeros_like(embeds[:, :1])], 1)
        rows = torch.where(self.filler, self.length + self.count, self.row)
        index = torch.where(self.taken, self.length + self.next, rows)
        return every.gather(1, index[..., None].expand(-1, -1, embeds.size(-1)))

    def widened(self, value: Tensor, fill: int | None = None) -> Tensor:
        """Return `value` [batch or 1, length, ...] with `fill` for the prompt's slots.

        Args:
            fill: None: the value of the next token.
        """
        index, taken = self.next.clamp(max=self.count - 1), self.taken
        for _ in value.shape[2:]:
            index, taken = index[..., None], taken[..., None]
        value = value.expand(self.next.size(0), *value.shape[1:])
        value = value.gather(1, index.expand(-1, -1, *value.shape[2:]))
        return value if fill is None else torch.where(taken, value, fill)

    def positions(self, given: Tensor) -> Tensor:
        """Return position ids [..., slots]: those of the prompt begin where its document did."""
        given = given.expand(*given.shape[:-2], *self.slot_of.shape)
        index = self.next.clamp(max=self.count - 1).expand(*given.shape[:-1], -1)
        moved = given + torch.where(self.shift > 0, self.length, 0)
        at_row = torch.where(self.filler, 0, given.gather(-1, index)) + self.row
        return torch.where(self.taken, moved.gather(-1, index), at_row)


def _check_values() -> None:
    """Raise if the values of tensors are not known, as in an export; break a compiled graph."""
    if torch.compiler.is_exporting():
        raise SiteError(ONE_GRAPH)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=ONE_GRAPH)  # with fullgraph=True torch raises with this


def starts(mask: Tensor) -> Tensor:
    """Return booleans: true for the first column of each row that is no padding."""
    seen = mask != 0
    return seen & (seen.cumsum(-1) == 1)


def check_positions(out: Any, full: int) -> None:
    """Raise if an output has more than `full` positions; it may have fewer, as Funnel pools them.

    Args:
        full: number of positions of tokens and prompts.
    """
    count = calls.hidden(out).size(1)
    if count > full:
        raise SiteError(
            f"an output of {count} positions for {full} of prompt and tokens: images among the "
            "tokens, or padding to whole blocks, hide where the prompt is; pad the rows before, or "
            "give strip=False"
        )


def strip(value: Any, slot_of: Tensor, full: int) -> Any:
    """Return `value` without the prompts in hidden states of `full` positions.

    Args:
        slot_of: the slots [batch, length] of the tokens.
    """
    if isinstance(value, Tensor):
        if value.ndim != 3 or value.shape[:2] != (slot_of.size(0), full):
            return value
        return value.gather(1, slot_of.to(value.device)[..., None].expand(-1, -1, value.size(2)))
    if isinstance(value, dict):  # a ModelOutput, whose fields and items are the same
        for key, item in value.items():
            if isinstance(item, Tensor | tuple | list):
                value[key] = strip(item, slot_of, full)
        return value
    if isinstance(value, tuple | list):
        return calls.like(value, [strip(item, slot_of, full) for item in value])
    return value
