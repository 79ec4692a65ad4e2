"""Training steps with LoRAs on every linear, over the floor: forward and gradients of activations.

The floor is the frozen backbone whose input asks for its gradient. All contestants take the same
input, so that what comes on top is the LoRAs' alone. The optimizer's step is left out: it is the
same for both libraries.

Examples:
    python benchmarks/training.py
    python benchmarks/training.py --k 4 --dtypes float32 --shapes 2x64
    python benchmarks/training.py --device cuda --dtypes bfloat16
"""

from __future__ import annotations

import argparse

import harness
import subjects
import torch
import transformers
from harness import Contestant, Row
from torch import Tensor, nn

MUST = {(1, "float32"): 1.10, (4, "float32"): 1.15, (8, "float32"): 1.30, (1, "bfloat16"): 1.18}


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=2, rounds=9)
    parsed.add_argument("--k", type=harness.numbers, default=[1, 4, 8], help="how many LoRAs")
    parsed.add_argument(
        "--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"],
        help="of the backbone; the LoRAs are float32. Of bfloat16, 1 LoRA is measured",
    )  # fmt: skip
    parsed.add_argument("--shapes", type=harness.shapes, default=[(4, 128)], help="batch x tokens")
    return parsed


def step(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward, into fresh gradients; the loss."""
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None
    loss = model(inputs_embeds=x, labels=labels).loss
    loss.backward()
    return loss


def compare(options: argparse.Namespace, k: int, dtype: str, shape: tuple[int, int]) -> Row:
    """The row of k LoRAs on a backbone of this dtype."""
    kind, case = getattr(torch, dtype), "x".join(map(str, shape))
    plain = subjects.llama(options, kind, transformers.LlamaForCausalLM).requires_grad_(False)
    ours, base = subjects.twin(plain), subjects.twin(plain)
    deltas = subjects.loras(ours, k)
    theirs = subjects.peft_loras(base, deltas)
    models = {"floor": plain.train(), "opendelta": ours.train(), "peft": theirs.train()}
    x = subjects.embeddings(options, shape, kind).requires_grad_()
    labels = torch.randint(1000, shape, device=options.device)
    losses = {name: step(model, x, labels) for name, model in models.items()}
    subjects.check_equal(losses["opendelta"], losses["peft"], f"{k} LoRAs, {dtype}: the loss", kind)
    for delta in deltas:
        gradients = {name: p.grad for name, p in delta.named_parameters()}
        for name, other in subjects.counterparts(delta, theirs).items():
            what = f"{k} LoRAs, {dtype}: the gradient of {name}"
            subjects.check_equal(gradients[name], other.grad, what, kind)

    def runs(model: nn.Module) -> Contestant:
        return Contestant(lambda: step(model, x, labels))

    times = harness.race({name: runs(model) for name, model in models.items()}, options)
    name = f"training step, {k} LoRA{'s' * (k > 1)}"
    name += "" if dtype == "float32" else f", {dtype} backbone"
    must = MUST.get((k, dtype)) if case == "4x128" else None
    return times.row(name, case, "x floor", "floor", must=must)


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of LoRAs, dtype and shape."""
    return [
        compare(options, k, dtype, shape)
        for shape in options.shapes
        for dtype in options.dtypes
        for k in (options.k if dtype == "float32" else [1])
    ]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
