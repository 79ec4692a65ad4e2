"""Forward passes of a batch whose rows take different LoRAs, over those of the plain backbone.

Each row names one LoRA, in turn. Setting the rows up is timed too, as each batch has its own; not
so for frozen(), which is for many forwards of the same rows.

Examples:
    python benchmarks/routing.py
    python benchmarks/routing.py --k 4 --shapes 16x1,64x1
    python benchmarks/routing.py --device cuda
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import subjects
import torch
from harness import Contestant, Row

import opendelta

MUST = {(16, "16x1"): 1.45, (16, "16x16"): 1.08}


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=3, rounds=15)
    return subjects.with_lora_cases(parsed, k=[16], shapes=[(16, 1), (16, 16)])


@torch.no_grad()
def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of LoRAs and each shape."""
    cases = subjects.lora_cases(options)
    return [row for case in cases for row in compare(options, *case)]


def compare(
    options: argparse.Namespace, k: int, shape: tuple[int, int], models: dict[str, Any]
) -> list[Row]:
    """The rows of k LoRAs at one shape."""
    plain, ours, theirs = (models[name] for name in ("plain", "opendelta", "peft"))
    x, case = subjects.embeddings(options, shape), "x".join(map(str, shape))
    names = [subjects.names(k)[row % k] for row in range(shape[0])]

    def routed() -> Any:
        with opendelta.route(ours, names):
            return ours(inputs_embeds=x)[0]

    def by_peft() -> Any:
        return theirs(inputs_embeds=x, adapter_names=names)[0]

    subjects.check_equal(routed(), by_peft(), f"rows over {k} LoRAs, {case}")
    runs = {"plain": lambda: plain(inputs_embeds=x), "opendelta": routed, "peft": by_peft}
    contestants = {name: Contestant(run) for name, run in runs.items()}
    name, must = f"forward, rows over {k} LoRAs", MUST.get((k, case))
    times = harness.race(contestants, options)
    found = [times.row(name, case, "x plain", "plain", must=must)]
    with opendelta.route(ours, names), opendelta.composition(ours).frozen():
        # a route that stays, as it does for all tokens of one generate()
        contestants["opendelta"] = Contestant(lambda: ours(inputs_embeds=x))
        times = harness.race(contestants, options)
    return [*found, times.row(f"{name}, frozen()", case, "x plain", "plain")]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
