"""What autograd keeps for the backward pass of a training step, over full fine-tuning.

Bytes are counted once for each storage, without the parameters, which are there anyway. The figures
are counted, not timed: every run gives the same.

Examples:
    python benchmarks/saved_bytes.py
    python benchmarks/saved_bytes.py --layers 12 --width 512
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import harness
import subjects
import torch
import transformers
from harness import Row
from torch import Tensor, nn

CASES: list[tuple[str, int, dict[str, Any], str, float]] = [
    ("LoRA", 1, {}, "float32", 0.88),
    ("LoRA, dropout 0.1", 1, {"lora_dropout": 0.1}, "float32", 1.0),
    ("4 LoRAs, dropout 0.1", 4, {"lora_dropout": 0.1}, "float32", 1.1),
    ("float32 LoRA, bfloat16 backbone", 1, {}, "bfloat16", 0.90),
    ("DoRA", 1, {"use_dora": True}, "float32", 1.2),
]


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=4)
    parsed.add_argument("--shape", type=harness.shapes, default=[(4, 128)], help="batch x tokens")
    return parsed


def saved(model: nn.Module, ids: Tensor) -> int:
    """Bytes that autograd keeps after one forward with a loss, but for parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each case."""
    ids = torch.randint(1000, options.shape[0], device=options.device)
    case = "x".join(map(str, options.shape[0]))
    asked = (options.layers, options.width, case) == (4, 768, "4x128")  # the musts depend on sizes
    rows = []
    for name, k, lora, dtype, must in CASES:
        kind = getattr(torch, dtype)
        full = subjects.llama(options, kind, transformers.LlamaForCausalLM).train()
        whole = saved(full, ids)
        ours, base = subjects.twin(full), subjects.twin(full)
        deltas = subjects.loras(ours, k, **lora)
        theirs = subjects.peft_loras(base, deltas, **lora)
        one, two = (model.eval()(ids).logits for model in (ours, theirs))
        subjects.check_equal(one, two, name, kind)
        mine, other = (saved(model.train(), ids) / whole for model in (ours, theirs))
        row = Row(f"saved bytes, {name}", case, "x full", mine, other, must=must, exact=True)
        rows.append(row if asked else dataclasses.replace(row, must=None))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
