"""The table of learning rates: it is true, the search finds the rate, a kill loses nothing."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import learning_rates
import pytest
from learning_rates import ALONE, PAGE, RUNS, SEEDS, SIZES, Result, Runs, search
from rich.console import Console
from support import ROOT

from opendelta._deltas.registry import METHODS

TINY = {"train": 32, "test": 16, "epochs": 1}


@pytest.fixture
def learn(monkeypatch):
    """A list of the trainings that a stub was asked for; 1e-2 is the best rate."""
    asked = []

    def stub(training):
        asked.append(training)
        away = abs(math.log10(training.rate) + 2)
        return Result(round(0.9 - away / 10, 4), away, 1.0, "here")

    monkeypatch.setattr(learning_rates, "learn", stub)
    return asked


def test_each_method_has_the_rate_that_was_measured_and_the_page_shows_it(monkeypatch):
    def missing(training):
        pytest.fail(f"{training.method} was not measured: run `make rates`")

    monkeypatch.setattr(learning_rates, "learn", missing)
    runs, methods = Runs(RUNS), learning_rates.own_methods()
    rows = learning_rates.rows_of(runs, methods, SEEDS, SIZES, Console(file=io.StringIO()))
    measured = {row.method: row.rate for row in rows if row.method != ALONE}
    said = {name: METHODS[name].default_learning_rate for name in measured}
    assert said == measured, "a class says another default_learning_rate than was measured"
    assert PAGE.read_text(encoding="utf-8") == learning_rates.page(rows, runs)


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (1e-2, [3e-4, 3e-3, 1e-2, 3e-2, 0.1]),
        (1e-4, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 3e-2]),
        (3.0, [3e-4, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]),
    ],
)
def test_rates_are_tried_until_both_neighbours_of_the_best_are(peak, tried):
    asked = []

    def result(training):
        asked.append(training)
        return Result(0.5, abs(math.log(training.rate / peak)), 1.0, "")  # the loss decides

    row = search("lora", 2, TINY, result)
    questions = [training for training in asked if training.task == "questions"]
    assert sorted({training.rate for training in questions}) == tried
    assert {training.rate for training in questions if training.seed == 1} == {peak, row.rate}
    assert (row.best, row.higher == 0) == (peak, peak == tried[-1])


@pytest.mark.parametrize(
    ("below", "above", "rate", "score"),
    [(0.7, 0.2, 3e-3, 0.7), (0.2, 0.7, 1e-2, 0.9), (0.7, 0.7, 1e-2, 0.9)],
)
def test_a_third_of_the_best_rate_is_taken_where_it_beats_three_times_it(below, above, rate, score):
    scores, asked = {3e-3: below, 1e-2: 0.9, 3e-2: above}, []

    def result(training):
        asked.append(training)
        return Result(scores.get(training.rate, 0.1), 1.0, 1.0, "")

    row = search("lora", 2, TINY, result)
    assert (row.rate, row.score, row.best, row.best_score, row.higher) == pytest.approx(
        (rate, score, 1e-2, 0.9, above)
    )
    assert [(training.task, training.rate, training.epochs) for training in asked[-2:]] == [
        ("questions", rate, learning_rates.LONGER),
        ("messages", 1e-2, 1),
    ]


def test_a_rate_that_was_best_with_one_seed_alone_gives_way():
    def result(training):
        lucky = training.rate == 3e-2 and training.seed == 0
        return Result(0.9 if lucky else 0.8 if training.rate == 1e-2 else 0.6, 1.0, 1.0, "")

    row = search("lora", 3, TINY, result)
    assert (row.rate, row.score, row.spread) == (1e-2, pytest.approx(0.8), 0)
    assert row.higher == pytest.approx(0.75)  # of two seeds


def test_a_training_is_done_once_and_a_line_that_was_cut_off_again(learn, tmp_path):
    file = tmp_path / "runs.jsonl"
    options = ["--only", "ia3,lora", "--runs", str(file), "--json", str(tmp_path / "rows.json")]
    rows = learning_rates.main(options)
    whole, trainings = file.read_text(), list(learn)
    assert len(trainings) == len(whole.splitlines()) == 2 * (6 + SEEDS)
    assert json.loads((tmp_path / "rows.json").read_text()) == list(map(dataclasses.asdict, rows))
    file.write_text(whole[:-20])
    learn.clear()
    assert learning_rates.main(options) == rows
    assert (learn, file.read_text()) == (trainings[-1:], whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "lorra"], "--only lorra: there are classifier alone, adapter, "),
        (["--write", "--only", "lora"], "the page has all methods"),
        (["--write", "--seeds", "1"], "the page has all methods"),
    ],
)
def test_what_it_cannot_do_is_refused(learn, options, message, capsys):
    with pytest.raises(SystemExit):
        learning_rates.main(options)
    assert message in capsys.readouterr().err
    assert not learn


def test_the_help_has_examples():
    text = learning_rates.parser().format_help()
    assert "Examples:\n    python benchmarks/learning_rates.py\n" in text


@pytest.mark.slow
def test_it_goes_on_after_a_kill_and_trainings_are_deterministic(tmp_path):
    file = tmp_path / "runs.jsonl"
    options = ["--only", "ia3,lora", "--seeds", "1", "--runs", str(file)]
    options += [f"--{name}={size}" for name, size in TINY.items()]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/learning_rates.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
            assert started.poll() is None
            time.sleep(0.05)
        os.kill(started.pid, signal.SIGKILL)
    before = file.read_text()
    rows = learning_rates.main(options)
    after = file.read_text()
    assert after.startswith(before[: before.rfind("\n") + 1])
    assert [row.method for row in rows] == ["ia3", "lora"]
    first, found = next(iter(Runs(file).found.items()))
    again = learning_rates.learn(first)
    assert (again.accuracy, again.loss) == (found.accuracy, found.loss)
