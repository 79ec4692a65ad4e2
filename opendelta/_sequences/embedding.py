"""How models embed token ids: by what they scale them, and how they number the positions."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.runs import is_watched
from .._layers.site import Site
from .._modules import kept
from .._modules.kinds import kind_of
from .._modules.probing import is_known
from .._modules.process import kept_random
from .._modules.tensors import full, is_plain, is_sharded, stored
from .._modules.trials import alone
from .._modules.wrappers import computing_device
from .._texts.arguments import EMBEDDED, READS, arguments, arguments_of, is_beside_text
from .._texts.rehearsal import embeds, is_by_position, is_own
from ..errors import OptionError, SiteError, quoted
from ..names import SLOT, ancestors, is_inside, join, last

COUNT = "create_position_ids_from_input_ids", "make_positions"
# {class: its attribute that multiplies the embeddings of token ids, and not embeddings given}
SCALES = {"FalconH1Model": "embedding_multiplier"} | dict.fromkeys(
    ("PegasusEncoder", "MarianEncoder", "BlenderbotSmallEncoder", "MvpEncoder", "MvpDecoder",
     "Speech2TextDecoder"),
    "embed_scale",
)  # fmt: skip
# {class that asks for token ids beside embeddings: by which setting}
NEEDS_IDS = {"LayoutLMv3Model": "has_relative_attention_bias"}
TABLES = (
    "wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_embed",
    "positions_embed",
)  # fmt: skip

HOLDS = "pos"  # in the name of each table of positions of somebody's own
NAMED = re.compile(r"^(?!.*(rel|bias|tag|_pos$)).*((^|_)pos(_|$|i?emb|enc)|position)")


def embedding_of(module: nn.Module) -> str:
    """Return the name inside `module` of its token embedding.

    Raises:
        SiteError: it has no token embedding, or takes no embeddings in the place of token ids.
    """
    setting = next(filter(None, (NEEDS_IDS.get(b.__name__) for b in type(module).__mro__)), None)
    if setting is not None and getattr(module.config, setting):
        raise SiteError(
            f"{type(module).__name__} asks for token ids, and takes no embeddings in their place, "
            f"with {setting}=True in its config"
        )
    asking = next((m for m in module.modules() if _asks_for_ids(type(m))), None)
    if asking is not None:
        raise SiteError(
            f"{type(module).__name__} asks for token ids, and takes no embeddings in their place: "
            f"{type(asking).__name__} inside it computes with them beside the hidden states"
        )
    wanted = None
    if hasattr(module, "get_input_embeddings"):
        try:
            wanted = module.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError as error:  # CANINE hashes characters
            raise SiteError(f"{type(module).__name__} has no one embedding of tokens") from error
    names = [
        name for name, part in module.named_modules()
        if part is wanted or (wanted is None and isinstance(part, nn.Embedding))
    ]  # fmt: skip
    if not names:
        raise SiteError(f"{type(module).__name__} has no embedding of tokens inside")
    if is_own(module):
        return _tried(module, names)
    _check_given_on(module, names[0])
    return names[0]


def _check_given_on(module: nn.Module, embedding: str) -> None:
    """Raise if a model inside that embeds the tokens takes ids alone: it is given no embeddings."""
    for name in [*ancestors(embedding)][1:]:
        takes = {*arguments(module.get_submodule(name))}
        if takes >= READS and EMBEDDED[1] not in takes:
            raise SiteError(
                f"{type(module).__name__} takes no embeddings in the place of token ids: "
                f"{EMBEDDED[1]} is no argument of {name!r} "
                f"({type(module.get_submodule(name)).__name__}), which embeds them"
            )


def _tried(module: nn.Module, names: list[str]) -> str:
    """Return the one of a module's embeddings by which it embeds tokens: the first, if none shows.

    Raises:
        SiteError: it makes more of token ids than each of the embeddings does.
    """
    results = {name: embeds(module, name, scale_of(module)) for name in names}
    found = next((name for name, same in results.items() if same), None)
    if found is None and False in results.values():
        raise SiteError(
            f"{type(module).__name__} does not compute the same of token ids as of inputs_embeds "
            f"that {names[0]!r} makes of them, so a prompt beside them has no place: let the "
            "forward do what it does to embedded ids, such as a scale or a norm, to inputs_embeds "
            "too, and let get_input_embeddings() return the embedding of tokens"
        )
    return found or names[0]


_cache: Any = functools.cache  # Any: its annotation allows no class as argument


@_cache
def _asks_for_ids(cls: Any) -> bool:
    """True if a class's forward cannot do without token ids beside hidden states."""
    if not {"hidden_states", "input_ids"} <= {*arguments_of(cls)}:
        return False
    given = inspect.signature(cls.forward).parameters
    return given["input_ids"].default is inspect.Parameter.empty


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
    return (_looked_up(table, index) * scale_of(site.module)).to(site.device, site.dtype)


@torch.no_grad()
def _looked_up(table: nn.Module, index: Tensor) -> Tensor:
    """Return what an embedding gives for ids, without layers on it, by its own forward and hooks.

    A lookup in torch's embedding needs no call. Nor does one in a sharded weight.
    """
    weight: Any = stored(table, "weight")
    changed = is_watched(vars(table)) or not is_known(type(table)) or not is_plain(weight)
    if changed and not is_sharded(weight):
        made = table if SLOT not in table._modules else alone(table)
        with kept_random(), kept.putting_back(made.modules()):
            return made(index.to(computing_device(table) or weight.device)[None])[0]
    kind: Any = kind_of(table)
    return full(weight).detach()[index.to(weight.device)] * kind.scale


def scale_of(module: nn.Module) -> float:
    """Return the factor of the embeddings of token ids that a module applies by itself."""
    names = (SCALES.get(base.__name__) for base in type(module).__mro__)
    return next((float(getattr(module, name)) for name in names if name is not None), 1.0)


def numbering(module: nn.Module) -> tuple[Callable[[Tensor, int], Tensor], int] | None:
    """Return what makes position ids of token ids and the padding's id; None: nothing does.

    RoBERTa and its kin number the tokens, and not the padding, from the padding's id on.
    """
    embeddings: Any = module._modules.get("embeddings")
    pad = getattr(embeddings, "padding_idx", None)
    files = [sys.modules.get(base.__module__) for base in type(embeddings).__mro__]
    owners = (embeddings, *files)
    number = next((getattr(o, COUNT[0]) for o in owners if hasattr(o, COUNT[0])), None)
    if pad is None or number is None or "position_embeddings" not in embeddings._modules:
        return None  # ESM may turn queries and keys by position instead
    return number, int(pad)


def numbered(module: nn.Module) -> str:
    """Return the name of the child that numbers the positions of tokens, not of padding; or ""."""
    for name, child in module.named_children():
        counts = any(hasattr(child, count) for count in COUNT)
        if counts and isinstance(getattr(child, "padding_idx", None), int) and name in TABLES:
            return name
    return ""


def room(module: nn.Module) -> int | None:
    """Return the length of the shortest table of positions in a module; None if it has none.

    Those of images and sounds, which have positions of their own, do not count.
    """
    parts = dict(module.named_modules())
    beside = [name for name, part in parts.items() if name and is_beside_text(part)]
    own = is_own(module)
    tables = [
        part.num_embeddings - int(getattr(part, "offset", 0))
        for name, part in parts.items()
        if isinstance(part, nn.Embedding)
        if last(name) in TABLES or (own and HOLDS in last(name))
        if not own or _is_of_positions(module, name, "weight")
        if not any(is_inside(name, other) for other in beside)
    ]
    for name, values in module.named_parameters() if own else ():
        one = values.ndim == 2 or (values.ndim == 3 and values.size(0) == 1)
        if one and HOLDS in last(name) and _is_of_positions(module, name):
            tables.append(values.size(-2))
    return min(tables, default=None)


def _is_of_positions(module: nn.Module, name: str, key: str = "") -> bool:
    """True if a child or a parameter of somebody's own model is a table of absolute positions.

    If no trial tells, its name does.
    """
    tried = is_by_position(module, join(name, key) if key else name)
    return bool(NAMED.search(last(name))) if tried is None else tried
