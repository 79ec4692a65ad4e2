"""The backbones, and the same deltas on them by opendelta and by PEFT."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import harness
import numpy
import peft
import torch
import transformers
from torch import Tensor, nn

import opendelta

# All linear modules of a Llama block: what PEFT calls "all-linear", under the names of both.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


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
    options: argparse.Namespace,
    dtype: torch.dtype = torch.float32,
    kind: type[nn.Module] = transformers.LlamaModel,
) -> Any:
    """A Llama with random weights, by default without a head, in evaluation mode."""
    torch.manual_seed(options.seed)
    return kind(config(options, options.layers)).to(options.device, dtype).eval()


def skeleton(options: argparse.Namespace, count: int) -> nn.Module:
    """A Llama whose weights are zeros that nobody wrote, so that the system gives them no memory.

    For what hardly reads a weight: attaching, switching, loading.

    Args:
        count: of linear modules, a multiple of the 7 of a block.
    """
    layers, rest = divmod(count, len(LINEARS))
    if rest:
        raise SystemExit(f"--linears {count}: a Llama has a multiple of {len(LINEARS)}")
    with torch.device("meta"):
        model = transformers.LlamaModel(config(options, layers)).eval()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    zeros = torch.from_numpy(numpy.zeros(tensor.shape, numpy.float32))
                    real = zeros.to(options.device)
                    tensors[name] = nn.Parameter(real) if name in module._parameters else real
    return model


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
def shake(parameters: Iterable[nn.Parameter], std: float = 0.02) -> None:
    """Random values instead of a start at the identity."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std)


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


def counterparts(delta: opendelta.Delta, theirs: nn.Module) -> dict[str, nn.Parameter]:
    """{name of a delta's tensor: the same parameter of PEFT's adapter of that name}."""
    found = {}
    for full, parameter in theirs.named_parameters():
        name = full.replace(".base_layer", "")  # of an adapter inside another
        match = re.fullmatch(rf"base_model\.model\.(.+)\.(\w+)\.{delta.name}(\.weight)?", name)
        if match:
            found[f"{match[1]}.deltas.{delta.name}.{match[2]}"] = parameter
    if found.keys() != delta.state_dict().keys():
        raise RuntimeError(f"{delta.name}: PEFT's adapter has other tensors")
    return found


@torch.no_grad()
def hand_over(delta: opendelta.Delta, theirs: nn.Module) -> None:
    """Copy a delta's tensors into PEFT's adapter of the same name."""
    mine = delta.state_dict()
    for name, parameter in counterparts(delta, theirs).items():
        parameter.copy_(mine[name])


def check_equal(
    one: Tensor | None, other: Tensor | None, what: str, computed: torch.dtype = torch.float32
) -> None:
    """Raise unless two tensors agree, relative to the largest value.

    Args:
        computed: the dtype in which they were computed says how closely.
    """
    if one is None or other is None:
        raise RuntimeError(f"{what}: missing")
    largest = max(one.abs().max().item(), other.abs().max().item())
    difference = (one - other).abs().max().item()
    if not difference <= TOLERANCE[computed] * largest:
        raise RuntimeError(f"{what}: they differ by {difference:.1e} of {largest:.1e}")


def with_lora_cases(
    parsed: argparse.ArgumentParser, k: list[int], shapes: list[tuple[int, int]]
) -> argparse.ArgumentParser:
    """`parsed` with the options that `lora_cases` reads, and what they are by default."""
    parsed.add_argument("--k", type=harness.numbers, default=k, help="how many LoRAs, such as 1,8")
    help = "batch x tokens, such as 1x1,4x128"
    parsed.add_argument("--shapes", type=harness.shapes, default=shapes, help=help)
    return parsed


def lora_cases(
    options: argparse.Namespace,
) -> Iterator[tuple[int, tuple[int, int], dict[str, Any]]]:
    """For each number of LoRAs and each shape: both, and the models {"plain", "opendelta", "peft"}.

    The last two have the same LoRAs on every linear module.
    """
    plain = llama(options)
    for k in options.k:
        ours, base = twin(plain), twin(plain)
        theirs = peft_loras(base, loras(ours, k))
        for shape in options.shapes:
            yield k, shape, {"plain": plain, "opendelta": ours, "peft": theirs}
