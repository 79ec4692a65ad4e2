"""Every benchmark runs at its smallest and reports sane figures; no time is ever asserted."""

import argparse
import contextlib
import importlib
import io
import json
import math
import subprocess
import sys

import harness
import pytest
import report
import run
from harness import Contestant, Row
from support import ROOT

ROWS = {
    "attach": 4, "forward": 4, "routing": 4, "mixed": 2, "stack": 4, "training": 4, "gating": 6,
    "saved_bytes": 5, "switching": 3, "loading": 2, "saving": 1, "merging": 4,
    "recompiles": 3, "import_time": 2,
}  # fmt: skip

# PEFT's own habits, which are not ours to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Merging.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already (un)?merged.*:UserWarning"),
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A function: {script} -> what it wrote and what it printed; each runs once."""
    folder = tmp_path_factory.mktemp("reports")
    made = {}

    def runs(script):
        if script not in made:
            file, printed = folder / f"{script}.json", io.StringIO()
            with contextlib.redirect_stdout(printed):
                importlib.import_module(script).main(["--quick", "--json", str(file)])
            made[script] = json.loads(file.read_text()), printed.getvalue()
        return made[script]

    return runs


def figures(quick, script):
    """{case or name of a row: the row}."""
    rows = [Row(**row) for row in quick(script)[0]["rows"]]
    return {(row.name, row.case): row for row in rows}


def test_every_script_is_run_and_tested():
    files = (ROOT / "benchmarks").glob("*.py")
    scripts = {path.stem for path in files if "harness.parser(__doc__" in path.read_text()}
    assert set(run.SCRIPTS) == set(ROWS) == scripts


@pytest.mark.slow
@pytest.mark.parametrize("script", ROWS)
def test_a_benchmark_prints_a_table_and_writes_its_rows(script, quick):
    found, printed = quick(script)
    assert found["benchmark"] == script
    assert found["command"] == f"python benchmarks/{script}.py --quick"
    assert found["machine"]["threads"] == 1
    assert len(found["rows"]) >= ROWS[script]
    for row in found["rows"]:
        assert row["name"] in printed
        for figure in ("opendelta", "peft", "by_hand"):
            assert row[figure] is None or math.isfinite(row[figure])
            assert row[figure] is None or row[figure] > 0 or row["exact"]
        assert row["must"] is None or row["exact"]  # of a tiny model no time is asked


@pytest.mark.parametrize("script", ROWS)
def test_the_help_has_examples(script):
    text = importlib.import_module(script).parser().format_help()
    assert f"Examples:\n    python benchmarks/{script}.py\n" in text


@pytest.mark.slow
def test_what_is_counted_is_exact(quick):
    merged = figures(quick, "merging")
    for dtype in ("float32", "bfloat16"):
        assert merged["merge, then unmerge", f"7 linears, {dtype}"].opendelta == 0
    compiled = figures(quick, "recompiles")
    assert compiled["recompiles", "3 new sets"].opendelta == 3
    assert compiled["recompiles", "4 known sets"].opendelta == 0
    assert figures(quick, "import_time")["import", "transformers along"].opendelta == 0
    again = importlib.import_module("saved_bytes").main(["--quick"])
    assert [row.opendelta for row in again] == [
        row.opendelta for row in figures(quick, "saved_bytes").values()
    ]
    for row in again:
        assert row.opendelta <= row.peft


# ------------------------------------------------------------------------- harness
def test_the_contestants_take_turns():
    options = argparse.Namespace(rounds=3, warm_up=1, device="cpu", quick=False)
    events = []

    def contestant(name):
        def does(what):
            return lambda: events.append(f"{name} {what}")

        return Contestant(does("runs"), does("before"), does("after"))

    times = harness.race(
        {name: contestant(name) for name in ("opendelta", "peft", "plain")}, options
    )
    assert {name: len(found) for name, found in times.seconds.items()} == {
        "opendelta": 3, "peft": 3, "plain": 3,
    }  # fmt: skip
    assert events[:3] == ["opendelta before", "opendelta runs", "opendelta after"]
    order = [event.split()[0] for event in events if "runs" in event]
    assert order[:3] == order[3:6] == ["opendelta", "peft", "plain"]  # the warm-up, the first round
    assert order[6:9] == ["peft", "plain", "opendelta"]


def test_figures_are_medians_of_the_ratios_of_each_round():
    ours, theirs, plain = [2.0, 30.0, 4.0], [3.0, 40.0, 8.0], [1.0, 10.0, 4.0]
    times = harness.Times({"opendelta": ours, "peft": theirs, "plain": plain}, {}, {})
    row = times.row("forward", "1x1", "x plain", "plain", must=2)
    assert (row.opendelta, row.peft, row.by_hand, row.spread) == (2, 3, None, 0.5)
    times = harness.Times({"opendelta": ours, "peft": theirs}, {}, {})
    row = times.row("attach", "7", "ms", per=1e-3)
    assert (row.opendelta, row.peft) == pytest.approx((4000, 8000))


@pytest.mark.parametrize(
    ("ours", "must", "exact", "verdict"),
    [
        (1.1, None, False, ""),
        (1.1, 1.2, False, "yes"),
        (1.25, 1.2, False, "yes"),
        (1.5, 1.2, False, "no: 25% over"),
        (1.21, 1.2, True, "no: 1% over"),
        (2, 0, True, "no: 2 too many"),
    ],
)
def test_the_verdict_says_by_how_much_a_must_is_missed(ours, must, exact, verdict):
    assert Row("row", "case", "x", ours, must=must, exact=exact).verdict == verdict


def test_figures_are_spelt_with_three_digits():
    given = [None, 0, 3, 0.0123, 0.5, 1.234, 12.34, 1234.5]
    assert [harness.spell(number) for number in given] == [
        "", "0", "3", "0.0123", "0.500", "1.23", "12.3", "1,234",
    ]  # fmt: skip


def test_a_missed_must_brings_its_profile():
    done = []

    def run():
        done.append("run")
        for _ in range(300):
            sorted(range(1000), key=abs)

    work = Contestant(run, lambda: done.append("before"), lambda: done.append("after"))
    times = harness.Times({"opendelta": [0.2, 0.3]}, {}, {"opendelta": work})
    assert times.row("work", "once", "ms", per=1e-3, must=300).profile is None
    assert not done
    row = times.row("work", "once", "ms", per=1e-3, must=100, why="it sorts")
    shares = dict(row.profile)
    assert shares["builtins.sorted"] > 20
    assert 0 < sum(shares.values()) <= 100.5
    assert done[:4] == ["before", "run", "after", "before"]
    page = report.misses([row, Row("other", "case", "x", 1.0, must=2.0)])
    assert "**work, once** (no: 150% over): it sorts." in page
    assert f"| builtins.sorted | {shares['builtins.sorted']:.1f} |" in page
    assert "other" not in page
    assert report.misses([Row("other", "case", "x", 1.0, must=2.0)]) == ""


# --------------------------------------------------------------------------- pages
@pytest.fixture
def results():
    """The results that are in the repository."""
    return json.loads((ROOT / "benchmarks" / "results.json").read_text())


def test_the_pages_are_what_the_script_writes(results):
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.results_page(results)
    readme = run.README.read_text()
    assert report.with_section(readme, results) == readme
    assert [found["benchmark"] for found in results["benchmarks"]] == list(run.SCRIPTS)


def test_the_results_are_of_the_real_sizes_and_of_the_pinned_peft(results):
    pins = (ROOT / "constraints.txt").read_text().split()
    assert f"peft=={results['machine']['peft']}" in pins
    for found in results["benchmarks"]:
        assert found["command"] == f"python benchmarks/{found['benchmark']}.py"


def test_the_chart_shows_the_ratios_of_both(results, tmp_path):
    rows = report.rows_of(results)
    report.chart(rows, tmp_path / "chart.svg")
    picture = (tmp_path / "chart.svg").read_text()
    for row in rows:
        if row.unit == "x plain" and row.peft is not None:
            assert row.name in picture
            assert harness.spell(row.opendelta) in picture


def test_results_without_such_ratios_have_no_chart(results, tmp_path):
    attach = [found for found in results["benchmarks"] if found["benchmark"] == "attach"]
    alone = {**results, "benchmarks": attach}
    report.chart(report.rows_of(alone), tmp_path / "chart.svg")
    assert not (tmp_path / "chart.svg").exists()
    assert ".svg" not in report.results_page(alone)


@pytest.mark.slow
def test_some_run_in_processes_of_their_own_and_the_other_figures_stay(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "run.py"), "--quick"]
    command += ["--only", "saving", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new = json.loads((tmp_path / "results.json").read_text())
    for old, found in zip(results["benchmarks"], new["benchmarks"], strict=True):
        if found["benchmark"] == "saving":
            assert found["command"] == "python benchmarks/saving.py --quick"
        else:
            assert found == old
    assert (tmp_path / "RESULTS.md").read_text() == report.results_page(new)
    assert (tmp_path / "results.svg").exists()
