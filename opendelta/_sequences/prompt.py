"""Put prompts before the embedded documents of a model, and strip them from its output.

A prompt stands next to the first token of a document, after padding on the left. All arguments with
a value for each token are widened, or refused. An encoder-decoder's cross-attention mask is widened
too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer, Handover
from .._layers.costs import Flops
from .._layers.site import Site
from .._modules.kinds import Embedding, kind_of
from .._texts.arguments import EMBEDDED, arguments, named, padding_id, stated, with_mask
from .._texts.documents import Documents
from .._texts.masks import shown
from .._texts.rehearsal import is_own, other_ids
from .._texts.returned import Watch
from .._texts.running import mask_around, noting
from .._texts.saying import KEEPS, keeps_its_cache, numbers_in
from .._texts.states import CACHES, cache_in, earlier, has_axis, other_state_in, unnoted
from ..errors import DeltaError, SiteError, quoted
from .crossing import crossings
from .embedders import block_holder
from .embedding import embedding_of, numbered, numbering, room, scale_of
from .layout import (
    POSITIONS,
    Layout,
    check_around,
    check_takes_embeddings,
    is_read_by_ids,
    maker_of_rows,
    plain_id,
    skipped_by,
    starts,
    unknown,
    widen_values,
)
from .strip import Strip, StripInput, WithPrompt, check_all, check_positions, laid, strip
from .widening import Numbered

IDS = (torch.int64, torch.int32)
WHOLE = ("ReformerModel",)  # classes whose cache holds whole chunks


class PromptLayer(WithPrompt):
    """Rows [length, width] before the embedded tokens; a subclass writes `prompt`.

    Args:
        strip: take the prompt's positions out again after the blocks.
    """

    kinds = ("stack",)
    acts = Acts.BEFORE
    inside = True
    writes = "prompt"
    sees_module = True
    gates_itself = True
    gate_width = 0
    identity = False

    def __init__(self, site: Site, length: int, strip: bool) -> None:
        super().__init__()
        self.arguments, self.padding = arguments(site.module), padding_id(site.module)
        check_takes_embeddings(site)
        self.embedding = embedding_of(site.module)
        kind = kind_of(site.module.get_submodule(self.embedding))
        if not isinstance(kind, Embedding):
            raise SiteError(
                f"{quoted(site.name)}: its embedding {self.embedding!r} has no known width; choose "
                "another module (modified_modules=), or another method, such as PrefixModel",
                where=site.name,
            )
        self.width, self.length, self.strip = kind.out_features, length, strip
        self.room = room(site.module)
        self.said, self.scale, self.where = stated(site.module), scale_of(site.module), site.name
        own = self.said.own
        self.by_id = other_ids(site.module, self.embedding, self.scale) if own else []
        # To strip right after the blocks, as later modules read a single position.
        self.stripper: Handover | None = None
        self.told: Handover | None = None  # a decoder attends to the prompt
        self.pooled = False  # a pooler beside the blocks needs its input stripped
        self.numbered = numbered(site.module)
        self.ids = Handover() if self.numbered else None  # to number the positions by
        self.skipped, self.makes_rows = skipped_by(site.module), maker_of_rows(site.module)

    @property
    def extra_positions(self) -> int:  # type: ignore[override]
        """Return the length of the prompt."""
        return self.length

    def flops(self, module: nn.Module) -> Flops:
        """Return 0: the prompt is put before the embedded tokens as it is."""
        return Flops(0, 0)

    def prompt(self) -> Tensor:
        """Return the prompt [length, width]."""
        raise NotImplementedError

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        given, module = with_mask(named(self.arguments, args, kwargs), self.padding), call.module
        prompts = self.length + sum(layer.extra_positions for layer in call.beneath)
        ids, embeds = (given.get(name) for name in EMBEDDED)
        tokens: Any = embeds if ids is None else ids
        batch, length = self._check(given, module, tokens)
        documents = Documents(given, batch, length, tokens.device)
        if documents.continued:
            self._continue(given, length, documents.held or 0, prompts)
            return noting(Documents(given, batch, length, tokens.device), call, **given)
        layout = Layout(documents.firsts().expand(batch, -1), self.length, documents.several)
        if embeds is None:
            embeds = module.get_submodule(self.embedding)(ids) * self.scale
        prompt = self.prompt() if self.gate is None else self.gate(embeds) * self.prompt()
        self._widen(given, module, layout)
        given["input_ids"] = None
        embeds = layout.filled(prompt.type_as(embeds), embeds)
        if ids is not None:
            embeds = self._numbered(given, module, layout, ids, embeds, prompts > self.length)
        given["inputs_embeds"] = embeds
        self._check_room(given, layout.full, self.length)
        if self.stripper is not None:
            self.stripper.put((layout.slot_of, layout.full))
        if self.told is not None:
            self.told.put(layout)
        widened = Documents(given, batch, layout.full, embeds.device)
        if (mask := mask_around(documents)) is not None:
            widened.mask = layout.widened_mask(mask)
        slots = layout.slot_of, layout.full
        call = functools.partial(laid, slots, call) if self.pooled else call
        out = (self._explained if self.said.own else noting)(widened, call, **given)
        if not self.strip:
            return out
        if not self.said.own or self.stripper is not None:
            check_positions(out, layout.full)
        else:
            check_all(out, batch, layout.full, self.pooled)
        return strip(out, layout.slot_of, layout.full, not self.said.own)

    def _explained(self, documents: Documents, call: Any, **given: Any) -> Any:
        """Run a forward of somebody's own; an error in it tells what the prompt changed."""
        documents.watch = Watch(self, self.said.telling(given))
        try:
            return noting(documents, call, **given)
        except Exception as error:
            if not isinstance(error, DeltaError):
                error.add_note(
                    f"{self.record.name!r} put {self.length} rows before the tokens of this call, "
                    "as inputs_embeds, and widened its mask: a forward that computes with token "
                    "ids or the mask after its blocks must expect that; strip=False keeps the rows "
                    "of the prompt in the hidden states, too"
                )
            raise

    def _numbered(
        self,
        given: dict[str, Any],
        module: nn.Module,
        layout: Layout,
        ids: Tensor,
        embeds: Tensor,
        more: bool,
    ) -> Tensor:
        """Return the embedded rows as a module that also reads token ids makes them.

        Args:
            more: prompts beneath need the ids too.
        """
        reader = self.numbered or self.skipped
        if not reader:
            return embeds
        ids = layout.widened(ids, plain_id(module.get_submodule(reader)))
        if self.ids is not None:
            self.ids.put(ids)
        if more:
            given["input_ids"] = ids
        elif self.skipped:
            said = {name: given.get(name) for name in POSITIONS}
            return module.get_submodule(self.skipped)(ids, inputs_embeds=embeds, **said)
        return embeds

    def _check(self, given: dict[str, Any], module: nn.Module, tokens: Any) -> tuple[int, int]:
        """Return batch and length of the tokens; raise if an argument cannot be widened."""
        kind, mask = type(module).__name__, given.get("attention_mask")
        if not isinstance(tokens, Tensor) or tokens.ndim != (2 if tokens.dtype in IDS else 3):
            shape = tuple(getattr(tokens, "shape", ()))
            self._refuse(f"the token ids of {kind} must be [batch, length], and are {shape}")
        batch, length = tokens.shape[:2]
        layers = getattr(cache_in(given), "layers", ())
        if any(getattr(layer, "max_cache_len", None) is not None for layer in layers):
            self._refuse(
                f"the static cache of {kind} has no room for the prompt: use the default cache"
            )
        if kind in WHOLE and cache_in(given) is not None:
            self._refuse(
                f"the cache of {kind} holds whole chunks, in which a prompt has no place: call "
                "generate(use_cache=False)"
            )
        plain = isinstance(mask, Tensor) and mask.ndim == 2 and mask.size(0) in (1, batch)
        if mask is not None and not plain:
            self._refuse(
                f"the attention mask of {kind} must be [batch, length], so that the prompt can be "
                "put between its columns"
            )
        if mask is None and tokens.dtype in IDS and self.by_id and earlier(given) == 0:
            self._check_ids(kind, tokens)
        numbers = numbers_in(given, batch, length, tokens.device)
        if numbers is None and POSITIONS[1] not in self.arguments:
            given.pop(POSITIONS[1], None)
        told = self.said.telling(given)
        if why := unknown(told, batch, length, self._state_in(told), self.said.own, self.where):
            self._refuse(f"{kind} is given {why}")
        if self.said.own and (name := keeps_its_cache(told, self.said.keeps)):
            self._refuse(f"{kind} is given {name!r}, {KEEPS}")
        return batch, length

    def _check_ids(self, kind: str, tokens: Tensor) -> None:
        """Raise if a call without a mask has ids by which a forward of somebody's own hides."""
        if torch.compiler.is_compiling():
            return
        found = [token for token in self.by_id if (tokens == token).any()]
        if found:
            self._refuse(
                f"{kind} computes something else of the token id {found[0]} than of its embedding, "
                "as where it finds padding by ids, and behind a prompt it is given embeddings: "
                "give an attention_mask"
            )

    def _state_in(self, given: dict[str, Any]) -> str:
        """Return the name of a state that may lack the prompt, as nobody knows where it is from."""
        name = other_state_in(given)
        return name or ((unnoted(given) or Watch(self, given).known) if self.said.own else "")

    def _refuse(self, why: str) -> NoReturn:
        raise SiteError(f"{self.record.name!r}: {why}")

    def _widen(self, given: dict[str, Any], module: nn.Module, layout: Layout) -> None:
        """Widen all arguments in `given` that have a value for each token."""
        ids, mask, positions = (given.get(n) for n in ("input_ids", *POSITIONS))
        if mask is not None:
            given["attention_mask"] = layout.widened_mask(mask)
        elif layout.ragged:
            given["attention_mask"] = self._mask(module, layout)
        if positions is not None:
            given["position_ids"] = layout.positions(positions)
        elif ids is not None and (rule := numbering(module)) is not None:
            number, pad = rule
            given["position_ids"] = number(layout.widened(ids, pad + 1), pad)
        widen_values(given, module, self.makes_rows, layout)

    def _mask(self, module: nn.Module, layout: Layout) -> Tensor | None:
        """Return a mask that hides the ends of rows with fewer documents than others.

        Causal models do not see these ends; and with a mask they would not part the documents.
        """
        causal = {part.is_causal for part in module.modules() if hasattr(part, "is_causal")}
        if causal == {True}:
            return None
        if causal == {False}:
            return (~layout.filler).long()
        self._refuse(
            f"rows of one call of {type(module).__name__} must pack the same number of documents"
        )

    def _continue(self, given: dict[str, Any], length: int, held: int, prompts: int) -> None:
        """Widen the arguments for tokens after those in a cache, which holds the prompt.

        Args:
            length: number of new tokens.
            held: number of positions in the cache; 0 if it does not count them.
            prompts: length of this prompt and of those beneath it, which the cache holds too.
        """
        mask, positions = (given.get(name) for name in POSITIONS)
        other = self._state_in(self.said.telling(given))
        if other and mask is not None and mask.size(1) > length:
            wanted = mask.size(1) - length + prompts
            if not has_axis(given[other], wanted):
                self._refuse(
                    f"{other!r} holds no {wanted} positions, of {wanted - prompts} tokens and of "
                    f"prompts of {prompts}: return it in a dict, as {CACHES[0]!r}"
                )
        if mask is not None:
            if held and mask.size(1) + prompts != held + length:
                self._refuse(
                    f"the cache holds {held} positions, and the mask has {mask.size(1)} columns "
                    f"for it and {length} more tokens; a cache that was filled with prompts of "
                    f"{prompts} must hold {mask.size(1) - length + prompts}"
                )
            self._check_began(mask, length)
            if mask.size(1) > length:  # else it is of the new tokens alone
                given["attention_mask"] = Layout(starts(mask), self.length).widened_mask(mask)
        if positions is not None:
            if held and mask is None:
                self._check_places(positions, held - prompts)
            given["position_ids"] = positions + self.length
        self._check_room(given, held + length, prompts)

    def _check_began(self, mask: Tensor, length: int) -> None:
        """Raise if a row begins after the cache: there its prompt stands before its padding."""
        earlier, now = shown(mask[:, :-length]), shown(mask[:, -length:])
        if not earlier.size(1) or torch.compiler.is_compiling():
            return
        begins = now.any(-1) & ~earlier.any(-1)
        if begins.any():
            self._refuse(
                f"row {int(begins.nonzero()[0])} begins after {earlier.size(1)} columns of padding "
                "that the cache holds, where its prompt does not stand next to its first token: "
                "give more tokens at once (prefill_chunk_size=...), or rows of more alike lengths"
            )

    def _check_places(self, positions: Tensor, tokens: int) -> None:
        """Raise unless rows without a mask go on where the `tokens` in the cache end."""
        if positions.ndim > 2 or torch.compiler.is_compiling():  # those of images are no numbers
            return
        given = positions[:, 0]
        if (given != tokens).any():
            self._refuse(
                f"the position ids begin at {int(given[given != tokens][0])}, and the cache holds "
                f"{tokens} tokens and the prompt: a cache that generate() returned holds the "
                "prompt too, do not pass it, or a model with a prompt as assistant, to a generate()"
            )

    def _check_room(self, given: dict[str, Any], total: int, prompts: int) -> None:
        """Raise if a table of positions is too short.

        Args:
            total: number of positions of prompts and tokens, if no position ids are given.
            prompts: number of the prompts' positions among them.
        """
        if self.room is None or torch.compiler.is_compiling():
            return
        positions = given.get("position_ids")
        needed = total if positions is None else int(positions.max()) + 1
        if needed > self.room:
            self._refuse(
                f"the prompt of {prompts} and {total - prompts} tokens need {needed} "
                f"positions, and the model's table has {self.room}: shorten the one or the other"
            )

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        own: dict[str, Any] = {
            name: layer for name, layer in made.items() if isinstance(layer, cls)
        }
        for name, layer in own.items():
            check_around(modules, name)
            layer.strip = layer.strip or is_read_by_ids(modules, name)
        others = crossings(modules, own)
        for name, layer in own.items():
            if layer.ids is not None:
                others[f"{name}.{layer.numbered}".lstrip(".")] = Numbered(
                    arguments(modules[name].get_submodule(layer.numbered)), layer.ids
                )
            holder, pooler = block_holder(modules, name), modules[name]._modules.get("pooler")
            if layer.strip and holder != name:
                layer.stripper = Handover()
                by_own = is_own(modules[holder])
                others[holder] = Strip(layer.stripper, pooler is not None, by_own)
            elif layer.strip and pooler is not None:
                layer.pooled = True
                others[f"{name}.pooler".lstrip(".")] = StripInput()
        return others
