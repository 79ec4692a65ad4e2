"""Arguments that say something of the tokens of a call by their names: places, padding, parts."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._modules.calls import items_of
from .numbers import are_full, is_causal, may_part, may_tell, shows
from .states import NO_STATES, may_be_state, other_state_in

PLACES = ("cache_position", "input_pos")  # arguments that number the tokens of a call
STARTS = ("start_pos",)  # arguments that count the tokens before
KNOWN = ("attention_mask", "input_ids", "inputs_embeds", *PLACES, *STARTS)
LENGTHS = re.compile(  # of how many tokens each row has, or where they end
    r"(^|_)([iot]|seq_?|valid_?)?len(s|gth|gths)?$|(^|_)(n|nb|num)_?(tokens|valid)$|(^|_)token_counts?$"
    r"|^((seq|row)_)?sizes$|^ends?$|^(last|end|eos|final)_?(pos|position|index|idx)s?$"
)
ENDS = re.compile(r"^cu_?(seq)?_?len|^splits?$")  # where packed documents end
OF_TEXT = ("input", "attention_mask", "position_", "output_")
OF_OTHERS = tuple(name for name in NO_STATES if name not in OF_TEXT)
PARTS = re.compile(r"^(segment|doc|document|seq|sequence|example|sample)_?(ids?|idx|index)$")
KEEPS = (
    "and nothing tells how many tokens it keeps from earlier calls: hand the state on as an "
    "argument, or give position_ids"
)
# Such names say that what they hold is of something else, such as a class of each row.
ELSE = re.compile(
    r"^(labels?|targets?|tgt|y|class(es)?|tasks?|lang(uage)?s?|speakers?|users?|domains?|styles?|t|"
    r"(token_)?types?|loss(es)?|return|use|time_?steps?|weights?|seeds?)(_|$)|_(labels?|targets?)$"
)
OFFSETS = re.compile(r"(^|_)(offset|past_len(gth)?|cache_len(gth)?|cur_pos)$")
# Arguments that begin so have a value for each token, and are no text.
BESIDE = ("label", "target", "position", "pos", "token_type", "y", "loss", "mask", "return", "use")


def numbers_in(given: Mapping[str, Any], batch: int, length: int, device: torch.device) -> Any:
    """Return the position ids of a call with `length` tokens, or None.

    An encoder-decoder may hand on those of its other side, which it ignores.
    """
    names = ("position_ids", *PLACES, *STARTS)
    name, said = next(((n, given[n]) for n in names if given.get(n) is not None), ("", None))
    known = name in PLACES + STARTS
    positions = _numbers(name, said, batch, length, device) if known else said
    if isinstance(positions, Tensor) and positions.ndim == 1:
        positions = positions[None]
    if isinstance(positions, Tensor) and (not positions.ndim or positions.size(-1) != length):
        return None
    return positions


def _numbers(name: str, said: Any, batch: int, length: int, device: torch.device) -> Any:
    """Return the positions that an argument says: each, or the first one of each row."""
    steps = torch.arange(length, device=device)
    if isinstance(said, int) and not isinstance(said, bool):
        return steps[None] + said
    if not isinstance(said, Tensor) or said.is_floating_point():
        return None
    if said.numel() == 1 and (name in STARTS or length > 1):
        return steps[None] + said.reshape(1, 1)
    one_each = said.numel() == batch and said.shape in ((batch,), (batch, 1))
    if one_each and (name in STARTS or length == 1 or said.size(-1) != length):
        return said.reshape(batch, 1) + steps
    return said


def counted_before(
    given: Mapping[str, Any], batch: int, length: int, device: torch.device
) -> tuple[bool, int | None]:
    """Return whether arguments say how many tokens came before, and their number.

    None: as many as the positions say.
    """
    name = next((n for n in (*STARTS, *PLACES) if given.get(n) is not None), "")
    if not name:
        return False, None
    if isinstance(given[name], int):
        return True, given[name]
    numbers = _numbers(name, given[name], batch, length, device)
    if not isinstance(numbers, Tensor):
        return False, None
    if torch.compiler.is_compiling():
        return True, None
    firsts = numbers.reshape(-1, numbers.size(-1))[:, 0]
    return True, int(firsts[0]) if (firsts == firsts[0]).all() else None


def other_mask_in(given: Mapping[str, Any], batch: int, length: int, own: str = "") -> str:
    """Return the name of an argument that may tell padding, under a name of its own; or "".

    Args:
        own: the name of the tokens; those that begin like it speak of them.
    """
    for name, value in given.items():
        if name in KNOWN or _is_of_others(name, own) or "loss" in name or "label" in name:
            continue
        lengths = tells_lengths(name, value, batch, own) and not are_full(value, length)
        if lengths or _is_mask(name, value, batch, length):
            return name
        if counts_tokens(name, value, batch, length, own):
            return name
    return ""


def _is_of_others(name: str, own: str) -> bool:
    return name.startswith(tuple(each for each in OF_OTHERS if not own.startswith(each)))


def says_else(name: str) -> bool:
    """True if the name of an argument says that it is of something else, such as labels."""
    return ELSE.search(name) is not None


def counts_tokens(name: str, value: Any, batch: int, length: int, own: str = "") -> bool:
    """True if an argument's numbers may tell of the tokens, and its name says nothing else."""
    other = name in KNOWN or ELSE.search(name) or _is_of_others(name, own)
    return not other and may_tell(value, batch, length)


def unheard_in(given: Mapping[str, Any], batch: int, length: int) -> str:
    """Return the name of an argument that may tell padding of tokens in no known form; or "".

    Args:
        batch, length: of the hidden states somewhere inside.
    """
    for name, value in flat(given).items():
        if value is None or ELSE.search(name) or "loss" in name or "label" in name:
            continue
        if isinstance(value, list | tuple) and not all(isinstance(v, int | float) for v in value):
            return name  # texts, or tensors of several lengths
        if not isinstance(value, Tensor | list | tuple):
            continue
        if "mask" in name or LENGTHS.search(name) or ENDS.search(name):
            return name
        one_each = isinstance(value, Tensor) and value.shape in ((batch,), (batch, 1))
        if one_each or may_tell(value, batch, length):
            return name
    return ""


def _is_mask(name: str, value: Any, batch: int, length: int) -> bool:
    """True if an argument may say which tokens of each row are padding."""
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    if "mask" in name or name.startswith("pad"):
        if value.shape == (length, length) and "pad" not in name and is_causal(value):
            return False
        pairs = value.ndim == 3 and value.shape[1:] == (length, length)  # of each head
        if pairs and not torch.compiler.is_compiling() and (value == value[:1]).all():
            return False  # who sees whom in all rows alike: no padding
        return value.size(0) == batch or (pairs and batch > 1 and value.size(0) % batch == 0)
    return value.shape == (batch, length) and value.dtype == torch.bool and not ELSE.search(name)


def parts_in(
    given: Mapping[str, Any], batch: int, length: int, seen: Tensor | None, own: str = ""
) -> str:
    """Return the name of an argument that may tell several documents of a row; or "".

    Args:
        seen: booleans [batch, length], false for padding; then what is called segments may be types
            of tokens. None: there is no mask.
        own: the name of the tokens.
    """
    for name, value in given.items():
        if name in KNOWN or ELSE.search(name) or _is_of_others(name, own):
            continue
        if seen is not None and may_part(value, batch, length, seen):
            return name
        if not isinstance(value, Tensor) or value.is_floating_point() or not value.ndim:
            continue
        if ENDS.search(name):
            return name
        # Where there are values, their runs tell of parts under any name; see `other_mask_in`.
        named = torch.compiler.is_compiling() and seen is None and PARTS.search(name)
        if named and value.size(-1) == length:
            return name
    return ""


def tells_lengths(name: str, value: Any, batch: int, own: str = "") -> bool:
    """True if an argument may tell how long each row is, or where packed documents end."""
    if _is_of_others(name, own) or not (LENGTHS.search(name) or ENDS.search(name)):
        return False
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(each, int | float) for each in value)
    if not isinstance(value, Tensor):
        return False
    one_each = value.shape in ((batch,), (batch, 1))
    return one_each or (value.ndim == 1 and bool(ENDS.search(name)))


def tells_one_length(name: str, value: Any, length: int) -> bool:
    """True if an argument may be one number of tokens for all rows, as `prefix_len=4` is."""
    if not LENGTHS.search(name) or name.startswith(("max", "min")):
        return False
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return type(value) is int and 0 < value <= length


@functools.cache
def takes_state(cls: type) -> bool:
    """True if modules of a class may be given a state of earlier tokens."""
    try:
        parameters = inspect.signature(cls.forward).parameters.values()  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return True
    return any(p.kind is p.VAR_KEYWORD or may_be_state(p.name) for p in parameters)


def keeps_its_cache(given: Mapping[str, Any], keeps: bool) -> str:
    """Return what tells that a module itself keeps a call's earlier tokens; or "".

    Args:
        keeps: no argument takes a state of them.
    """
    if given.get("use_cache") is True and keeps:
        return "use_cache"
    return next((n for n, v in given.items() if OFFSETS.search(n) and type(v) is int and v > 0), "")


def by_usual_names(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a call's arguments with its tokens as `input_ids` or `inputs_embeds`, as far as seen.

    The items of a mapping or a record, such as a batch, count as arguments.

    Returns:
        The arguments, and the names of the texts among them, the tokens first.
    """
    found = flat(given)
    for known in ("input_ids", "inputs_embeds"):
        if found.get(known) is not None:
            return found, [known]
    tensors = {n: v for n, v in found.items() if isinstance(v, Tensor) and not _is_beside(n)}
    rows = [n for n, v in tensors.items() if v.is_floating_point() and v.ndim == 3]
    shapes = [tensors[name].shape[:2] for name in rows]
    texts = [
        name
        for name, v in tensors.items()
        if v.dtype in (torch.int64, torch.int32) and v.ndim == 2
        if v.shape not in shapes or not shows(v)
    ]
    for usual, names in (("input_ids", texts), ("inputs_embeds", rows)):
        if names:
            return {usual: tensors[names[0]], **_without(found, tensors[names[0]])}, names
    return found, []


def _without(given: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Return the arguments but for the tokens, which are no state, whatever else they are."""
    return {n: value for n, value in given.items() if value is not tokens or may_be_state(n)}


def flat(given: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """Return the arguments of a call, with the items of mappings and records in their place."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        items = None if isinstance(value, tuple | list) or may_be_state(name) else items_of(value)
        if items is None or not depth or _is_by_number(name, value, items):
            found[name] = value
        else:
            found |= flat({str(key): item for key, item in items.items()}, depth - 1)
    return found


def _is_by_number(name: str, value: Any, items: Mapping[Any, Any]) -> bool:
    """True if a mapping holds states by the numbers of the layers, and not arguments by name."""
    named = all(isinstance(key, str) for key in items)
    return not named and bool(other_state_in({name: value}))


def _is_beside(name: str) -> bool:
    told = "mask" in name or PARTS.search(name) or LENGTHS.search(name) or may_be_state(name)
    return bool(told) or name in (*PLACES, *STARTS) or name.startswith(BESIDE)
