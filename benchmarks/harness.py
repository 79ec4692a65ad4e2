"""What every benchmark shares: options, interleaved timing, facts about the machine, the report.

Times are process CPU time on one thread (on CUDA: CUDA events). In every round each contestant runs
once, in an order that rotates; a figure is the median over the rounds of the ratio within a round,
so that a machine that slows down does so for all.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import pstats
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for noisy in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # of what else they could load
    logging.getLogger(noisy).setLevel(logging.ERROR)

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

SLACK = 1.05  # of a time: what one run differs from the next by
PACKAGES = ("torch", "transformers", "peft", "opendelta")
SAMPLE = 0.03  # seconds that one sample lasts at least, by repeating short runs
PROFILED, FUNCTIONS = 0.5, 8  # seconds of a profile, and how many functions it names


# ------------------------------------------------------------------------------------------ results
@dataclass
class Row:
    """One figure of the report; lower is better in all of them.

    Attributes:
        name: what is measured.
        case: in which setting.
        unit: of the figures; "x ..." is a ratio.
        opendelta: our figure.
        peft: PEFT's, measured in the same rounds.
        by_hand: that of plain modules composed by hand, or of the bare operation.
        must: what opendelta's is to be at most.
        exact: the figure is counted, not timed: no slack.
        spread: half the distance between the quartiles of our figure over the rounds.
        memory: {contestant: peak MiB on the CUDA device}.
        why: what stands between the figure and the must, if it is missed.
        profile: if it is missed, (function, its own share of opendelta's time in percent).
    """

    name: str
    case: str
    unit: str
    opendelta: float
    peft: float | None = None
    by_hand: float | None = None
    must: float | None = None
    exact: bool = False
    spread: float | None = None
    memory: dict[str, float] | None = None
    why: str | None = None
    profile: list[tuple[str, float]] | None = None

    @property
    def met(self) -> bool | None:
        """Whether opendelta does what it must; None if nothing is asked."""
        if self.must is None:
            return None
        return self.opendelta <= self.must * (1 if self.exact else SLACK)

    @property
    def verdict(self) -> str:
        """`met` in words, with how far it is off."""
        if self.must is None:
            return ""
        if self.met:
            return "yes"
        if self.must == 0:
            return f"no: {spell(self.opendelta)} too many"
        return f"no: {100 * (self.opendelta / self.must - 1):.0f}% over"


def spell(number: float | None) -> str:
    """A figure with three digits; nothing for None."""
    if number is None:
        return ""
    if number == 0 or (isinstance(number, int) and number < 1000):
        return str(int(number))
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.{min(2 - math.floor(math.log10(abs(number))), 6)}f}"


def facts(device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions and the date."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def table(rows: Sequence[Row]) -> Table:
    """The rows as they are printed."""
    shown = Table("row", "case", "opendelta", "±", "peft", "by hand", "must", "met?", "unit")
    shown.caption = f"a time meets its must within {100 * (SLACK - 1):.0f}%"
    for column in shown.columns[2:7]:
        column.justify = "right"
    for row in rows:
        figures = (row.opendelta, row.spread, row.peft, row.by_hand, row.must)
        colour = {True: "green", False: "red", None: "default"}[row.met]
        verdict = f"[{colour}]{row.verdict}[/]"
        shown.add_row(row.name, row.case, *map(spell, figures), verdict, row.unit)
    return shown


# ------------------------------------------------------------------------------------------ options
class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help with the docstring as it is, and with the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def parser(
    doc: str | None,
    *,
    layers: int | None = None,
    linears: list[int] | None = None,
    rounds: int | None = None,
) -> argparse.ArgumentParser:
    """The options that benchmarks have in common.

    Args:
        doc: the script's docstring, which has the examples.
        layers: how many layers the backbone has by default; None: the script has no such option.
        linears: how many linear modules by default, multiples of 7; None: there is no such option.
        rounds: how many rounds by default; None: nothing is timed.
    """
    parsed = argparse.ArgumentParser(description=doc, formatter_class=_Help)
    if layers is not None:
        parsed.add_argument("--layers", type=int, default=layers, help="of the backbone")
    if linears is not None:
        help = "how many modules: multiples of 7"
        parsed.add_argument("--linears", type=numbers, default=linears, help=help)
    parsed.add_argument("--width", type=int, default=768, help="of the backbone")
    if rounds is not None:
        parsed.add_argument("--rounds", type=int, default=rounds, help="that count")
        parsed.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parsed.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that computes")
    parsed.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parsed.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parsed.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return parsed


def make_quick(options: argparse.Namespace) -> None:
    """Shrink whatever the options have."""
    tiny = {"width": 64, "layers": 1, "rounds": 2, "warm_up": 1, "linears": [7, 14]}
    for name in tiny.keys() & vars(options).keys():
        setattr(options, name, tiny[name])


def run(
    parsed: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], list[Row]],
    arguments: Sequence[str] | None = None,
) -> list[Row]:
    """Run one benchmark: parse, measure, print the table, write the JSON file."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parsed.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parsed.error("--device cuda: there is no CUDA device here")
    if options.quick:
        make_quick(options)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    rows = measure(options)
    if options.quick or options.width != 768:  # the musts are about the real sizes
        rows = [dataclasses.replace(row, must=row.must if row.exact else None) for row in rows]
    console = Console()
    console.width = console.width if console.is_terminal else 140
    console.print(table(rows))
    if options.json:
        script = Path(sys.modules[measure.__module__].__file__ or "").name
        result = {
            "benchmark": script.removesuffix(".py"),
            "command": shlex.join(["python", f"benchmarks/{script}", *without_file(given)]),
            "machine": facts(options.device),
            "seconds": round(time.perf_counter() - start, 1),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return rows


def without_file(given: Sequence[str]) -> list[str]:
    """The arguments without `--json FILE`, which changes no figure."""
    kept = list(given)
    if "--json" in kept:
        at = kept.index("--json")
        del kept[at : at + 2]
    return kept


def numbers(text: str) -> list[int]:
    """Numbers from an option such as `1,4,8`."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    """(batch, tokens) pairs from an option such as `4x128,1x1`."""
    return [(int(b), int(t)) for b, t in (part.split("x") for part in text.split(","))]


# ------------------------------------------------------------------------------------------- timing
@dataclass
class Contestant:
    """Something to time.

    Attributes:
        run: what is timed.
        before: runs before each sample, untimed.
        after: runs after each sample, untimed.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None


class Times:
    """Seconds by contestant and round."""

    def __init__(
        self,
        seconds: dict[str, list[float]],
        memory: dict[str, float],
        contestants: dict[str, Contestant],
    ) -> None:
        self.seconds, self.memory, self.contestants = seconds, memory or None, contestants

    def row(
        self, name: str, case: str, unit: str, base: str | None = None, per: float = 1, **rest: Any
    ) -> Row:
        """The row of these times: medians over the rounds.

        Args:
            base: the contestant whose time of the same round each time is divided by. None: seconds
                are reported, divided by `per`.
            rest: more of the row's fields.
        """
        figures = {one: self._figures(one, base, per) for one in self.seconds if one != base}
        quarters = statistics.quantiles(figures["opendelta"], n=4, method="inclusive")
        medians = {one: statistics.median(found) for one, found in figures.items()}
        spread = (quarters[2] - quarters[0]) / 2
        row = Row(name, case, unit, **{**medians, "memory": self.memory, "spread": spread, **rest})
        if row.met is False:
            row.profile = profile(self.contestants["opendelta"])
        return row

    def _figures(self, one: str, base: str | None, per: float) -> list[float]:
        seconds = self.seconds[one]
        if base is None:
            return [each / per for each in seconds]
        return [a / max(b, 1e-9) for a, b in zip(seconds, self.seconds[base], strict=True)]


def race(
    contestants: dict[str, Contestant], options: argparse.Namespace, on_device: bool = True
) -> Times:
    """Time the contestants in interleaved rounds.

    Args:
        on_device: the work is the device's, and CUDA events time it there; else it is the host's.
    """
    events = on_device and options.device == "cuda"
    once: dict[str, float] = {}
    for _ in range(max(options.warm_up, 1)):
        for name, contestant in contestants.items():
            once[name] = _sample(contestant, 1, events)
    longest = max(once.values())
    again = any(c.before or c.after for c in contestants.values()) or options.quick
    calls = 1 if again else math.ceil(min(SAMPLE / max(longest, 1e-7), 10_000))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for index in range(options.rounds):
        gc.collect()
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_sample(contestants[name], calls, events) / calls)
    memory = {n: _peak_memory(c) for n, c in contestants.items()} if events else {}
    return Times(seconds, memory, contestants)


def profile(contestant: Contestant) -> list[tuple[str, float]]:
    """Where a contestant's time goes: functions and their own shares of it, the largest first."""
    profiled, spent = cProfile.Profile(), 0.0
    while spent < PROFILED:
        if contestant.before:
            contestant.before()
        began = time.perf_counter()
        profiled.runcall(contestant.run)
        spent += time.perf_counter() - began
        if contestant.after:
            contestant.after()
    stats: Any = pstats.Stats(profiled)
    own = {place: figures[2] for place, figures in stats.stats.items()}
    first = sorted(own, key=own.__getitem__, reverse=True)[:FUNCTIONS]
    return [(_spell(*place), round(100 * own[place] / stats.total_tt, 1)) for place in first]


def _spell(file: str, line: int, function: str) -> str:
    """A function as profiles name it, without the paths of this machine."""
    short = re.sub(r"<built-in method (.*)>|<method '(.*)' of .*>", r"\1\2", function)
    return short if file == "~" else f"{Path(file).parent.name}/{Path(file).name}: {short}"


def _sample(contestant: Contestant, calls: int, events: bool) -> float:
    """Seconds that so many calls take."""
    if contestant.before:
        contestant.before()
    if contestant.before or contestant.after:
        gc.collect()  # what the last contestant left is not this one's to clear away
    if events:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        _repeat(contestant.run, calls)
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1000
    else:
        began = time.process_time()
        _repeat(contestant.run, calls)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.process_time() - began
    if contestant.after:
        contestant.after()
    return seconds


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _peak_memory(contestant: Contestant) -> float:
    """MiB that one call takes on the CUDA device, on top of what is there before."""
    if contestant.before:
        contestant.before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if contestant.after:
        contestant.after()
    return peak / 2**20
