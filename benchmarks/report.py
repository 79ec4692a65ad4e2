"""Writes what the benchmarks found: RESULTS.md, the chart, and a short table in README.md."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from harness import SLACK, Row, spell
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROOT = HERE.parent
START, END = "<!-- benchmarks: start -->\n", "<!-- benchmarks: end -->\n"
HOW = (
    "Times are processor time on one thread (on a CUDA device: CUDA events), medians over "
    "interleaved rounds of the ratio within a round, in one process with PEFT; lower is better. "
    "± is half the distance between the quartiles of opendelta's figure. "
    '"x plain" is over the backbone '
    'without deltas, "x floor" over a training step of the frozen backbone (forward and the '
    'gradients of activations), "x full" over full fine-tuning. A time meets its "must" within '
    f"{100 * (SLACK - 1):.0f}%; what is counted (bytes, graphs, bits) must meet it exactly. The "
    "backbone is a Llama of width 768 with random weights and LoRAs of rank 8 on all of its linear "
    "modules. It has 1 to 4 layers where it runs, on embeddings, with a head for training alone; "
    "where it is only attached to, switched, saved or loaded, its weights are zeros that nobody "
    "reads. Both libraries get the same values, and their outputs are compared before anything is "
    "timed. PEFT switches by set_adapter, which also sets requires_grad, and switches off by "
    "disable_adapter; it has no frozen(), so there the figure is that of its usual forward."
)
UNITS = (
    '"x plain" is the time over that of the model without deltas, "x floor" over a training step '
    'of the frozen model, "x full" the bytes over those of full fine-tuning, "x save_file" and "x '
    'addmm_" the time over that of the bare operation.'
)
CHARTED = ("x plain", "x floor", "x full", "x save_file", "x addmm_")
OURS, THEIRS, LINE = "#2f6fde", "#a9b0ba", "#808080"


def rows_of(results: dict[str, Any]) -> list[Row]:
    """The rows of all benchmarks, in order."""
    return [Row(**row) for found in results["benchmarks"] for row in found["rows"]]


# ----------------------------------------------------------------------------- tables
def table(rows: list[Row]) -> str:
    """All rows in Markdown."""
    lines = ["| row | case | opendelta | ± | PEFT | by hand | must | met | unit |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|---|---|")
    for row in rows:
        figures = (row.opendelta, row.spread, row.peft, row.by_hand, row.must)
        cells = [row.name, row.case, *map(spell, figures), row.verdict, row.unit]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short_table(results: dict[str, Any]) -> str:
    """The first row of each benchmark that both libraries have, in Markdown."""
    lines = ["| lower is better | | opendelta | PEFT | unit |", "|---|---|--:|--:|---|"]
    for found in results["benchmarks"]:
        row = next((r for r in rows_of({"benchmarks": [found]}) if r.peft is not None), None)
        if row is not None and row.peft is not None:
            ours, theirs = spell(row.opendelta), spell(row.peft)
            ours = f"**{ours}**" if row.opendelta < row.peft else ours
            lines.append(f"| {row.name} | {row.case} | {ours} | {theirs} | {row.unit} |")
    return "\n".join(lines) + "\n"


def machine(results: dict[str, Any]) -> str:
    """Where the figures come from, in a sentence."""
    m = results["machine"]
    device = "" if m["device"] == "cpu" else f"{m['device']}, "
    return (
        f"{device}{m['cpu']}, {m['threads']} thread of {m['cores']} cores, {m['system']}, Python "
        f"{m['python']}, PyTorch {m['torch']}, transformers {m['transformers']}, PEFT {m['peft']}"
    )


# ------------------------------------------------------------------------------ pages
def results_page(results: dict[str, Any]) -> str:
    """RESULTS.md."""
    rows = rows_of(results)
    asked = [row for row in rows if row.must is not None]
    met = sum(bool(row.met) for row in asked)
    commands = "\n".join(
        f"{found['command']}  # {found['seconds']:.0f} s, {found['machine']['date']}"
        for found in results["benchmarks"]
    )
    start = wrapped(
        f"Last written by `{results['command']}` on {results['machine']['date']} in "
        f"{results['seconds'] / 60:.0f} minutes, the machine's load being "
        f"{results['machine']['load']} at the start: {machine(results)}, opendelta "
        f"{results['machine']['opendelta']}. {met} of {len(asked)} musts are met."
    )
    picture = "![opendelta and PEFT, side by side](results.svg)\n\n" if charted(rows) else ""
    return (
        f"# Results\n\n{start}\n{picture}"
        f"{table(rows)}\n{wrapped(HOW)}{peak_memory(rows)}\n"
        f"{misses(rows)}"
        f"Each runs alone; `--help` lists the options:\n\n```sh\n{commands}\n```\n"
    )


def misses(rows: list[Row]) -> str:
    """By how much each must is missed, why, and where the time goes."""
    parts = []
    for row in rows:
        if row.met is False:
            why = f": {row.why}" if row.why else ""
            parts.append(wrapped(f"**{row.name}, {row.case}** ({row.verdict}){why}."))
            lines = [f"| {function} | {share:.1f} |" for function, share in row.profile or ()]
            head = ["| function | its own share of the time, % |", "|---|--:|"]
            parts += ["\n".join([*head, *lines, ""])] if lines else []
    return "\n".join(["## What is missed, and why\n", *parts, ""]) if parts else ""


def peak_memory(rows: list[Row]) -> str:
    """What each contestant took on the CUDA device; nothing if none was there."""
    lines = [
        f"- {row.name}, {row.case}: "
        + ", ".join(f"{name} {spell(peak)}" for name, peak in row.memory.items())
        for row in rows
        if row.memory
    ]
    head = ["", "Peak memory of a call on the device, MiB:", ""]
    return "\n".join([*head, *lines, ""]) if lines else ""


def readme_section(results: dict[str, Any]) -> str:
    """What stands between the markers in README.md."""
    dates = sorted(each["machine"]["date"][:10] for each in results["benchmarks"])
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    end = wrapped(
        f"`make bench` writes this; measured {days}: the first row of each "
        f"benchmark that both libraries have. {UNITS} [RESULTS.md](benchmarks/RESULTS.md) has "
        "all rows, a chart, the machine, what each figure was to be, and how it was measured."
    )
    return f"{short_table(results)}\n{end}"


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 100 letters, code in one piece."""
    code = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.fill(code, 100, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ") + "\n"


def with_section(text: str, results: dict[str, Any]) -> str:
    """README.md with the section as it should be."""
    before, rest = text.split(START)
    return before + START + "\n" + readme_section(results) + "\n" + END + rest.split(END)[1]


# ------------------------------------------------------------------------------ chart
def charted(rows: list[Row]) -> list[Row]:
    """The rows with a ratio that both libraries have."""
    return [row for row in rows if row.unit in CHARTED and row.peft is not None]


def chart(rows: list[Row], file: Path) -> None:
    """Bars of the ratios that both libraries have, and a line at 1 where nothing is added."""
    shown = charted(rows)[::-1]
    if not shown:
        return
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "opendelta", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 0.9 + 0.36 * len(shown)))
        axes = figure.subplots()
        for index, row in enumerate(shown):
            assert row.peft is not None
            pairs = ((0.19, row.opendelta, OURS, "opendelta"), (-0.19, row.peft, THEIRS, "PEFT"))
            for shift, value, colour, name in pairs:
                label = name if index == 0 else None
                axes.barh(index + shift, value, 0.36, color=colour, label=label)
                axes.text(value * 1.015, index + shift, spell(value), va="center", fontsize=8)
        axes.axvline(1, color=LINE, linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        low = min(min(row.opendelta, row.peft or 1) for row in shown)
        high = max(max(row.opendelta, row.peft or 1) for row in shown)
        axes.set_xlim(min(0.8, low * 0.9), high * 1.25)
        ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 50) if axes.get_xlim()[0] <= t < high * 1.2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        labels = [f"{row.name} ({row.case})" for row in shown]
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel(
            "times the plain model, full fine-tuning or the bare operation; lower is better"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
