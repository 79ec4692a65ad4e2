"""How often torch.compile compiles again after a change of scale, or of which deltas act.

The figures are counted, not timed: every run gives the same.

Examples:
    python benchmarks/recompiles.py
    python benchmarks/recompiles.py --layers 2
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import subjects
import torch
from harness import Row
from peft.helpers import rescale_adapter_scale
from torch._dynamo.testing import CompileCounterWithBackend

import opendelta

FACTORS = (0.5, 0.25, 2.0)
SETS: tuple[list[int], ...] = ([0, 1], [0], [1], [])  # which of two LoRAs act


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    return harness.parser(__doc__, layers=1)


class Counted:
    """A model that is compiled on its first call, and a count of what is compiled."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor) -> None:
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend("eager")
        self.model, self.x = torch.compile(model, backend=self.counter), x

    def call(self) -> int:
        """Call it: how many graphs that compiles."""
        before = self.counter.frame_count
        with torch.no_grad():
            self.model(inputs_embeds=self.x)
        return self.counter.frame_count - before


def after_scales(counted: Counted, scaled: Callable[[float], Any]) -> int:
    """How many graphs are compiled again over some changes of scale."""
    counted.call()
    recompiled = 0
    for factor in FACTORS:
        with scaled(factor):
            recompiled += counted.call()
    return recompiled


def after_sets(counted: Counted, only: Callable[[Sequence[int]], Any]) -> tuple[int, int]:
    """How many graphs are compiled over new sets of acting deltas, and over the same again."""
    counted.call()
    compiled = []
    for _ in range(2):
        compiled.append(0)
        for chosen in SETS:
            with only(chosen):
                compiled[-1] += counted.call()
    return compiled[0], compiled[1]


def our_switches(model: torch.nn.Module, deltas: Sequence[opendelta.LoraModel]) -> tuple[Any, Any]:
    """Context managers by opendelta: one scales the first delta, one lets just some act."""

    @contextlib.contextmanager
    def scaled(factor: float) -> Iterator[None]:
        deltas[0].scale = factor
        yield
        deltas[0].scale = 1

    def only(chosen: Sequence[int]) -> Any:
        return opendelta.composition(model).only(*(deltas[i] for i in chosen))

    return scaled, only


def peft_switches(model: Any, names: Sequence[str]) -> tuple[Any, Any]:
    """The same by PEFT."""

    @contextlib.contextmanager
    def only(chosen: Sequence[int]) -> Iterator[None]:
        if not chosen:
            with model.disable_adapter():
                yield
            return
        model.base_model.set_adapter([names[i] for i in chosen])
        yield
        model.base_model.set_adapter(list(names))

    return lambda factor: rescale_adapter_scale(model, factor), only


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for changes of scale, one for new sets of acting deltas, one for known sets."""
    plain = subjects.llama(options)
    ours, base = subjects.twin(plain), subjects.twin(plain)
    deltas = subjects.loras(ours, 2)
    theirs = subjects.peft_loras(base, deltas)
    x = subjects.embeddings(options, (2, 8))
    figures = []
    for model, (scaled, only) in (
        (ours, our_switches(ours, deltas)),
        (theirs, peft_switches(theirs, [delta.name for delta in deltas])),
    ):
        rescaled = after_scales(Counted(model, x), scaled)
        figures.append((rescaled, *after_sets(Counted(model, x), only)))
    new = len(SETS) - 1
    cases = (f"{len(FACTORS)} changes of scale", f"{new} new sets", f"{len(SETS)} known sets")
    return [
        Row("recompiles", case, "graphs", mine, other, must=must, exact=True)
        for case, must, mine, other in zip(cases, (0, new, 0), *figures, strict=True)
    ]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
