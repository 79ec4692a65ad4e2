"""Forward passes with k bottleneck adapters in a row after each feed-forward, over the plain ones.

PEFT has no such adapters. The floor is plain modules composed by hand, with the same weights.

Examples:
    python benchmarks/stack.py
    python benchmarks/stack.py --k 1,16 --shapes 1x1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import harness
import subjects
import torch
from harness import Contestant, Row
from torch import Tensor, nn

import opendelta

MUST = {1: 1.03, 2: 1.07, 4: 1.10, 8: 1.15}
BOTTLENECK = 48  # a sixteenth of the width


class ByHand(nn.Module):
    """A module and what comes after it, as one would write it without a library."""

    def __init__(self, inner: nn.Module, adapters: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner, self.adapters = inner, nn.ModuleList(adapters)

    def forward(self, x: Tensor) -> Tensor:
        """The adapters, one after the other, on what the module makes of x."""
        h = self.inner(x)
        for adapter in self.adapters:
            h = h + adapter(h)
        return h


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=2, rounds=11)
    parsed.add_argument("--k", type=harness.numbers, default=[1, 2, 4, 8], help="how many adapters")
    parsed.add_argument("--shapes", type=harness.shapes, default=[(8, 128)], help="batch x tokens")
    return parsed


def stacks(plain: nn.Module, k: int) -> tuple[nn.Module, nn.Module]:
    """The backbone with k adapters on each feed-forward, by opendelta and by hand."""
    ours, by_hand = subjects.twin(plain), subjects.twin(plain)
    deltas = [
        opendelta.AdapterModel(
            ours, BOTTLENECK, "relu", modified_modules=["down_proj"], name=f"adapter{i}"
        )
        for i in range(k)
    ]
    for delta in deltas:
        subjects.shake(delta.parameters())
    for index, block in enumerate(by_hand.layers):
        layers: list[Any] = [d.layers[f"layers.{index}.mlp.down_proj"] for d in deltas]
        copies = [nn.Sequential(ly.down_proj, nn.ReLU(), ly.up_proj) for ly in layers]
        block.mlp.down_proj = ByHand(block.mlp.down_proj, copies)
    return ours, by_hand


@torch.no_grad()
def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of adapters and each shape."""
    plain = subjects.llama(options)
    rows = []
    for shape in options.shapes:
        x, case = subjects.embeddings(options, shape), "x".join(map(str, shape))

        def runs(model: nn.Module, x: Tensor = x) -> Contestant:
            return Contestant(lambda: model(inputs_embeds=x))

        for k in options.k:
            ours, by_hand = stacks(plain, k)
            models = {"plain": plain, "opendelta": ours, "by_hand": by_hand}
            outputs = {name: model(inputs_embeds=x)[0] for name, model in models.items()}
            subjects.check_equal(outputs["opendelta"], outputs["by_hand"], f"{k} adapters, {case}")
            times = harness.race({name: runs(model) for name, model in models.items()}, options)
            name = f"forward, {k} adapter{'s' * (k > 1)} in a row"
            must = MUST.get(k) if case == "8x128" else None
            rows.append(times.row(name, case, "x plain", "plain", must=must))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
