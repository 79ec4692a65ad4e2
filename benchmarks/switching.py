"""Switching between two LoRAs that are on every linear, and switching them off: milliseconds.

Examples:
    python benchmarks/switching.py
    python benchmarks/switching.py --linears 168
"""

from __future__ import annotations

import argparse

import harness
import subjects
from harness import Contestant, Row

import opendelta

MUST = 1  # ms


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    return harness.parser(__doc__, linears=[672], rounds=7)


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for the switch to another delta, and one for none at all; each there and back."""
    count = options.linears[0]
    backbone = subjects.skeleton(options, count)
    ours, base = subjects.twin(backbone), subjects.twin(backbone)
    first, second = subjects.loras(ours, 2)
    theirs = subjects.peft_loras(base, [first, second])
    theirs.set_adapter(first.name)
    second.disable()

    def our_switch() -> None:
        first.disable()
        second.enable()
        second.disable()
        first.enable()

    def our_only() -> None:
        with opendelta.composition(ours).only(second):
            pass

    def our_disable() -> None:
        with opendelta.composition(ours).only():
            pass

    def their_switch() -> None:
        theirs.set_adapter(second.name)
        theirs.set_adapter(first.name)

    def their_disable() -> None:
        with theirs.disable_adapter():
            pass

    case = f"{count:,} linears"
    pairs = {
        "switch, enable() and disable()": (our_switch, their_switch),
        "switch, only()": (our_only, their_switch),
        "switch all off, only()": (our_disable, their_disable),
    }
    rows = []
    for name, (mine, other) in pairs.items():
        both = {"opendelta": Contestant(mine), "peft": Contestant(other)}
        times = harness.race(both, options, on_device=False)
        rows.append(times.row(name, f"{case}, there and back", "ms", per=1e-3, must=MUST))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
