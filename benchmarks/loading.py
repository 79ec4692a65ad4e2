"""Loading a new LoRA from its folder onto a backbone that carries 8 already: milliseconds.

"By hand" is what safetensors takes to read the file's tensors and do nothing with them.

Examples:
    python benchmarks/loading.py
    python benchmarks/loading.py --linears 168 --beside 0
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import harness
import peft
import safetensors.torch
import subjects
from harness import Contestant, Row
from torch import nn

import opendelta

MUST = {168: 40, 672: 160}  # ms


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, linears=[168, 672], rounds=5)
    parsed.add_argument("--beside", type=int, default=8, help="how many are there already")
    return parsed


def write(backbone: nn.Module, ours: Path, theirs: Path) -> None:
    """The same LoRA in both libraries' folders."""
    (delta,) = subjects.loras(subjects.twin(backbone), 1)
    delta.save_finetuned(ours)
    subjects.peft_loras(subjects.twin(backbone), [delta]).save_pretrained(
        str(theirs), selected_adapters=[delta.name]
    )


def compare(options: argparse.Namespace, count: int, folder: Path) -> Row:
    """The row of so many modules."""
    backbone = subjects.skeleton(options, count)
    mine, others = folder / "opendelta", folder / "peft"
    write(backbone, mine, others)
    ours, base = subjects.twin(backbone), subjects.twin(backbone)
    if options.beside:
        theirs: Any = subjects.peft_loras(base, subjects.loras(ours, options.beside))
    else:
        theirs = peft.get_peft_model(base, subjects.peft_config())
    (weights,) = mine.glob("*.safetensors")

    def unload() -> None:
        opendelta.composition(ours)[opendelta.composition(ours).names[-1]].detach()

    contestants = {
        "opendelta": Contestant(lambda: opendelta.load(mine, ours), after=unload),
        "peft": Contestant(
            lambda: theirs.load_adapter(str(others / "lora0"), "new"),
            after=lambda: theirs.delete_adapter("new"),
        ),
        "by_hand": Contestant(lambda: safetensors.torch.load_file(weights)),
    }
    times = harness.race(contestants, options, on_device=False)
    name = f"load beside {options.beside}"
    must = MUST.get(count) if options.beside == 8 else None
    return times.row(name, f"{count:,} linears", "ms", per=1e-3, must=must)


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of modules."""
    rows = []
    for count in options.linears:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(options, count, Path(folder)))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
