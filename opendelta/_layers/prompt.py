"""Put prompts before the embedded tokens of a model, and strip them from its output.

The attention mask, position ids and token types are widened by the prompt. The prompt takes the
first positions of the cache. An encoder-decoder's cross-attention mask is widened too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._modules.calls import has_forward
from .._modules.kinds import Embedding, kind_of
from .._modules.tensors import stored
from ..errors import OptionError, SiteError, quoted
from ..names import parent
from .base import Acts, DeltaLayer, Handover
from .costs import Flops
from .site import Site

TAKES = {"input_ids", "inputs_embeds", "attention_mask"}
COUNT = "create_position_ids_from_input_ids"
CROSS = {"encoder_hidden_states", "encoder_attention_mask"}


def arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward."""
    cls: Any = type(module)
    return list(_arguments(cls))


@functools.cache
def _arguments(cls: type) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # compiled by TorchScript, or written in C
        return ()


def stacks(modules: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Return {full name of a module that embeds tokens: true for an encoder-decoder's decoder}.

    If modules inside each other take token ids, the innermost one embeds them.
    """
    takes = [name for name, module in modules.items() if set(arguments(module)) >= TAKES]
    inner = [n for n in takes if not any(o != n and _is_in(o, n) for o in takes)]
    decoders = set()
    for module in modules.values():
        two = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        if two and hasattr(module, "get_decoder"):
            decoder: Any = module.get_decoder()  # type: ignore[operator]
            if decoder is not module:  # an encoder by itself returns itself
                decoders |= {id(part) for part in decoder.modules()}
    return {name: id(modules[name]) in decoders for name in inner}


def _is_in(name: str, around: str) -> bool:
    return name.startswith(f"{around}." if around else "")


def _block_holder(modules: Mapping[str, nn.Module], stack: str) -> str:
    """Return the full name of the module inside `stack` that runs the blocks, or `stack` itself."""
    lists = [
        name for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and _is_in(name, stack)
    ]  # fmt: skip
    if not lists:
        return stack
    biggest = max(lists, key=lambda n: sum(p.numel() for p in modules[n].parameters()))
    holder = parent(biggest)
    return holder if has_forward(modules[holder]) else stack


def embedding_of(module: nn.Module) -> str:
    """Return the name inside `module` of its token embedding.

    Raises:
        SiteError: it has no token embedding.
    """
    wanted = None
    if hasattr(module, "get_input_embeddings"):
        wanted = module.get_input_embeddings()  # type: ignore[operator]
    for name, part in module.named_modules():
        if part is wanted or (wanted is None and isinstance(part, nn.Embedding)):
            return name
    raise SiteError(f"{type(module).__name__} has no embedding of tokens inside")


class _WithPrompt(DeltaLayer):
    """A layer that changes the length of the rows, or depends on this length."""

    stands_alone = True

    @property
    def for_all_rows(self) -> str:
        """Return the reason: all rows of a batch have one length."""
        return "changes the length of the rows that take it"


class PromptLayer(_WithPrompt):
    """Rows [length, width] before the embedded tokens; a subclass writes `prompt`.

    Args:
        strip: take the prompt's positions out again after the blocks.
    """

    kinds = ("stack",)
    acts = Acts.BEFORE
    inside = True
    sees_module = True
    gates_itself = True
    gate_width = 0
    identity = False

    def __init__(self, site: Site, length: int, strip: bool) -> None:
        super().__init__()
        self.arguments = arguments(site.module)
        self.embedding = embedding_of(site.module)
        kind = kind_of(site.module.get_submodule(self.embedding))
        if not isinstance(kind, Embedding):
            raise SiteError(
                f"{site.name!r}: its embedding {self.embedding!r} has no known width",
                where=site.name,
            )
        self.width, self.length, self.strip = kind.out_features, length, strip
        self.stripper: Handover | None = (
            None  # to strip right after the blocks, as later modules read a single position
        )

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
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        first = cache is None or cache.get_seq_length() == 0
        self._widen(given, call.module, first)
        if not first:
            return call(**given)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if embeds is None:
            embeds = call.module.get_submodule(self.embedding)(ids)
        prompt = self.prompt() if self.gate is None else self.gate(embeds) * self.prompt()
        prompt = prompt.type_as(embeds).expand(embeds.size(0), -1, -1)
        given["input_ids"], given["inputs_embeds"] = None, torch.cat([prompt, embeds], 1)
        length = embeds.size(1) + self.length
        if self.stripper is not None:
            self.stripper.put(length)
        out = call(**given)
        return strip(out, self.length, length) if self.strip else out

    def _widen(self, given: dict[str, Any], module: nn.Module, first: bool) -> None:
        """Widen the attention mask, position ids and token types in `given` for the prompt."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise SiteError(
                f"{self.record.name!r}: the attention mask of {type(module).__name__} must be "
                "[batch, length], so that the prompt can be put before it"
            )
        if mask is not None:
            given["attention_mask"] = F.pad(mask, (self.length, 0), value=1)
        start, embeddings = 0, module._modules.get("embeddings")
        if hasattr(embeddings, COUNT) and hasattr(embeddings, "padding_idx"):
            # RoBERTa's positions begin after its padding index, the position of all padding.
            start = int(embeddings.padding_idx) + 1  # type: ignore[union-attr,arg-type]
            if positions is None and first and given.get("input_ids") is not None:
                positions = getattr(embeddings, COUNT)(given["input_ids"], start - 1)
        if positions is not None:
            moved = torch.where(positions < start, positions, positions + self.length)
            new = torch.arange(self.length, device=positions.device) + start
            new = new.expand(*positions.shape[:-1], -1)
            given["position_ids"] = torch.cat([new, moved], -1) if first else moved
        types = given.get("token_type_ids")
        if types is not None and first:
            given["token_type_ids"] = torch.cat([types[:, :1].expand(-1, self.length), types], 1)

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        own: dict[str, Any] = {
            name: layer for name, layer in made.items() if isinstance(layer, cls)
        }
        others: dict[str, DeltaLayer] = {}
        for name, is_decoder in stacks(modules).items():
            if is_decoder and name not in own and set(arguments(modules[name])) >= CROSS:
                for layer in own.values():
                    layer.strip = False  # the decoder attends to the prompt
                    others[name] = CrossMask(arguments(modules[name]), layer.length)
        for name, layer in own.items():
            holder = _block_holder(modules, name)
            if layer.strip and holder != name:
                layer.stripper = Handover()
                others[holder] = Strip(layer.length, layer.stripper)
        return others


def rows_of(site: Site, embedding: str, config: Any, length: int) -> Tensor:
    """Return the embeddings [length, width] of the tokens that `config.token_init` names.

    Raises:
        OptionError: a text without a tokenizer, no tokens, or ids that are not in the vocabulary.
    """
    table = site.module.get_submodule(embedding)
    kind: Any = kind_of(table)
    chosen, size = config.token_init, kind.in_features
    if not site.new:
        return torch.empty(length, kind.out_features, device=site.device)
    if isinstance(chosen, str):
        if config.tokenizer is None:
            raise OptionError(
                f"token_init={chosen!r} needs tokenizer=..., the folder or name of one; or pass "
                "token_init=tokenizer(text).input_ids"
            )
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        chosen = tokenizer(chosen, add_special_tokens=False).input_ids
    ids = list(range(min(length, size))) if chosen is True else list(chosen)
    if not ids or not 0 <= min(ids) <= max(ids) < size:
        raise OptionError(
            f"token_init names {len(ids)} tokens {ids[:5]}; they must be some of the {size} that "
            f"{embedding!r} in {quoted(site.name)} embeds"
        )
    if site.device.type == "meta":
        return torch.empty(length, kind.out_features, device="meta")
    index = torch.tensor([ids[i % len(ids)] for i in range(length)])
    weight: Any = stored(table, "weight")
    return (weight.detach()[index.to(weight.device)] * kind.scale).to(site.device, site.dtype)


class CrossMask(_WithPrompt):
    """Lets a decoder attend to the prompt, which is part of the encoder's output."""

    acts = Acts.SERVES

    def __init__(self, names: list[str], length: int) -> None:
        super().__init__()
        self.arguments, self.length = names, length

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.size(-1) < states.size(1):
            given["encoder_attention_mask"] = F.pad(mask, (self.length, 0), value=1)
        return call(**given)


class Strip(_WithPrompt):
    """Takes the prompt's positions out of the blocks' output."""

    acts = Acts.SERVES

    def __init__(self, length: int, handover: Handover) -> None:
        super().__init__()
        self.length, self.handover = length, handover

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.handover is not None
        full = self.handover.take()
        out = call(*args, **kwargs)
        return out if full is None else strip(out, self.length, full)


def strip(value: Any, length: int, full: int) -> Any:
    """Return `value` without the first `length` of the `full` positions of its hidden states."""
    if isinstance(value, Tensor):
        return value[:, length:] if value.ndim == 3 and value.size(1) == full else value
    if isinstance(value, dict):  # a ModelOutput, whose fields and items are the same
        for key, item in value.items():
            if isinstance(item, Tensor | tuple | list):
                value[key] = strip(item, length, full)
        return value
    if isinstance(value, tuple | list):
        return type(value)([strip(item, length, full) for item in value])
    return value
