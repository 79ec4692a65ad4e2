"""Importing the library in a fresh process: seconds on top of importing torch.

Examples:
    python benchmarks/import_time.py
    python benchmarks/import_time.py --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import harness
from harness import Row

MUST = 0.3  # seconds
SCRIPT = """
import sys, time, torch
start = time.process_time()
import {library}
print(time.process_time() - start, int("transformers" in sys.modules))
"""


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    return harness.parser(__doc__, rounds=5)


def import_it(library: str) -> tuple[float, int]:
    """Processor seconds of the import, and whether it brought transformers along."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(library=library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(printed[-2]), int(printed[-1])


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for the time, one for transformers."""
    libraries = ("opendelta", "peft")
    for _ in range(0 if options.quick else options.warm_up):
        for library in libraries:
            import_it(library)
    found: dict[str, list[tuple[float, int]]] = {library: [] for library in libraries}
    for _ in range(1 if options.quick else options.rounds):
        for library in libraries:
            found[library].append(import_it(library))
    seconds = [statistics.median(s for s, _ in found[library]) for library in libraries]
    brought = [found[library][0][1] for library in libraries]
    return [
        Row("import", "on top of torch", "s", seconds[0], seconds[1], must=MUST),
        Row("import", "transformers along", "modules", brought[0], brought[1], must=0, exact=True),
    ]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
