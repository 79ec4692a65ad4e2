"""Forward passes with LoRAs on every linear, over those of the plain backbone.

Examples:
    python benchmarks/forward.py
    python benchmarks/forward.py --layers 3 --k 8
    python benchmarks/forward.py --k 1,2,4 --shapes 1x1,8x256 --rounds 31
    python benchmarks/forward.py --device cuda --json forward.json
"""

from __future__ import annotations

import argparse

import harness
import subjects
import torch
from harness import Contestant, Row

import opendelta

MUST = {(1, "4x128"): 1.07, (1, "1x1"): 1.08, (8, "4x128"): 1.15, (8, "1x1"): 1.25}
MUST_FROZEN = {(8, "1x1"): 1.20}
WHY = (
    "for one token a linear module is as fast as its weight is read; eight LoRAs of rank 8 are 13% "
    "more to read at this width, and putting them side by side (torch.cat) reads and writes them "
    "once more for every token. frozen() keeps them side by side; outside of it nothing tells when "
    "their values change"
)


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=3, rounds=15)
    return subjects.with_lora_cases(parsed, k=[1, 8], shapes=[(4, 128), (1, 1)])


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of LoRAs and each shape."""
    cases = subjects.lora_cases(options)
    return [row for case in cases for row in compare(options, *case)]


@torch.no_grad()
def compare(
    options: argparse.Namespace, k: int, shape: tuple[int, int], models: dict[str, torch.nn.Module]
) -> list[Row]:
    """The rows of k LoRAs at one shape."""
    x = subjects.embeddings(options, shape)
    outputs = {name: model(inputs_embeds=x)[0] for name, model in models.items()}
    subjects.check_equal(outputs["opendelta"], outputs["peft"], f"{k} LoRAs, {shape}")

    def runs(name: str) -> Contestant:
        return Contestant(lambda: models[name](inputs_embeds=x))

    case = "x".join(map(str, shape))
    name = "forward, 1 LoRA" if k == 1 else f"forward, {k} LoRAs"
    times = harness.race({name: runs(name) for name in models}, options)
    must = MUST.get((k, case))
    why = WHY if k > 1 and shape == (1, 1) else None
    rows = [times.row(name, case, "x plain", "plain", must=must, why=why)]
    if k > 1:  # frozen() keeps what joins neighbours
        with opendelta.composition(models["opendelta"]).frozen():
            times = harness.race({name: runs(name) for name in models}, options)
        must = MUST_FROZEN.get((k, case))
        rows.append(times.row(f"{name}, frozen()", case, "x plain", "plain", must=must))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
