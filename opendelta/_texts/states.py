"""States of earlier tokens among the arguments of a call: caches, and what models call otherwise.

What counts no tokens gets a note of them, when the call that filled it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._modules.calls import every

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states", "cache")

# Arguments that begin so hold no state of earlier tokens, in whatever form they come.
NO_STATES = (
    "encoder_", "decoder_", "cross_", "head_mask", "pixel_", "image", "video", "vision", "visual",
    "audio", "deepstack", "position_", "input", "attention_mask", "output_", "labels", "cond",
    "control", "freqs", "rope", "rotary", "cos", "sin",
)  # fmt: skip
OF_OWN_TEXT = ("decoder_", "input_")  # but these may go before the name of a state
HINTS = ("past", "prev", "history", "cache")  # in the name of a tensor that is such a state
STATES = ("hidden", "kv", "hx", "h0", "h_0", "mem")  # or these are its name
ENDS = ("_state", "_kv", "_mem")  # or these are the end of its name


def cache_in(given: Mapping[str, Any]) -> Any:
    """Return the cache, or the state, of earlier tokens among the arguments of a call, or None."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


def other_state_in(given: Mapping[str, Any]) -> str:
    """Return the name of an argument that looks like such a state, under another name; or ""."""
    return next((n for n, v in given.items() if n not in CACHES and _is_state(n, v)), "")


def state_in(given: Mapping[str, Any]) -> str:
    """Return the name of an argument that holds earlier tokens, under any name; or ""."""
    own = (n for n in CACHES if given.get(n) is not None and earlier({CACHES[0]: given[n]}) != 0)
    return next((n for n in own if not _is_empty(given[n])), "") or other_state_in(given)


def is_new(value: Any) -> bool:
    """True if a value may hold tokens later, and holds none yet."""
    plain = value is None or isinstance(value, Tensor | str | int | float)
    return not plain and earlier({CACHES[0]: value}) == 0


def unnoted(given: Mapping[str, Any]) -> str:
    """Return the name of a state with values that counts no tokens, and that no call returned."""
    state = cache_in(given)
    if state is None or earlier({CACHES[0]: state}) is not None or torch.compiler.is_compiling():
        return ""
    return "" if note_of(state) is not None else next(n for n in CACHES if given.get(n) is not None)


def may_be_state(name: str) -> bool:
    """True if an argument of this name may hold earlier tokens."""
    if name.startswith(("use_", "return_")):
        return False
    return name in (*CACHES, *STATES) or name.endswith(ENDS) or any(h in name for h in HINTS)


def _is_state(name: str, value: Any) -> bool:
    for prefix in OF_OWN_TEXT:
        if name.startswith(prefix) and may_be_state(name.removeprefix(prefix)):
            name = name.removeprefix(prefix)
    if value is None or name.startswith(NO_STATES):
        return False
    if isinstance(value, Tensor):
        return may_be_state(name) and value.is_floating_point() and value.ndim > 1
    if isinstance(value, nn.Module) and not (may_be_state(name) or _counts(value)):
        return False
    if _counts(value):
        return earlier({CACHES[0]: value}) != 0
    return any(tensor.ndim > 1 and tensor.numel() for tensor in _held_in(value))


def _counts(state: Any) -> bool:
    """True if a state tells itself how many tokens it holds, or whether it holds any."""
    return hasattr(state, "get_seq_length") or any(map(_tells, getattr(state, "layers", ())))


def _tells(layer: Any) -> bool:
    return hasattr(layer, "get_seq_length") or hasattr(layer, "has_previous_state")


def _is_empty(state: Any) -> bool:
    """True if no values are in a state: what holds none yet, or has an axis of no tokens."""
    return not _counts(state) and not any(tensor.numel() for tensor in _held_in(state))


def _held_in(value: Any) -> Iterator[Tensor]:
    """Return the tensors in lists, tuples, mappings, objects and modules, at any depth."""
    if isinstance(value, nn.Module):
        value = [vars(module) for module in value.modules()]
    return every(Tensor, value, objects=True)


def holds_tensors(value: Any) -> bool:
    """True if a value is no tensor, and holds some."""
    return not isinstance(value, Tensor) and any(True for _ in _held_in(value))


def has_axis(state: Any, size: int) -> bool:
    """True if all tensors of several axes in a state have an axis of this size."""
    return all(size in tensor.shape for tensor in _held_in(state) if tensor.ndim > 1)


def earlier(given: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a call's cache holds; None: some, and it counts none."""
    cache = cache_in(given)
    if cache is None or _is_empty(cache):
        return 0
    cache = getattr(cache, "self_attention_cache", cache)
    layers = list(getattr(cache, "layers", ()))
    parts = layers if any(map(_tells, layers)) else [cache]
    counted = [part for part in parts if hasattr(part, "get_seq_length")]
    most = max([0, *(int(part.get_seq_length() or 0) for part in counted)])
    if most or (counted and len(counted) == len(parts)):
        return most
    began = [getattr(part, "has_previous_state", {}) for part in parts]
    return None if parts is not layers or any(any(each.values()) for each in began) else 0


# ------------------------------------------------------------------------------- notes about states
class Note(NamedTuple):
    """A note of a state, made when a call had filled it.

    Attributes:
        counts: the numbers of its tokens in each row [batch, 1].
        marks: the numbers in the state beside the values; where they differ, it was reset since.
        time: which of all notes it is.
    """

    counts: Tensor
    marks: list[Any]
    time: int


_time = itertools.count(1)
_in_states: Any = WeakIdKeyDictionary()  # {what holds the state: its note}


def now() -> int:
    """Return a time after that of all notes there are; a graph makes none."""
    return 0 if torch.compiler.is_compiling() else next(_time)


def note_of(state: Any) -> Note | None:
    """Return what was noted of a state that was not reset since; None: nothing was."""
    if state is None or torch.compiler.is_compiling():
        return None
    holder = _holder(state)
    note = None if holder is None else _in_states.get(holder)
    return None if note is None or note.marks != _marks(state) else note


def renew(state: Any, counts: Tensor, before: Note | None, began: int) -> None:
    """Note how many tokens a state holds, unless a call inside this one has noted it.

    Args:
        before: the note that was read when the call began.
        began: the time then.
    """
    holder = _holder(state)
    note = _in_states.get(holder)
    if note is None or note is before or note.time < began:
        _in_states[holder] = Note(counts, _marks(state), now())


def counts_none(state: Any) -> bool:
    """True for a state with values that counts no tokens."""
    return state is not None and _holder(state) is not None and earlier({CACHES[0]: state}) is None


def _holder(state: Any) -> Any:
    """Return what stays the same while a state grows: RWKV's is a list of tensors."""
    lasts = not isinstance(state, list | tuple | dict) and type(state).__weakrefoffset__
    return state if lasts else next(iter(_held_in(state)), None)


def _marks(state: Any) -> list[Any]:
    """Return the numbers in a state: of integers, and how often a tensor of integers changed."""
    if isinstance(state, nn.Module):
        state = [vars(module) for module in state.modules()]
    found = [*every(int, state, objects=True), *every(Tensor, state, objects=True)]
    return [
        _mark(each) for each in found if not (torch.is_tensor(each) and each.is_floating_point())
    ]


def _mark(number: Any) -> Any:
    if not isinstance(number, Tensor):
        return number
    return number.tolist() if number.is_inference() else (id(number), number._version)
