"""Where prompts and tokens stand in rows that have a prompt before each document.

And what a call says of the prompt, and what a module makes of token ids beside embedding them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.site import Site
from .._texts.arguments import EMBEDDED
from .._texts.documents import BESIDE, else_say, latest
from .._texts.masks import NUMBERED, marks, numbers_documents, shown
from .._texts.saying import (
    PLACES,
    STARTS,
    counts_tokens,
    says_else,
    tells_lengths,
    tells_one_length,
)
from .._texts.states import CACHES
from ..errors import SiteError, quoted
from ..names import ancestors, join

POSITIONS = "attention_mask", "position_ids"  # these are widened by rules of their own
# The prompt gets the values of its document's first token.
LIKE_FIRST = (
    "token_type_ids", "bbox", "task_type_ids", "langs", "global_attention_mask", "seq_idx",
    "image_attention_mask",
)  # fmt: skip
# The prompt gets zeros: it is no image.
NOTHING = ("mm_token_type_ids", "visual_pos_masks", "image_embeds_position_mask")
ROWS = "per_layer_inputs"  # what each block gets of each token; the prompt gets that of padding
KNOWN = (*EMBEDDED, *POSITIONS, *LIKE_FIRST, *NOTHING, ROWS)
# These speak of the tokens, and have no axis of the length.
COUNTS = (
    "lengths", "perm_mask", "target_mapping", "input_mask", "entity_position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "cross_attention_mask", "full_text_row_masked_out_mask",
    *PLACES, *STARTS,
)  # fmt: skip
BY_IDS = ("image_pixel_values", "audio_input_features")
OTHERS = ("encoder_", "decoder_", "cross_attention", "pixel_", "image_", "visual_e", "past_")
# {class that runs this child on token ids, and skips it where embeddings are given}
SKIPS = {"EsmModel": "embeddings"}
# {class that makes more of token ids than embeddings can say: what}
BEYOND = {
    "CsmDepthDecoderModel": "embeds them by their positions",
    "ClvpConditioningEncoder": "puts other tokens around them",
    "BltLocalEncoder": "works on patches of them, which the model finds before",
    "BltPatcher": "cuts them into patches",
    "HiggsAudioV2Model": "tells audio from text by them",
}
MULTIPLIES = "multiplies the encoder's output by the mask of the tokens alone"
# {class around the module that embeds the tokens, or that module's own: what it does with them}
AROUND = {
    "MusicgenForConditionalGeneration": MULTIPLIES,
    "MusicgenMelodyForConditionalGeneration": MULTIPLIES,
    "BridgeTowerModel": "runs the blocks of its text model, and never that model",
    "Tipsv2TextModel": "multiplies the blocks' output by the mask of the prompt and the tokens",
    "ProphetNetDecoder": "returns several streams, which its head cuts by the number of tokens",
    "LxmertModel": "returns the tokens' hidden states in tuples beside those of images",
}
LAST = {"last_non_pad_token", "sequence_lengths"}  # what code calls the place of each row's last
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

    def widened(self, value: Tensor, fill: int | Tensor | None = None) -> Tensor:
        """Return `value` [batch or 1, length, ...] with `fill` for the prompt's slots.

        Args:
            fill: a number, or [1, 1, ...]; None: the value of the next token.
        """
        index, taken = self.next.clamp(max=self.count - 1), self.taken
        for _ in value.shape[2:]:
            index, taken = index[..., None], taken[..., None]
        value = value.expand(self.next.size(0), *value.shape[1:])
        value = value.gather(1, index.expand(-1, -1, *value.shape[2:]))
        return value if fill is None else torch.where(taken, value, fill).to(value.dtype)

    def widened_mask(self, mask: Tensor) -> Tensor:
        """Return a mask [batch or 1, length], as it is, which shows the prompt and no `filler`."""
        if numbers_documents(mask):
            raise SiteError(f"a soft prompt has no place in this mask: {NUMBERED}")
        shows, hides = marks(mask)
        return self.widened(mask, shows).masked_fill(self.filler, hides)

    def positions(self, given: Tensor) -> Tensor:
        """Return position ids [..., slots]: those of the prompt begin where its document did."""
        given = given.expand(*given.shape[:-2], *self.slot_of.shape)
        index = self.next.clamp(max=self.count - 1).expand(*given.shape[:-1], -1)
        moved = given + torch.where(self.shift > 0, self.length, 0)
        at_row = torch.where(self.filler, 0, given.gather(-1, index)) + self.row
        return torch.where(self.taken, moved.gather(-1, index), at_row)


def _of_class(table: Mapping[str, str], module: nn.Module) -> str:
    """Return what a table {name of a class: ...} says of a module's class or its bases, or ""."""
    names = (base.__name__ for base in type(module).__mro__)
    return next((table[name] for name in names if name in table), "")


def check_takes_embeddings(site: Site) -> None:
    """Raise if a module needs its token ids for more than embeddings of them can say."""
    if what := _of_class(BEYOND, site.module):
        raise SiteError(
            f"{quoted(site.name)}: {type(site.module).__name__} asks for token ids, and takes no "
            f"embeddings in their place: it {what}; choose another module",
            where=site.name,
        )


def check_around(modules: Mapping[str, nn.Module], name: str) -> None:
    """Raise if a module around `name`, or that itself, has no place for a prompt there."""
    for outer in (*ancestors(name), ""):
        if what := _of_class(AROUND, modules[outer]):
            raise SiteError(
                f"a soft prompt in {quoted(name)} cannot be right inside "
                f"{type(modules[outer]).__name__}: it {what}; choose another method",
                where=name,
            )


def is_read_by_ids(modules: Mapping[str, nn.Module], name: str) -> bool:
    """True if a module around `name` finds each row's last token by its id, and reads that alone.

    So do the sequence classifiers of decoders, which count positions of token ids, not of prompts.
    """
    around = [*ancestors(name), ""][1:] if name else []
    codes = (getattr(inspect.unwrap(modules[n].forward), "__code__", None) for n in around)
    names = ({*code.co_varnames} for code in codes if code is not None)
    return any("input_ids" in own and LAST & own for own in names)


def skipped_by(module: nn.Module) -> str:
    """Return the name of the child that a module skips where embeddings are given, or ""."""
    return _of_class(SKIPS, module)


def plain_id(reader: Any) -> int:
    """Return a token id that is neither padding nor <mask> to a module that reads ids."""
    pad = -1 if reader.padding_idx is None else reader.padding_idx
    return pad + 1 if pad + 1 != getattr(reader, "mask_token_id", None) else pad + 2


def unknown(
    given: Mapping[str, Any], batch: int, length: int, other: str, own: bool, where: str
) -> str:
    """Return which argument of a call a prompt has no value for, and why; or "".

    Args:
        other: the name of a state of earlier tokens that is not known for one; or "".
        own: the module is of somebody's own.
        where: its full name.
    """
    mask = given.get(POSITIONS[0])
    if other and (mask is None or mask.size(1) == length):
        return (
            f"{other!r}, which may hold earlier tokens and the prompt, and nothing says so: give "
            "an attention_mask for all tokens, None where nothing came before, and what a forward "
            f"returned in a dict as {CACHES[0]!r}; {else_say(other, where)}"
        )
    for name, value in given.items():
        of_tokens = _has_tokens(value, batch, length) and not name.startswith(OTHERS)
        if value is not None and name in BY_IDS:
            return (
                f"{name!r}, and finds its places by token ids, which a prompt replaces by "
                "embeddings: give text alone"
            )
        counts = name in COUNTS or (own and _counts(name, value, batch, length))
        if value is not None and (counts or (of_tokens and name not in KNOWN)):
            return (
                f"{name!r}, which says something of each token, and nothing says its value for "
                f"the prompt; known are {', '.join(KNOWN)}{_way_out(name, own, where)}"
            )
    return ""


def _way_out(name: str, own: bool, where: str) -> str:
    if says_else(name):
        return (
            ". If a loss is computed of it, compute that outside of the model; or put the blocks "
            "in a child that returns hidden states, which the prompt is taken out of, and set "
            f"{join('model', where) if where else 'model'}.{BESIDE} = [{name!r}]"
        )
    return f"; {else_say(name, where)}" if own else ""


def _counts(name: str, value: Any, batch: int, length: int) -> bool:
    """True if an argument of a module of somebody's own may count the tokens."""
    known = name in KNOWN or name in CACHES
    return not known and (
        tells_lengths(name, value, batch)
        or tells_one_length(name, value, length)
        or counts_tokens(name, value, batch, length)
    )


def _has_tokens(value: Any, batch: int, length: int) -> bool:
    """True if a tensor has an axis of the tokens; [batch] has none, whatever the length is."""
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    if value.ndim == 1:
        return len(value) == length != batch
    ends = value.shape[:2], value.shape[-2:]
    return any(tuple(end) in ((batch, length), (1, length), (length, length)) for end in ends)


def maker_of_rows(module: nn.Module) -> tuple[str, ...]:
    """Return the arguments of the method that makes `ROWS` of token ids; (): there is none."""
    make: Any = getattr(module, "get_per_layer_inputs", None)
    if make is None or not getattr(module, "hidden_size_per_layer_input", 0):
        return ()
    return tuple(inspect.signature(make).parameters)


def widen_values(
    given: dict[str, Any], module: nn.Module, makes: tuple[str, ...], layout: Layout
) -> None:
    """Widen the arguments in `given` that have a value for each token, but `POSITIONS`.

    Args:
        makes: the arguments of what makes `ROWS` in the module.
    """
    for name in LIKE_FIRST:
        if given.get(name) is not None:
            given[name] = layout.widened(given[name])
    for name in NOTHING:
        if given.get(name) is not None:
            given[name] = layout.widened(given[name], 0)
    if makes:
        _widen_rows(given, module, makes, layout)


def _widen_rows(
    given: dict[str, Any], module: nn.Module, makes: tuple[str, ...], layout: Layout
) -> None:
    """Widen `ROWS`, or make them: the prompt gets those of padding, as images do in these models.

    If what makes them takes embeddings too, it finds the token ids of those.
    """
    make: Any = module.get_per_layer_inputs
    ids, embeds = (given.get(name) for name in EMBEDDED)
    rows = given.get(ROWS) if ids is None else make(ids)
    if rows is None and EMBEDDED[1] in makes:
        rows = make(None, embeds)
    if rows is not None:
        pad: Any = getattr(module, "padding_idx", None) or 0
        padding = torch.full((1, 1), pad, device=layout.slot_of.device)
        given[ROWS] = layout.widened(rows, make(padding))


def _check_values() -> None:
    """Raise if the values of tensors are not known, as in an export; break a compiled graph."""
    if torch.compiler.is_exporting():
        raise SiteError(ONE_GRAPH)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=ONE_GRAPH)  # with fullgraph=True torch raises with this


def starts(mask: Tensor) -> Tensor:
    """Return booleans: true for the first column of each row that is no padding."""
    seen = shown(mask)
    return seen & (seen.cumsum(-1) == 1)
