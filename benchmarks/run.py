"""Run all benchmarks, each in a process of its own, and write RESULTS.md and results.json.

The chart (results.svg) and the section of README.md come from the same figures.

Examples:
    make bench
    python benchmarks/run.py --only forward,merging    # the other figures stay
    python benchmarks/run.py --quick --out my-results
    python benchmarks/run.py --write                   # from results.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import report

SCRIPTS = (
    "attach", "forward", "routing", "mixed", "stack", "training", "gating", "saved_bytes",
    "switching", "loading", "saving", "merging", "recompiles", "import_time",
)  # fmt: skip
README = report.ROOT / "README.md"


def parser() -> argparse.ArgumentParser:
    """The options."""
    parsed = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="NAMES",
        help=f"some of {','.join(SCRIPTS)}",
    )
    parsed.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parsed.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parsed.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write there and leave README.md alone"
    )
    parsed.add_argument(
        "--write", action="store_true", help="measure nothing; write the pages anew"
    )
    return parsed


def measure(options: argparse.Namespace, known: dict[str, Any]) -> list[str]:
    """Run the scripts and put what they find into `known`, by name; those that failed."""
    flags = ["--device=cuda"] if options.device == "cuda" else []
    flags += ["--quick"] if options.quick else []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for script in options.only or SCRIPTS:
            file = Path(folder, f"{script}.json")
            command = [sys.executable, "-W", "ignore", str(report.HERE / f"{script}.py"), *flags]
            if subprocess.run([*command, "--json", str(file)]).returncode:
                failed.append(script)
            else:
                known[script] = json.loads(file.read_text(encoding="utf-8"))
    return failed


def results_of(options: argparse.Namespace, given: list[str], file: Path) -> list[str]:
    """Measure and write results.json; the scripts that failed, whose old figures stay."""
    start, machine = time.perf_counter(), harness.facts(options.device)
    old = json.loads(file.read_text(encoding="utf-8"))["benchmarks"] if file.exists() else []
    known = {found["benchmark"]: found for found in old}
    failed = measure(options, known)
    results = {
        "command": shlex.join(["python", "benchmarks/run.py", *given]) if given else "make bench",
        "machine": machine,
        "seconds": round(time.perf_counter() - start),
        "benchmarks": [known[script] for script in SCRIPTS if script in known],
    }
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return failed


def write(results: dict[str, Any], folder: Path) -> None:
    """RESULTS.md and the chart."""
    (folder / "RESULTS.md").write_text(report.results_page(results), encoding="utf-8")
    report.chart(report.rows_of(results), folder / "results.svg")


def main(arguments: list[str] | None = None) -> None:
    """Run it."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    unknown = set(options.only or ()) - set(SCRIPTS)
    if unknown:
        parser().error(f"--only {','.join(sorted(unknown))}: there are {', '.join(SCRIPTS)}")
    if options.quick and options.out is None:
        parser().error("--quick: its figures mean nothing; say with --out where to write them")
    folder = options.out or report.HERE
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    failed = [] if options.write else results_of(options, given, file)
    results = json.loads(file.read_text(encoding="utf-8"))
    write(results, folder)
    if folder == report.HERE:
        text = README.read_text(encoding="utf-8")
        README.write_text(report.with_section(text, results), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their figures are those of an earlier run, if any")


if __name__ == "__main__":
    main()
