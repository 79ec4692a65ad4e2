"""Merging a float32 LoRA into every linear, over adding the product in place; and back again.

By hand is what keeps the old weights too and does nothing else: the sum in new memory.

The last rows count the weights that merging and unmerging leaves changed: every run gives the same.

Examples:
    python benchmarks/merging.py
    python benchmarks/merging.py --layers 8 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import harness
import subjects
import torch
from harness import Contestant, Row
from torch import nn

import opendelta

MUST = {"float32": 1.5, "bfloat16": 3}
WHY = (
    "the old weights stay as they are, so that unmerging is exact and a shared_copy of the model "
    "does not change, and the new ones need as much memory again, whose pages the system gives and "
    "clears first unless the allocator kept them from the last round: by hand is addmm into new "
    "memory with nothing else; what comes on top sees that all values are finite, and sums the "
    "bits, by which unmerging knows that nothing changed since"
)


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=4, rounds=9)
    parsed.add_argument(
        "--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"],
        help="of the backbone",
    )  # fmt: skip
    return parsed


def factors(
    model: nn.Module, delta: opendelta.Delta
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """W, B and A of each linear module, in the dtype of W."""
    for name, module in subjects.linears(model).items():
        layer: Any = delta.layers[name]
        yield module.weight, *(t.type_as(module.weight) for t in (layer.lora_B, layer.lora_A))


@torch.no_grad()
def add_in_place(model: nn.Module, delta: opendelta.Delta, sign: int) -> None:
    """The bare operation: W += s B A, or -= ."""
    for W, B, A in factors(model, delta):
        W.addmm_(B, A, alpha=sign * subjects.ALPHA / subjects.RANK)


@torch.no_grad()
def add_beside(model: nn.Module, delta: opendelta.Delta) -> list[torch.Tensor]:
    """The bare operation where the old weights stay: W + s B A in new memory."""
    scale = subjects.ALPHA / subjects.RANK
    return [torch.addmm(W, B, A, alpha=scale) for W, B, A in factors(model, delta)]


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
    (delta,) = subjects.loras(ours, 1)
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
    kept: list[torch.Tensor] = []
    contestants = {
        "addmm": Contestant(
            lambda: add_in_place(plain, delta, 1), after=lambda: add_in_place(plain, delta, -1)
        ),
        "opendelta": Contestant(composed.merge, after=composed.unmerge),
        "peft": Contestant(theirs.merge_adapter, after=theirs.unmerge_adapter),
        "by_hand": Contestant(lambda: kept.extend(add_beside(plain, delta)), after=kept.clear),
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
