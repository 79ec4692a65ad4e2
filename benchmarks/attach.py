"""Putting one LoRA on every linear of a backbone: milliseconds a module.

The last row puts it on the shapes of a Llama of 70 billion parameters, on the meta device.

Examples:
    python benchmarks/attach.py
    python benchmarks/attach.py --linears 672 --rounds 3
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import harness
import peft
import subjects
import torch
import transformers
from harness import Contestant, Row
from torch import nn

import opendelta

MUST, MUST_LARGE = 0.15, 100  # ms a module; ms
LARGE: dict[str, Any] = {  # the sizes of Llama 2 70B
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 32000,
}


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    return harness.parser(__doc__, linears=[168, 1400], rounds=7)


def contestants(backbone: nn.Module) -> dict[str, Contestant]:
    """Both libraries, each on a fresh copy of the modules."""
    fresh: dict[str, Any] = {}

    def before() -> None:
        fresh["model"] = subjects.twin(backbone)

    def ours() -> None:
        opendelta.LoraModel(
            fresh["model"], subjects.RANK, subjects.ALPHA, modified_modules=subjects.LINEARS
        ).freeze_module()

    def theirs() -> None:
        peft.get_peft_model(fresh["model"], subjects.peft_config())

    return {
        "opendelta": Contestant(ours, before, fresh.clear),
        "peft": Contestant(theirs, before, fresh.clear),
    }


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of modules, one for how they grow, one for a large model."""
    rows = []
    for count in options.linears:
        backbone = subjects.skeleton(options, count)
        times = harness.race(contestants(backbone), options, on_device=False)
        case, per = f"{count:,} linears", count / 1000
        rows.append(times.row("attach", case, "ms a linear", per=per, must=MUST))
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        case = f"{last.case.split()[0]} over {first.case.split()[0]} linears"
        growth = last.opendelta / first.opendelta
        theirs = (last.peft or math.nan) / (first.peft or math.nan)
        rows.append(Row("attach, time a linear", case, "x (1: linear)", growth, theirs))
    return [*rows, attach_large(options)]


def attach_large(options: argparse.Namespace) -> Row:
    """The row of the large model."""
    layers = 2 if options.quick else LARGE["num_hidden_layers"]
    with torch.device("meta"):
        config = transformers.LlamaConfig(**{**LARGE, "num_hidden_layers": layers})
        backbone = transformers.LlamaModel(config)
    times = harness.race(contestants(backbone), options, on_device=False)
    case = f"{7 * layers} linears on meta"
    return times.row("attach, shapes of 70B", case, "ms", per=1e-3, must=MUST_LARGE)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
