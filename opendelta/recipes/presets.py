"""Combinations of deltas that have a name in a paper, as plain functions over the methods."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import AddressError
from ..methods.adapter import AdapterModel
from ..methods.lora import LoraModel
from ..methods.parallel_adapter import ParallelAdapterModel
from ..methods.prefix import PrefixModel


def mam(
    model: nn.Module,
    prefix_token_num: int = 30,
    bottleneck_dim: int = 512,
    scaled: float = 4.0,
    **options: Any,
) -> tuple[PrefixModel, ParallelAdapterModel]:
    """Mix-and-match: a prefix in attention, a scaled parallel adapter around the feed-forward.

    arXiv:2110.04366. The defaults are the paper's.

    Args:
        prefix_token_num: keys and values of the prefix.
        bottleneck_dim: width of the adapter's hidden layer.
        scaled: factor of the adapter's output.
        options: further options of both deltas, such as `dtype`.
    """
    prefix = PrefixModel(model, prefix_token_num=prefix_token_num, **options)
    try:
        adapter = ParallelAdapterModel(
            model,
            modified_modules=["ff.w1", "ff.w2"],
            common_structure=True,
            bottleneck_dim=bottleneck_dim,
            scaled=scaled,
            non_linearity="relu",
            **options,
        )
    except BaseException:
        prefix.detach()
        raise
    return prefix, adapter


def unipelt(
    model: nn.Module,
    lora_r: int = 8,
    prefix_token_num: int = 10,
    bottleneck_dim: int = 48,
    **options: Any,
) -> tuple[LoraModel, PrefixModel, AdapterModel]:
    """UniPELT: LoRA, a prefix, and adapters after the feed-forward, each behind a learned gate.

    arXiv:2110.07577. The defaults are the paper's. The paper averages a gate over the sequence;
    here each position has its own gate, see `DeltaConfig.gate`.

    Args:
        lora_r: rank of LoRA.
        prefix_token_num: keys and values of the prefix.
        bottleneck_dim: width of the adapter's hidden layer.
        options: further options of all three deltas, such as `dtype`.
    """
    made: list[Any] = []
    try:
        made.append(LoraModel(model, lora_r=lora_r, gate=True, **options))
        made.append(PrefixModel(model, prefix_token_num=prefix_token_num, gate=True, **options))
        adapter = AdapterModel(
            model,
            modified_modules=["ff.w2"],
            common_structure=True,
            bottleneck_dim=bottleneck_dim,
            gate=True,
            **options,
        )
    except BaseException:
        for delta in made:
            delta.detach()
        raise
    return made[0], made[1], adapter


def adapter_drop(model: nn.Module, layers: Collection[int], **options: Any) -> AdapterModel:
    """AdapterDrop: adapters in all blocks but some, usually the lowest. arXiv:2010.11918.

    Args:
        layers: the numbers of the blocks without adapters, in each stack of blocks.
        options: options of `AdapterModel`.

    Raises:
        AddressError: no block has such a number, or no block with an adapter is left.
    """
    whole = AdapterModel(model, **options)
    whole.detach()
    numbers = {name: _block(name) for name in whole.modified_modules}
    unknown = sorted(set(layers) - set(numbers.values()))
    if unknown or not layers:
        raise AddressError(
            f"adapter_drop(layers={list(layers)}): the adapters of {type(model).__name__} are in "
            f"blocks {sorted({n for n in numbers.values() if n is not None})}"
        )
    kept = [name for name, number in numbers.items() if number not in layers]
    if not kept:
        raise AddressError(f"adapter_drop(layers={list(layers)}) leaves no block with an adapter")
    given = {"modified_modules", "exclude_modules", "common_structure"}
    others = {name: value for name, value in options.items() if name not in given}
    del whole
    return AdapterModel(model, modified_modules=kept, **others)


def _block(name: str) -> int | None:
    """Return the number of the block around a module: the first number in the module's name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None
