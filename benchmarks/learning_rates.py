"""Each method's learning rate, on the demo's tasks: the table docs/reference/learning_rates.md.

Each method, at its default options and with a classifier of its own, learns to sort the demo's
questions at several learning rates, each about three times the one before, until the two beside the
best one are tried too. Its rate is the best one, or a third of it where that sorts better than
three times it. At its rate it then trains for longer; at the best one it learns to sort the demo's
messages too.
A line for each finished training is added to a file; what has a line there is not trained again.

Examples:
    python benchmarks/learning_rates.py
    python benchmarks/learning_rates.py --only lora,ia3 --seeds 3 --runs my-runs.jsonl
    python benchmarks/learning_rates.py --write    # rewrites docs/reference/learning_rates.md
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.functional import cross_entropy

from opendelta import demo
from opendelta._deltas.registry import METHODS
from opendelta.demo import data
from opendelta.demo.training import accuracy, predict, quiet_libraries, train

HERE = Path(__file__).parent
RUNS = HERE / "learning_rates.jsonl"
PAGE = HERE.parent / "docs" / "reference" / "learning_rates.md"
RATES = [float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 3)]
FIRST = [3e-4, 3e-3, 3e-2]  # are tried in any case
SEEDS, SIZES = 2, {"train": 1600, "test": 500, "epochs": 1}  # of the page
LONGER = 4  # times as long as in the search is the long training
SLOW = {"prefix": 4}  # learns nothing in so short a training, and is trained so many times as long
# Batches of like length: less padding. Messages are shuffled: how long one is tells its class.
SAMPLING = {"questions": "group_by_length", "messages": "random"}
COLUMNS = ["type", "learning rate", "questions", "longer"]
COLUMNS += ["best", "questions at it", "at three times it", "messages at it"]
ALONE = "classifier alone"  # a row of the table: no delta at all


@dataclass(frozen=True)
class Training:
    """One training; the same one always ends the same.

    Attributes:
        task: a name in the demo's data.
        method: a method's `delta_type`, or `ALONE`.
        rate: the highest learning rate; it rises to it, and falls to 0.
        seed: of the split, of the new weights and of the order.
        train: how many texts are trained on.
        test: how many texts are tested on.
        epochs: how often each text is trained on.
    """

    task: str
    method: str
    rate: float
    seed: int
    train: int
    test: int
    epochs: int


@dataclass(frozen=True)
class Result:
    """What a training ended with.

    Attributes:
        accuracy: the share of the test texts that are sorted right.
        loss: on the test texts; infinite if the training diverged.
        seconds: that it took.
        where: the machine and the versions.
    """

    accuracy: float
    loss: float
    seconds: float
    where: str


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        method: a method's `delta_type`, or `ALONE`.
        rate: the method's learning rate.
        score: the share of the test questions that are sorted right at it, the mean of the seeds.
        spread: half the distance between the best and the worst of the seeds.
        longer: that share after one training that is `LONGER` times as long.
        best: the rate that was best in the search.
        best_score: the share of the test questions at it, the mean of the seeds.
        higher: that share at the rate above it; 0 if none was tried.
        messages: the share of the test messages that are sorted right at the best rate.
    """

    method: str
    rate: float
    score: float
    spread: float
    longer: float
    best: float
    best_score: float
    higher: float
    messages: float


def own_methods() -> list[str]:
    """The library's methods, and the classifier without a delta."""
    own = (n for n, m in METHODS.items() if m.__module__.startswith("opendelta."))
    return [ALONE, *sorted(own)]


# ------------------------------------------------------------------------------------- one training
@functools.cache
def texts_of(task: str, train: int, test: int, seed: int) -> data.Texts:
    """The texts of a task."""
    return data.load(task, train, test, seed)


def learn(training: Training) -> Result:
    """Train as the demo does, with a delta at its default options that owns the classifier."""
    start, name, seed = time.perf_counter(), training.method, training.seed
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        texts = texts_of(training.task, training.train, training.test, seed)
        torch.manual_seed(seed)
        model: Any = demo.load_backbone(len(texts.classes))
        if name == ALONE:
            model.requires_grad_(False).classifier.requires_grad_(True)
        else:
            delta: Any = METHODS[name](model, modules_to_save=["classifier"])  # type: ignore[call-arg]
            delta.freeze_module(exclude=["deltas"])
        train(
            model,
            texts,
            training.epochs,
            training.rate,
            seed,
            Path(folder),
            Console(quiet=True),
            train_sampling_strategy=SAMPLING[training.task],
        )
        logits, labels = predict(model, texts), demo.labels_of(texts)
    loss = cross_entropy(logits, labels).item()
    return Result(
        round(accuracy(logits, labels), 4),
        round(loss, 4) if math.isfinite(loss) else math.inf,
        round(time.perf_counter() - start, 1),
        where(),
    )


@functools.cache
def where() -> str:
    """The machine and the versions."""
    facts = harness.facts()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "opendelta"))
    return f"{facts['cpu']}, one thread, Python {facts['python']}, {versions}"


# ------------------------------------------------------------------------------------ all trainings
class Runs:
    """The finished trainings: {training: result}, in memory and in a file with a line for each.

    A line that was cut off, as by a kill, is taken out of the file.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, dict[Training, Result]()
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole, encoding="utf-8")
        for line in map(json.loads, whole.splitlines()):
            self.found[Training(**line["training"])] = Result(**line["result"])

    def result(self, training: Training) -> Result:
        """The result of a training, which is done and written down if it isn't there yet."""
        if training not in self.found:
            self.found[training] = result = learn(training)
            both = {"training": dataclasses.asdict(training), "result": dataclasses.asdict(result)}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(both) + "\n")
        return self.found[training]


def search(
    method: str, seeds: int, sizes: dict[str, int], result: Callable[[Training], Result]
) -> Row:
    """Find a method's rate for the questions and try it for longer, and the best one on messages.

    The best rate has the highest mean accuracy, of equal ones the lowest loss. Rates are tried with
    the first seed until both neighbours of the best one are; the best one and the method's are then
    trained with the other seeds too, and have to remain so.

    Args:
        seeds: how many trainings the score of a rate is the mean of.
        sizes: `train`, `test` and `epochs` of the trainings; messages are half as many.
        result: gives the result of a training.
    """
    sizes = sizes | {"epochs": sizes["epochs"] * SLOW.get(method, 1)}
    tried: dict[float, list[Result]] = {}
    new = FIRST
    while new:
        for rate in new:
            training = Training("questions", method, rate, len(tried.get(rate, ())), **sizes)
            tried.setdefault(rate, []).append(result(training))
        best = max(tried, key=lambda rate: (score(tried[rate]), -loss(tried[rate])))
        lower, higher = beside(best, tried)
        chosen = RATES[RATES.index(best) - 1] if lower > higher else best
        new = [rate for rate in near(best) if rate not in tried]
        new = new or [rate for rate in sorted({chosen, best}) if len(tried[rate]) < seeds]
    ends = [found.accuracy for found in tried[chosen]]
    longer = sizes | {"epochs": sizes["epochs"] * LONGER}
    half = sizes | {"train": sizes["train"] // 2}
    return Row(
        method,
        chosen,
        score(tried[chosen]),
        (max(ends) - min(ends)) / 2,
        result(Training("questions", method, chosen, 0, **longer)).accuracy,
        best,
        score(tried[best]),
        higher,
        result(Training("messages", method, best, 0, **half)).accuracy,
    )


def score(found: Iterable[Result]) -> float:
    """The mean accuracy."""
    return statistics.mean(result.accuracy for result in found)


def loss(found: Iterable[Result]) -> float:
    """The mean loss."""
    return statistics.mean(result.loss for result in found)


def near(rate: float) -> list[float]:
    """A rate between its neighbours in `RATES`."""
    at = RATES.index(rate)
    return RATES[max(at - 1, 0) : at + 2]


def beside(rate: float, tried: dict[float, list[Result]]) -> tuple[float, float]:
    """The scores at the rates below and above one; 0 where none was tried."""
    at, scores = RATES.index(rate), {RATES.index(r): score(found) for r, found in tried.items()}
    return scores.get(at - 1, 0.0), scores.get(at + 1, 0.0)


def rows_of(
    runs: Runs, methods: Iterable[str], seeds: int, sizes: dict[str, int], console: Console
) -> list[Row]:
    """The rows of the table; what is not yet in `runs` is trained, and a progress bar shows it."""
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    methods = list(methods)
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        shown = bar.add_task("", total=len(methods) * (len(FIRST) + 2 * seeds))
        done = itertools.count(1)

        def result(training: Training) -> Result:
            what = f"{training.method}, {training.task}, {training.rate:g}, seed {training.seed}"
            bar.update(shown, description=what)
            known = training in runs.found
            found = runs.result(training)
            bar.update(shown, completed=next(done))
            if not known:
                console.print(f"{what}: {found.accuracy:.3f} in {found.seconds:.0f} s")
            return found

        rows = []
        for method in methods:
            rows.append(search(method, seeds, sizes, result))
        bar.update(shown, total=next(done) - 1)
    return rows


# ---------------------------------------------------------------------------------------- the table
def cells(row: Row) -> list[str]:
    """A row in words."""
    own = [f"{row.rate:g}", f"{row.score:.3f} ± {row.spread:.3f}", f"{row.longer:.3f}"]
    best = [f"{row.best:g}", f"{row.best_score:.3f}", f"{row.higher:.3f}" if row.higher else ""]
    return [row.method, *own, *best, f"{row.messages:.3f}"]


def table(rows: Iterable[Row]) -> Table:
    """The rows as a table for a terminal."""
    drawn = Table(*COLUMNS)
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in rows:
        drawn.add_row(*cells(row))
    return drawn


def largest(task: str) -> float:
    """The share of the largest class in the test texts: the score of one that learnt nothing."""
    labels = demo.labels_of(texts_of(task, SIZES["train"] // 2, SIZES["test"], 0))
    return labels.bincount().max().item() / len(labels)


def page(rows: Iterable[Row], runs: Runs) -> str:
    """docs/reference/learning_rates.md."""
    machines = "; ".join(sorted({found.where for found in runs.found.values()}))
    steps = math.ceil(SIZES["train"] / 32) * SIZES["epochs"]
    lines = [
        "# Learning rates\n",
        "`opendelta.optimizer_groups(model)` trains each delta at the learning rate of its method "
        "below; the classes have it as `default_learning_rate`.\n",
        "A method's rate is the best one of a search in short trainings, or a third of it where "
        "that does better than three times it: close above the best one often nothing is learnt, "
        "and the trainings that you do are longer.\n",
        "Each method was trained at its default options, with a classifier of its own at the same "
        'rate (`modules_to_save=["classifier"]`), on the tasks of `opendelta demo`: a MiniLM of 23 '
        f"million parameters sorts questions (TREC, 6 classes), {SIZES['train']:,} to train on and "
        f"{SIZES['test']:,} to test on, in {steps} steps of 32 questions, with AdamW, a linear "
        "warm-up and a linear decay; "
        f"{', '.join(f'`{name}` {times} times as long' for name, times in SLOW.items())}.\n",
        "- *questions*: the share of the test questions that are sorted right at the method's "
        f"rate, the mean of {SEEDS} seeds and half the distance between them.\n"
        f"- *longer*: that share after one training that is {LONGER} times as long.\n"
        "- *best*, *questions at it*, *at three times it*: the rate that was best in the short "
        f"trainings, its share of the questions, the mean of {SEEDS} seeds, and that at the rate "
        "above it. Rates of 1 and 3 times powers of 10 were tried, with one seed, until both "
        "neighbours of the best one were.\n"
        "- *messages at it*: the share of the test messages (SMS, spam or not) that are sorted "
        f"right after one training at the best rate on {SIZES['train'] // 2:,}, in half as many "
        "steps.\n",
        "Who always names the largest class is right in "
        f"{largest('questions'):.3f} of the questions and {largest('messages'):.3f} of the "
        "messages.\n",
        "Take the rates as a place to start from: the trainings are short and the model is small. "
        "Longer trainings and larger models usually want lower ones. The rates were chosen by the "
        "scores on the test questions, which are therefore a little too high.\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'--:|' * (len(COLUMNS) - 1)}",
    ]
    for row in rows:
        name, *figures = cells(row)
        lines.append(f"| {name if name == ALONE else f'`{name}`'} | {' | '.join(figures)} |")
    lines += [
        f"\n{len(runs.found)} trainings on {machines}. "
        "`make rates` (`python benchmarks/learning_rates.py --write`) trains what is missing in "
        "`benchmarks/learning_rates.jsonl`, which has a line for each training, and writes this "
        "page.",
    ]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------- the command
def parser() -> argparse.ArgumentParser:
    """The options."""
    parsed = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument("--only", help="types of methods, with commas between them")
    parsed.add_argument("--seeds", type=int, default=SEEDS, help="how many for the best rate")
    for name, what in (("train", "to train on"), ("test", "to test on"), ("epochs", "of training")):
        help = f"{'' if name == 'epochs' else 'texts '}{what}"
        parsed.add_argument(f"--{name}", type=int, default=SIZES[name], help=help)
    parsed.add_argument("--runs", type=Path, default=RUNS, help="file of the finished trainings")
    parsed.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parsed.add_argument(
        "--write", action="store_true", help="rewrite docs/reference/learning_rates.md"
    )
    return parsed


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write what is asked for."""
    parsed = parser()
    options = parsed.parse_args(arguments)
    known = own_methods()
    methods = options.only.split(",") if options.only else known
    if unknown := set(methods) - set(known):
        parsed.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(known)}")
    sizes = {name: getattr(options, name) for name in SIZES}
    if options.write and (options.only or (options.seeds, sizes) != (SEEDS, SIZES)):
        parsed.error("--write: the page has all methods, at the default sizes and seeds")
    data.check_packages()
    torch.set_num_threads(1)
    console = Console()
    runs = Runs(options.runs)
    rows = rows_of(runs, methods, options.seeds, sizes, console)
    console.print(table(rows))
    if options.json:
        found = [dataclasses.asdict(row) for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.write:
        PAGE.write_text(page(rows, runs), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
