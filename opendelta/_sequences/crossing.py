"""Let a decoder beside the module that embeds the tokens attend to the prompt in its output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer, Handover
from .._modules.calls import has_forward
from .._texts.arguments import arguments, named
from .._texts.masks import shown
from .._texts.rehearsal import is_own
from ..errors import SiteError, quoted
from ..names import ancestors, is_inside, last
from .embedders import in_decoders
from .layout import Layout
from .strip import WithPrompt
from .widening import STATES, CrossMask

CROSS = ("encoder_attention_mask", "encoder_padding_mask")
# Arguments of somebody's own decoder: the encoder's output, and what is said of it.
MEMORY = re.compile(
    r"^(memory|memory_bank|memories|enc|encoded|(enc|encoder)_(?!.*(mask|pad|len)).*)$"
)
SAYS = re.compile(r"mask|pad")
OF_ITS_OWN = re.compile(r"^(tgt|trg|target|dec|decoder|self|causal)_")
ATTENDS = re.compile(r"(^|_)dec|decoder|cross", re.IGNORECASE)


def crossings(
    modules: Mapping[str, nn.Module], prompts: Mapping[str, Any]
) -> dict[str, DeltaLayer]:
    """Return what decoders need that attend to prompts, which these then leave in their output.

    Args:
        prompts: the layers by the full names of the embedders.
    """
    found: dict[str, DeltaLayer] = {}
    decoders = in_decoders(modules)
    for name, module in modules.items():
        names = arguments(module)
        mask = next((mask for mask in CROSS if mask in names), None)
        takes = {"input_ids", STATES} <= {*names} and mask is not None
        if takes and id(module) in decoders and name not in prompts:
            for layer in prompts.values():
                layer.strip = False  # the decoder attends to the prompt
                found[name] = CrossMask(names, str(mask), layer.length)
    for name, layer in prompts.items():
        own = [] if found or name == "" else list(_beside(modules, name))
        for other in (each for each in own if each not in prompts):
            memory = next(filter(MEMORY.match, arguments(modules[other])), "")
            if memory:
                layer.strip, layer.told = False, layer.told or Handover()
                found[other] = Memory(arguments(modules[other]), memory, layer, other)
            elif layer.strip:
                raise SiteError(
                    f"{quoted(other)} may attend to the output of {quoted(name)}, out of which the "
                    "prompt is taken before: give strip=False, or call the argument for that "
                    "output 'memory'",
                    where=name,
                )
    return found


def _beside(modules: Mapping[str, nn.Module], embedder: str) -> Iterable[str]:
    """Yield the names of the outermost modules beside an embedder that may attend to its output."""
    outer = [o for o in [*ancestors(embedder), ""] if o != embedder]
    if not all(has_forward(modules[o]) and is_own(modules[o]) for o in outer):
        return
    taken: list[str] = []
    for name, module in modules.items():
        near = name in (embedder, *outer) or is_inside(name, embedder)
        if near or any(is_inside(name, other) for other in taken):
            continue
        names = arguments(module)
        named_so = ATTENDS.search(last(name)) or ATTENDS.search(type(module).__name__)
        others = [n for n in names[1:] if not SAYS.search(n)]
        if any(map(MEMORY.match, names)) or (named_so and others and is_own(module)):
            taken.append(name)
            yield name


class Memory(WithPrompt):
    """Widens the masks of a decoder that is given the output of an encoder with its prompt.

    Args:
        names: its arguments.
        memory: the one of them for the encoder's output.
        prompt: the layer with the prompt, which is not kept.
        where: its full name.
    """

    acts = Acts.SERVES

    def __init__(self, names: list[str], memory: str, prompt: Any, where: str) -> None:
        super().__init__()
        self.arguments, self.memory, self.where = names, memory, where
        self.length, self.handover = prompt.length, prompt.told

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self.arguments, args, kwargs)
        states = given.get(self.memory)
        if not isinstance(states, Tensor) or states.ndim != 3:
            return call(*args, **kwargs)
        for name, value in given.items():
            says = SAYS.search(name) and not OF_ITS_OWN.match(name)
            if says and isinstance(value, Tensor) and value.ndim > 1:
                given[name] = self._widened(name, value, states)
        return call(**given)

    def _widened(self, name: str, mask: Tensor, states: Tensor) -> Tensor:
        """Return a mask of the tokens with values for the prompt: those of the first token."""
        layout: Any = self.handover.value if self.handover is not None else None
        if layout is not None and (len(layout.next), layout.count) == (len(mask), mask.size(-1)):
            return layout.widened(mask.movedim(-1, 1)).movedim(1, -1)
        sizes, missing = states.shape[:2], [size - mask.size(-1) for size in states.shape[:2]]
        if mask.size(-1) in sizes and self.length not in missing:
            return mask
        if self.length not in missing or mask.size(0) not in (*sizes, 1):
            raise SiteError(
                f"{self.record.name!r}: {quoted(self.where)} is given {self.memory!r} "
                f"{list(states.shape)}, of tokens and a prompt of {self.length}, and {name!r} "
                f"{list(mask.shape)}, which does not show where it stands: give a mask [batch, "
                "length] of the tokens",
                where=self.where,
            )
        rows = mask.movedim(-1, 1)
        first = _seen(name, rows).flatten(2).any(-1) if rows.ndim > 2 else _seen(name, rows)
        first = first & (first.cumsum(-1) == 1)
        return Layout(first, self.length).widened(rows).movedim(1, -1)


def _seen(name: str, mask: Tensor) -> Tensor:
    """Return booleans: true for what is no padding."""
    return (mask == 0) if "pad" in name and not mask.is_floating_point() else shown(mask)
