"""Saving a LoRA on every linear into a folder, over safetensors writing its tensors alone.

It is processor time: what the disk takes meanwhile is not in it.

Examples:
    python benchmarks/saving.py
    python benchmarks/saving.py --linears 672
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import harness
import safetensors.torch
import subjects
from harness import Contestant, Row

MUST = 2
WHY = (
    "the sha256 of the file takes two thirds as long as writing it, which is left to safetensors, "
    "and the rest sees that all values are finite, takes the backbone's fingerprint and writes the "
    "JSON"
)


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    return harness.parser(__doc__, linears=[168], rounds=11)


def measure(options: argparse.Namespace) -> list[Row]:
    """The one row."""
    count = options.linears[0]
    backbone = subjects.skeleton(options, count)
    (delta,) = subjects.loras(subjects.twin(backbone), 1)
    theirs = subjects.peft_loras(subjects.twin(backbone), [delta])
    tensors = {name: tensor.detach().cpu() for name, tensor in delta.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        mine, others, file = Path(folder, "mine"), Path(folder, "theirs"), Path(folder, "file")
        contestants = {
            "save_file": Contestant(lambda: safetensors.torch.save_file(tensors, file)),
            "opendelta": Contestant(lambda: delta.save_finetuned(mine)),
            "peft": Contestant(lambda: theirs.save_pretrained(str(others))),
        }
        times = harness.race(contestants, options, on_device=False)
    case = f"{count:,} linears"
    return [times.row("save", case, "x save_file", "save_file", must=MUST, why=WHY)]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
