"""A gate over LoRAs on each linear module, over plain modules and over a loop written by hand.

The loop runs one LoRA after the other and multiplies each change by its weight.

Examples:
    python benchmarks/gating.py
    python benchmarks/gating.py --experts 4 --top-k 1 --shapes 1x1,8x256
    python benchmarks/gating.py --device cuda
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import harness
import subjects
import torch
import torch.nn.functional as F
from harness import Contestant, Row
from torch import Tensor, nn

import opendelta

FORWARD = {"4x128": (1.42, 0.80), "1x1": (None, 1.00)}  # {shape: musts over plain and the loop}
TRAINING = 0.55


class Loop(nn.Module):
    """A linear module with a gate over LoRAs, as people write it."""

    def __init__(self, base: nn.Module, experts: list[Any], gate: Any) -> None:
        super().__init__()
        self.base, self.best = base, gate.top_k
        self.A = nn.ParameterList(expert.lora_A for expert in experts)
        self.B = nn.ParameterList(expert.lora_B for expert in experts)
        self.scaling = experts[0].scaling
        self.weight, self.bias = gate.weight, gate.bias

    def forward(self, x: Tensor) -> Tensor:
        out, logits = self.base(x), F.linear(x, self.weight, self.bias)
        least = logits.topk(self.best, -1).values[..., -1:]
        g = logits.masked_fill(logits < least, float("-inf")).softmax(-1)
        for i, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            out = out + g[..., i, None] * self.scaling * F.linear(F.linear(x, A), B)
        return out


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=4, rounds=15)
    parsed.add_argument("--experts", type=int, default=8, help="LoRAs of the gate")
    parsed.add_argument("--rank", type=int, default=8, help="of each of them")
    parsed.add_argument("--top-k", type=int, default=2, help="LoRAs that each token takes")
    parsed.add_argument("--shapes", type=harness.shapes, default=[(4, 128), (1, 1)], help="of x")
    return parsed


def models_of(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Plain linear modules, with a gate of ours, and with the loop; all over the same tensors."""
    torch.manual_seed(options.seed)
    width, names = options.width, [str(i) for i in range(options.layers)]
    ours = nn.Sequential(*(nn.Linear(width, width) for _ in names)).to(options.device)
    plain = opendelta.shared_copy(ours)
    experts = [
        opendelta.LoraModel(ours, modified_modules=names, lora_r=options.rank, name=f"e{i}")
        for i in range(options.experts)
    ]
    gate = opendelta.GateModel(ours, deltas=experts, top_k=options.top_k, name="gate")
    for p in (p for delta in (*experts, gate) for p in delta.parameters()):
        nn.init.normal_(p, std=0.02)
    gate.freeze_module()
    plain.requires_grad_(False)
    loop = nn.Sequential(
        *(Loop(plain[int(n)], [each.layers[n] for each in experts], gate.layers[n]) for n in names)
    )
    return {"plain": plain, "opendelta": ours, "by_hand": loop}


def measure(options: argparse.Namespace) -> list[Row]:
    """Rows for each shape: over plain modules, and over the loop."""
    models, rows = models_of(options), []
    name = f"gate, {options.experts} LoRAs"
    for shape in options.shapes:
        case, x = "x".join(map(str, shape)), torch.randn(*shape, options.width)
        x = x.to(options.device)
        subjects.check_equal(models["opendelta"](x), models["by_hand"](x), f"{name}, {case}")
        over_plain, over_loop = FORWARD.get(case, (None, None))
        both = {one: models[one] for one in ("opendelta", "by_hand")}
        with torch.no_grad():
            forward = harness.race(runs(models, output, x), options)
            beside = harness.race(runs(both, output, x), options)
        training = harness.race(runs(both, step, x), options)
        must = TRAINING if case == "4x128" else None
        rows += [
            forward.row(f"forward, {name}", case, "x plain", "plain", must=over_plain),
            beside.row(f"forward, {name}", case, "x by hand", "by_hand", must=over_loop),
            training.row(f"training step, {name}", case, "x by hand", "by_hand", must=must),
        ]
    return rows


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Run a forward."""
    return model(x)


def step(model: nn.Module, x: Tensor) -> None:
    """Run a forward and a backward."""
    output(model, x).sum().backward()


def runs(
    models: dict[str, nn.Module], run: Callable[[nn.Module, Tensor], Any], x: Tensor
) -> dict[str, Contestant]:
    """A contestant for each model."""
    return {name: Contestant(functools.partial(run, model, x)) for name, model in models.items()}


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
