"""Take prompts out again: of the blocks' output, of a model's, and of a pooler's input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._layers.base import Acts, DeltaLayer, Handover
from .._modules import calls
from .._texts.states import CACHES, HINTS
from ..errors import SiteError

ROUTER = "router"  # in the name of what a router of experts says of all rows' tokens in one list
KEPT = ("kv", "key", "present", "mem")  # in the name of what holds earlier tokens
POOLED = (
    "the model may read it where the prompt still is, such as from the first position, or from a "
    "mean: let a module around it do that, give strip=False and read the tokens' positions, or "
    "choose another method"
)

SUM = 1e-2  # by which a sum of 16-bit weights may be off 1


def check_positions(out: Any, full: int) -> None:
    """Raise if an output has more than `full` positions, those of tokens and prompts.

    It may have fewer, as Funnel pools them.
    """
    hidden = calls.hidden(out)
    if hidden.ndim > 2 and (count := hidden.size(1)) > full:
        raise SiteError(
            f"an output of {count} positions for {full} of prompt and tokens: images among the "
            "tokens, or padding to whole blocks, hide where the prompt is; pad the rows before, or "
            "give strip=False"
        )


def check_all(out: Any, batch: int, full: int, pooled: bool = False) -> None:
    """Raise unless each tensor of rows in an output of somebody's own forward has all positions.

    What has others may come from a position of the prompt, or from a mean over it.

    Args:
        pooled: values of whole rows come from a pooler that sees the tokens alone.
    """
    hidden = calls.hidden(out)
    if hidden.shape[:2] != (batch, full):
        raise SiteError(
            f"an output {list(hidden.shape)} for {full} positions of prompt and tokens: {POOLED}"
        )
    for key, item in (calls.items_of(out) or {}).items():
        rows = isinstance(item, Tensor) and item.ndim > 0 and item.size(0) == batch
        if not rows or key in CACHES or (pooled and item.ndim < 3):
            continue
        if item.ndim < 3 or (item.size(1) != full and full not in item.shape[2:]):
            raise SiteError(
                f"an output {key!r} of the shape {list(item.shape)} beside the hidden states: "
                f"{POOLED}"
            )


def strip(value: Any, slot_of: Tensor, full: int, nested: bool = True) -> Any:
    """Return `value` without the prompts in hidden states of `full` positions.

    Args:
        slot_of: the slots [batch, length] of the tokens.
        nested: lists and tuples inside hold hidden states, and no state of earlier tokens. Else the
            key of what a mapping holds tells.
    """
    if isinstance(value, Tensor):
        if value.ndim == 2 and not nested:  # a library's have names
            return _of_all_rows(slot_of, full, value)
        most = 3 if nested else 4  # a library's others are keys and values
        return _at_tokens(slot_of, full, value) if 3 <= value.ndim <= most else value
    if isinstance(value, dict):  # a ModelOutput, whose fields and items are the same
        for key, item in value.items():
            if ROUTER in str(key):
                value[key] = calls.map_tensors(functools.partial(_of_all_rows, slot_of, full), item)
                continue
            if isinstance(item, Tensor):
                taken = key not in CACHES
            elif nested:
                taken = isinstance(item, tuple | list) and key not in CACHES
            else:
                taken = not any(hint in str(key) for hint in (*HINTS, *CACHES, *KEPT))
            if taken or key == "hidden_states":
                value[key] = strip(item, slot_of, full, nested or not isinstance(item, Tensor))
        return value
    if isinstance(value, tuple | list):
        kept = () if nested else (list, tuple, dict)
        items = [v if isinstance(v, kept) else strip(v, slot_of, full, nested) for v in value]
        return calls.like(value, dict(enumerate(items)))
    return value


class WithPrompt(DeltaLayer):
    """A layer that changes the length of the rows, or depends on this length."""

    stands_alone = True

    @property
    def for_all_rows(self) -> str:
        """Return the reason: all rows of a batch have one length."""
        return "changes the length of the rows that take it"


class Strip(WithPrompt):
    """Takes the prompt's positions out of the blocks' output.

    Args:
        handover: passes the slots of the tokens, and the number of all positions.
        pooled: a pooler reads the first position of the output.
        own: the blocks are in a module of somebody's own.
    """

    acts = Acts.SERVES

    def __init__(self, handover: Handover, pooled: bool, own: bool) -> None:
        super().__init__()
        self.handover, self.pooled, self.own = handover, pooled, own

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.handover is not None
        layout = self.handover.take()
        out = call(*args, **kwargs)
        if layout is None:
            return out
        slot_of, full = layout
        if self.own:
            check_all(out, slot_of.size(0), full)
        elif self.pooled:
            check_positions(out, full)
        if calls.hidden(out).size(1) != full:
            return out
        return strip(out, slot_of, full, nested=not self.own)


LAID = Handover()  # the layouts of the prompts in the running call, the outermost first


def laid(layout: tuple[Tensor, int], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`; a `StripInput` inside finds the layout: the slots of tokens, and all slots."""
    before = LAID.value or ()
    LAID.put((*before, layout))
    try:
        return call(*args, **kwargs)
    finally:
        LAID.put(before)


class StripInput(WithPrompt):
    """Takes the prompts' positions out of the input of a pooler, which runs beside the blocks."""

    acts = Acts.SERVES

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layouts: Any = LAID.value or ()
        for slot_of, full in reversed(layouts):
            taken = functools.partial(_at_tokens, slot_of, full)
            args, kwargs = calls.map_tensors(taken, args), calls.map_tensors(taken, kwargs)
        x = calls.first_input(args, kwargs)
        if layouts and (x.ndim != 3 or x.shape[:2] != layouts[0][0].shape):
            self._refuse(x)
        for other in calls.every(Tensor, [args, kwargs]) if layouts else ():
            sizes = other.shape[1:-1] if other.ndim == 3 else other.shape[1:]
            if layouts[-1][1] in sizes and other is not x:
                self._refuse(other)
        return call(*args, **kwargs)

    def _refuse(self, x: Tensor) -> NoReturn:
        raise SiteError(
            f"{self.record.name!r}: a pooler is given {list(x.shape)}, which does not show where "
            "the prompt is: give strip=False"
        )


def _of_all_rows(slot_of: Tensor, full: int, value: Tensor) -> Tensor:
    """Return a tensor [batch * full, ...], such as a router's, at the slots of the tokens."""
    if value.ndim != 2 or len(value) != slot_of.size(0) * full:
        return _at_tokens(slot_of, full, value) if value.ndim == 3 else value
    return _at_tokens(slot_of, full, value.unflatten(0, (-1, full))).flatten(0, 1)


def _is_map(value: Tensor, full: int) -> bool:
    """True if a tensor [batch, heads, full, full] says who sees whom, and not [batch, full, ...].

    Raises:
        SiteError: there are as many heads as positions, and the values are no weights.
    """
    if value.ndim != 4 or value.shape[2:] != (full, full):
        return False
    if value.size(1) != full or torch.compiler.is_compiling():
        return True
    sums = value.float().sum(-1)
    if (value >= 0).all() and ((sums - 1).abs() < SUM).logical_or(sums == 0).all():
        return True
    raise SiteError(
        f"an output {list(value.shape)} for {full} positions of prompt and tokens does not show "
        "which of its axes are positions: give rows of another length, or strip=False"
    )


def _at_tokens(slot_of: Tensor, full: int, value: Tensor) -> Tensor:
    """Return a tensor [batch, full, ...] at the slots of the tokens; another one as it is."""
    if value.ndim < 2 or value.shape[:2] != (slot_of.size(0), full) or _is_map(value, full):
        return value
    slots = slot_of.to(value.device).reshape(*slot_of.shape, *[1] * (value.ndim - 2))
    return value.gather(1, slots.expand(-1, -1, *value.shape[2:]))
