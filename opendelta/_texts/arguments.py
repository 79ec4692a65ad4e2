"""Arguments of a module's call, by name, and the mask that its module makes of token ids."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .._modules.calls import names_of
from .documents import BESIDE
from .rehearsal import hidden_id, ignored_id, is_own
from .saying import takes_state
from .states import earlier

READS = {"input_ids", "attention_mask"}
EMBEDDED = ("input_ids", "inputs_embeds")
# Arguments that begin so hold no text: a module with one of them is beside the text.
BESIDE_TEXT = (
    "pixel_values", "input_features", "input_values", "audio_values", "flattened_patches",
    "patch_embeds", "query_embeds", "grid_thw",
)  # fmt: skip
LATENTS = re.compile(r"latents|latent_query$|query$")  # parameters [..., number, width]
OF_LATENTS = {"PerceiverEncoder", "PerceiverAbstractDecoder"}  # classes that are given latents
# {class that takes the token of this id for padding, if a call has no mask: the attribute}
HIDDEN_BY_ID = {
    "XLMModel": "pad_index",
    "FlaubertModel": "pad_index",
    "T5GemmaEncoder": "config.pad_token_id",
}


def arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward."""
    cls: Any = type(module)
    return list(arguments_of(cls))


@functools.cache
def arguments_of(cls: type) -> tuple[str, ...]:
    """Return the names of the arguments of a class's forward."""
    return names_of(getattr(cls, "forward", None))


def named(names: list[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def padding_id(module: nn.Module) -> int | None:
    """Return the token id that a module takes for padding, if a call has no mask; or None."""
    names = (base.__name__ for base in type(module).__mro__)
    attribute = next((HIDDEN_BY_ID[name] for name in names if name in HIDDEN_BY_ID), "")
    own = arguments(module) if not attribute and is_own(module) else []
    if {*own} >= READS:
        return hidden_id(module)
    if own and "attention_mask" not in own:
        return ignored_id(module)
    return operator.attrgetter(attribute)(module) if attribute else None


def with_mask(given: dict[str, Any], padding: int | None) -> dict[str, Any]:
    """Return the arguments of a call, with the mask that its module would make of the token ids.

    Args:
        padding: the result of `padding_id`.
    """
    said = any(given.get(name) is not None for name in ("attention_mask", "lengths"))
    ids = given.get("input_ids")
    if padding is None or ids is None or said or earlier(given) != 0:
        return given
    return {**given, "attention_mask": (ids != padding).long()}


def is_beside_text(module: nn.Module) -> bool:
    """True if a module takes images or sounds, or has latents, and takes no token ids."""
    own = arguments(module)
    if "input_ids" in own:
        return False
    return any(name.startswith(BESIDE_TEXT) for name in own) or _has_latents(module)


def _has_latents(module: nn.Module) -> bool:
    """True if a module of transformers computes latents of its own in place of its input's tokens.

    In a module of somebody's own, what is called a query may be a matrix.
    """
    if is_own(module):
        return False
    if not OF_LATENTS.isdisjoint(base.__name__ for base in type(module).__mro__):
        return True
    tables = [t for name, t in module._parameters.items() if t is not None and LATENTS.match(name)]
    several = any(t.ndim > 1 and t.size(-2) > 1 for t in tables)
    return several and any(isinstance(part, nn.Linear) for part in module.modules())


class Stated(NamedTuple):
    """Facts about the arguments of a module, known or stated.

    Attributes:
        keeps: it may keep earlier tokens itself, as no argument takes a state of them.
        own: it is somebody's own, and may call a mask, or a state, as it likes.
        beside: the arguments that stand beside the tokens and tell nothing of them, as it says.
    """

    keeps: bool
    own: bool
    beside: tuple[str, ...]

    def telling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call that may tell of its tokens."""
        return {name: value for name, value in given.items() if name not in self.beside}


def stated(module: nn.Module) -> Stated:
    """Return what is known of a module's arguments."""
    cls: Any = type(module)
    beside = getattr(module, BESIDE, ())
    names = (beside,) if isinstance(beside, str) else tuple(beside)
    return Stated(not takes_state(cls), is_own(module), names)
