"""Find the modules of a backbone that embed tokens, and those that run blocks on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._modules.calls import has_forward
from .._texts.arguments import arguments
from ..names import is_inside, parent

TAKES = {"input_ids", "inputs_embeds", "attention_mask"}


def embedders(modules: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Return {full name of a module that embeds tokens: true for an encoder-decoder's decoder}.

    If modules inside each other take token ids, the innermost one that holds blocks embeds them.
    """
    takes = [name for name, module in modules.items() if set(arguments(module)) >= TAKES]
    holds = {n for n in takes if _block_lists(modules, n)}
    takes = [n for n in takes if n in holds or not any(is_inside(n, o) for o in takes)]
    inner = [n for n in takes if not any(is_inside(o, n) for o in takes)]
    decoders = in_decoders(modules)
    return {name: id(modules[name]) in decoders for name in inner}


def in_decoders(modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the ids of the decoders of encoder-decoders, and of all modules inside them."""
    decoders = set()
    for module in modules.values():
        two = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        if two and hasattr(module, "get_decoder"):
            decoder: Any = module.get_decoder()  # type: ignore[operator]
            if decoder is not module:  # an encoder by itself returns itself
                decoders |= {id(part) for part in decoder.modules()}
    return decoders


def block_holder(modules: Mapping[str, nn.Module], embedder: str) -> str:
    """Return the full name of the module inside `embedder` that runs all blocks, or that itself."""
    holders = {parent(name) for name in _block_lists(modules, embedder)}
    outer = [n for n in holders if not any(is_inside(n, o) for o in holders)]
    return outer[0] if len(outer) == 1 and has_forward(modules[outer[0]]) else embedder


def _block_lists(modules: Mapping[str, nn.Module], embedder: str) -> list[str]:
    """Return the full names of the lists of modules inside `embedder` that are no tables."""
    return [
        name for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and is_inside(name, embedder)
        and any(not isinstance(part, nn.Embedding) for part in module)
    ]  # fmt: skip
