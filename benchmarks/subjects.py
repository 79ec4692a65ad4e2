"""The backbones, and the same deltas on them by opendelta and by PEFT."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import opendelta

# All linear modules of a Llama block: what PEFT calls "all-linear", under the names of both.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


# ---------------------------------------------------------------------------------------- backbones
def config(options: argparse.Namespace, layers: int) -> transformers.LlamaConfig:
    """A small Llama of the width that the options ask for."""
    return transformers.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        num_hidden_layers=layers,
        vocab_size=1000,
        use_cache=False,
    )


def llama(
    options: argparse.Namespace, layers: int | None = None, dtype: torch.dtype = torch.float32
) -> transformers.LlamaModel:
    """A Llama without a head, with random weights, in evaluation mode."""
    torch.manual_seed(options.seed)
    model = transformers.LlamaModel(config(options, layers or options.layers))
    return model.to(options.device, dtype).eval()


def skeleton(options: argparse.Namespace, layers: int, device: str | None = None) -> nn.Module:
    """A Llama whose weights were never written, so that the system gives them no memory.

    For what reads no weights: attaching, switching, loading.
    """
    with torch.device("meta"):
        model = transformers.LlamaModel(config(options, layers))
    device = device or options.device
    return model if device == "meta" else model.to_empty(device=device).eval()


def twin(model: nn.Module) -> Any:
    """A copy of the modules over the same parameters, so that contestants read the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def embeddings(options: argparse.Namespace, shape: tuple[int, int], dtype: Any = None) -> Tensor:
    """Random hidden states [batch, tokens, width] to start from."""
    made = torch.randn(*shape, options.width, generator=torch.Generator().manual_seed(1))
    return made.to(options.device, dtype)


# ------------------------------------------------------------------------------------------- deltas
def shake(parameters: Iterable[nn.Parameter]) -> None:
    """Random values instead of a start at the identity."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def names(k: int) -> list[str]:
    """The names of k deltas."""
    return [f"lora{i}" for i in range(k)]


def loras(model: nn.Module, k: int, **options: Any) -> list[opendelta.LoraModel]:
    """k LoRAs on every linear, with random values, the backbone frozen."""
    made = [
        opendelta.LoraModel(model, RANK, ALPHA, modified_modules=LINEARS, name=name, **options)
        for name in names(k)
    ]
    for delta in made:
        shake(p for n, p in delta.named_parameters() if "magnitude" not in n)
    made[0].freeze_module()
    return made


def peft_config(**options: Any) -> peft.LoraConfig:
    """The same LoRA in PEFT's terms."""
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, **options)


def peft_loras(
    model: nn.Module, deltas: Sequence[opendelta.Delta], **options: Any
) -> peft.PeftModel:
    """The LoRAs `deltas` once more, on `model`, by PEFT; all of them active."""
    first, *others = [delta.name for delta in deltas]
    theirs = peft.get_peft_model(model, peft_config(**options), adapter_name=first)
    for name in others:
        theirs.add_adapter(name, peft_config(**options))
    if others:
        both: Any = theirs.base_model  # which takes several names, as PEFT's documents say
        both.set_adapter([first, *others])
    for delta in deltas:
        hand_over(delta, theirs)
    return theirs.train(model.training)


@torch.no_grad()
def hand_over(delta: opendelta.Delta, theirs: nn.Module) -> None:
    """Copy a delta's tensors into PEFT's adapter of the same name."""
    mine = delta.state_dict()
    copied = 0
    for name, parameter in theirs.named_parameters():
        found = re.fullmatch(rf"base_model\.model\.(.+)\.(\w+)\.{delta.name}(\.weight)?", name)
        if found:
            parameter.copy_(mine[f"{found[1]}.deltas.{delta.name}.{found[2]}"])
            copied += 1
    if copied != len(mine):
        raise RuntimeError(f"{delta.name}: {copied} of {len(mine)} tensors found in PEFT's model")


def check_equal(one: Tensor, other: Tensor, what: str) -> None:
    """Raise unless two outputs agree, as far as their dtype lets them."""
    difference = (one - other).abs().max().item()
    if not difference <= TOLERANCE[one.dtype] * max(1.0, one.abs().max().item()):
        raise RuntimeError(f"{what}: opendelta and PEFT differ by {difference:.1e}")
