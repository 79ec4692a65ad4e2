"""Every benchmark runs at its smallest and reports sane figures; no time is ever asserted."""

import importlib
import json
import math

import pytest

BENCHMARKS = {"forward": 4}  # {script: how many rows it reports}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{script: what it wrote}, each run once."""
    folder = tmp_path_factory.mktemp("reports")
    made = {}

    def report(script):
        if script not in made:
            file = folder / f"{script}.json"
            importlib.import_module(script).main(["--quick", "--json", str(file)])
            made[script] = json.loads(file.read_text())
        return made[script]

    return report


@pytest.mark.parametrize("script", BENCHMARKS)
def test_a_benchmark_prints_a_table_and_writes_its_rows(script, reports, capsys):
    report = reports(script)
    printed = capsys.readouterr().out
    assert len(report["rows"]) >= BENCHMARKS[script]
    assert report["command"].startswith(f"python benchmarks/{script}.py --quick")
    assert report["machine"]["threads"] == 1
    for row in report["rows"]:
        assert row["name"] in printed
        for figure in ("opendelta", "peft", "by_hand"):
            assert row[figure] is None or math.isfinite(row[figure])
            assert row[figure] is None or row[figure] > 0 or row["exact"]
