"""Merging a float32 LoRA into every linear, over adding the product in place; and back again.

The last rows count the weights that merging and unmerging leaves changed: every run gives the same.

Examples:
    python benchmarks/merging.py
    python benchmarks/merging.py --layers 8 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import copy

import harness
import subjects
import torch
from harness import Contestant, Row
from torch import nn

import opendelta

MUST = {"float32": 1.5, "bfloat16": 3}
WHY = (
    "the old weights are kept, so that unmerging is exact, and the new ones need as much memory "
    "again: adding into memory that the process has takes 1.2 times addmm_, into pages that the "
    "system gives and clears first over 4 times, and which it is depends on what the allocator "
    "kept from the last round; the rest sees that all values are finite and sums the bits, by "
    "which unmerging knows that nothing changed since"
)


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=4, rounds=9)
    parsed.add_argument(
        "--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"],
        help="of the backbone",
    )  # fmt: skip
    return parsed


@torch.no_grad()
def add_in_place(model: nn.Module, delta: opendelta.Delta, sign: int) -> None:
    """The bare operation: W += s B A, or -= ."""
    scale = sign * subjects.ALPHA / subjects.RANK
    for name, module in subjects.linears(model).items():
        A, B = (getattr(delta.layers[name], t).type_as(module.weight) for t in ("lora_A", "lora_B"))
        module.weight.addmm_(B, A, alpha=scale)


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> float:
    """The share of the linear modules' weights that differ from those before, in percent."""
    now = {name.replace(".base_layer", ""): m.weight for name, m in subjects.linears(model).items()}
    now = {name.removeprefix("base_model.model."): weight for name, weight in now.items()}
    different = sum(int((bits(now[name]) != bits(old)).sum()) for name, old in before.items())
    return 100 * different / sum(weight.numel() for weight in before.values())


def bits(weight: torch.Tensor) -> torch.Tensor:
    """The bits of each value, as a whole number."""
    return weight.detach().view({2: torch.int16, 4: torch.int32}[weight.element_size()])


def compare(options: argparse.Namespace, dtype: str) -> list[Row]:
    """The rows of a backbone of this dtype."""
    kind = getattr(torch, dtype)
    plain = subjects.llama(options, kind)
    before = {name: m.weight.detach().clone() for name, m in subjects.linears(plain).items()}
    ours, base = copy.deepcopy(plain), copy.deepcopy(plain)
    (delta,) = subjects.loras(ours, 1, dtype="float32")
    theirs = subjects.peft_loras(base, [delta])
    composed = opendelta.composition(ours)
    composed.merge()
    theirs.merge_adapter()
    x = subjects.embeddings(options, (2, 16), kind)
    with torch.no_grad():
        one, two = (model(inputs_embeds=x)[0] for model in (ours, theirs))
    subjects.check_equal(one, two, f"merged, {dtype}", kind)
    composed.unmerge()
    theirs.unmerge_adapter()
    mine, other = changed(ours, before), changed(theirs, before)
    contestants = {
        "addmm": Contestant(
            lambda: add_in_place(plain, delta, 1), after=lambda: add_in_place(plain, delta, -1)
        ),
        "opendelta": Contestant(composed.merge, after=composed.unmerge),
        "peft": Contestant(theirs.merge_adapter, after=theirs.unmerge_adapter),
    }
    times = harness.race(contestants, options)
    linears = f"{len(before)} linears, {dtype}"
    exact = Row(
        "merge, then unmerge", linears, "% of weights changed", mine, other, must=0, exact=True
    )
    row = times.row("merge", linears, "x addmm_", "addmm", must=MUST.get(dtype), why=WHY)
    return [row, exact]


def measure(options: argparse.Namespace) -> list[Row]:
    """Two rows for each dtype."""
    rows = [row for dtype in options.dtypes for row in compare(options, dtype)]
    return sorted(rows, key=lambda row: row.exact)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
