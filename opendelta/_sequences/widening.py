"""Let other modules count with a prompt: a decoder's mask, and what numbers the positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._layers.base import Acts, Handover
from .._texts.arguments import named
from ..errors import SiteError
from .layout import Layout, starts
from .strip import WithPrompt

STATES = "encoder_hidden_states"


class CrossMask(WithPrompt):
    """Lets a decoder attend to the prompt, which is part of the encoder's output."""

    acts = Acts.SERVES
    sees_module = True

    def __init__(self, names: list[str], mask: str, length: int) -> None:
        super().__init__()
        self.arguments, self.mask, self.length = names, mask, length

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self.arguments, args, kwargs)
        states, mask = given.get(STATES), given.get(self.mask)
        if states is not None and mask is not None and mask.size(-1) < states.size(1):
            given[self.mask] = Layout(starts(mask), self.length).widened_mask(mask)
            more = sum(e.length for e in call.beneath if isinstance(e, CrossMask))
            if given[self.mask].size(-1) + more != states.size(1):
                raise SiteError(
                    f"{self.record.name!r}: {STATES} of {states.size(1)} positions, and a mask of "
                    f"{mask.size(-1)} tokens: a row of several encoded texts has several prompts, "
                    "which the mask does not show: leave the mask out, or choose another method"
                )
        return call(**given)


class Numbered(WithPrompt):
    """Lets a module number the positions by token ids, where it is given embeddings instead.

    Args:
        names: its arguments, the first of which are the token ids.
        handover: passes the token ids with the prompt's.
    """

    acts = Acts.SERVES

    def __init__(self, names: list[str], handover: Handover) -> None:
        super().__init__()
        self.arguments, self.handover = names, handover

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.handover is not None
        given, ids = named(self.arguments, args, kwargs), self.handover.take()
        if ids is None:
            return call(*args, **kwargs)
        given.pop("inputs_embeds", None)
        return call(**{**given, self.arguments[0]: ids})
