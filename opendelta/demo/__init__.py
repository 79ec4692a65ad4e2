"""The demo: learn two tasks on one pretrained encoder, save, switch, combine and detach them.

It imports the public names, as a user does; only `cli` may import it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import (
    AdapterModel,
    AverageModel,
    Delta,
    DeltaError,
    GateModel,
    LoraModel,
    assert_pristine,
    composition,
    load,
    snapshot,
    statistics,
    tree,
)
from . import data
from .data import Texts
from .training import accuracy, predict, quiet_libraries, train

SITE = "layer.5.output.dense"  # carries both deltas of the first task


@dataclass
class Row:
    """A row of the table: the backbone with some of the deltas active.

    Attributes:
        what: the names of the active deltas; "MiniLM" if none is active.
        accuracy: the share of the test questions that the model sorts right.
        parameters: the number of parameters in these deltas; if there are none, in the backbone.
        size: the size of the files with these parameters, in bytes.
    """

    what: str
    accuracy: float
    parameters: int
    size: int


@dataclass
class Outcome:
    """The results of the demo.

    Attributes:
        rows: for the questions: the plain backbone, each delta alone, and last both.
        messages: the share of the test messages that are sorted right.
        mixed: of questions and messages mixed, learned from few: {what acts: the share of the
            test texts that is sorted right}; the gate is last.
    """

    rows: list[Row]
    messages: float
    mixed: dict[str, float]

    @property
    def questions(self) -> float:
        """The share of the test questions that are sorted right."""
        return self.rows[-1].accuracy


# ---------------------------------------------------------------------------------------- the model
def load_backbone(classes: int) -> nn.Module:
    """Return the pretrained MiniLM with a new, random classifier.

    It has no dropout: in so few epochs it learns better and faster without dropout.
    """
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        data.locate("MiniLM"),
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    )


def attach_questions(model: nn.Module) -> list[Delta]:
    """Put LoRA and then adapters on `model`; LoRA owns the classifier; only the deltas train."""
    lora = LoraModel(
        model,
        modified_modules=["query", "value", "output.dense"],
        lora_r=8,
        modules_to_save=["classifier"],
    )
    adapter = AdapterModel(model, modified_modules=["output.dense"], bottleneck_dim=16)
    adapter.freeze_module(exclude=["deltas"])
    return [lora, adapter]


def attach_messages(model: nn.Module, classes: int) -> Delta:
    """Put a LoRA with its own classifier for `classes` classes on `model`; only the LoRA trains."""
    spam = LoraModel(model, modules_to_save=["classifier"], num_labels=classes, name="spam")
    spam.freeze_module(exclude=["deltas"])
    return spam


# ----------------------------------------------------------------------------------------- the demo
def run(
    train_size: int = 3600,
    test_size: int = 900,
    epochs: int = 2,
    seed: int = 0,
    quiet: bool = False,
) -> Outcome:
    """Run the demo: compose, train, compare, save, reload, switch, mix and detach; print each step.

    Args:
        train_size: number of questions to train on; there are a third as many messages.
        test_size: number of questions to test on, and number of messages.
        epochs: how often each text is trained on.
        seed: seed of the split, of the new weights and of the order.
        quiet: print nothing.

    Raises:
        DeltaError: a package is missing, or a reloaded task gives other logits.
    """
    data.check_packages()
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    with quiet_libraries(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(seed)
        tasks = {
            "questions": data.load("questions", train_size, test_size, seed),
            "messages": data.load("messages", max(1, train_size // 3), test_size, seed),
        }
        model = load_backbone(len(tasks["questions"].classes))
        rows, questions = learn_questions(model, tasks["questions"], epochs, seed, folder, console)
        messages = learn_messages(model, tasks["messages"], epochs, seed, folder, console)
        expected = {"questions": questions, "messages": messages}
        backbone = load_backbone(len(tasks["questions"].classes))
        before = snapshot(backbone)
        share(backbone, folder, tasks, expected, console)
        mixed = learn_mixed(backbone, tasks, seed, folder, console)
        for delta in list(composition(backbone)):
            delta.detach()
        assert_pristine(backbone, like=before)
        console.print("detached, the first one first: that MiniLM is as it was, bit for bit\n")
        outcome = Outcome(rows, accuracy(messages, labels_of(tasks["messages"])), mixed)
    console.print(
        f"test accuracy: {outcome.questions:.3f} on questions, {outcome.messages:.3f} on messages"
    )
    return outcome


def learn_questions(
    model: nn.Module, texts: Texts, epochs: int, seed: int, folder: Path, console: Console
) -> tuple[list[Row], Tensor]:
    """Learn the first task with LoRA and adapters: train, save, compare, detach.

    Returns:
        The rows of the table, and the logits of the test questions with both deltas.
    """
    console.print("1. Two deltas teach a MiniLM to sort questions by what they ask for.\n")
    deltas = attach_questions(model)
    console.print(tree(model), "", str(composition(model).explain(SITE)), sep="\n")
    introduce(texts, "questions", console)
    train(model, texts, epochs, 2e-3, seed, folder / "trainer", console)
    for delta in deltas:
        delta.save_finetuned(folder / delta.name)
    composition(model).save(folder / "questions")
    rows, logits = compare(model, deltas, texts, folder)
    console.print("", table(rows, statistics(model).trainable_ratio), "", sep="\n")
    for delta in deltas:
        delta.detach()
    return rows, logits


def learn_messages(
    model: nn.Module, texts: Texts, epochs: int, seed: int, folder: Path, console: Console
) -> Tensor:
    """Learn the second task on the same backbone with a LoRA; return the logits of the tests."""
    console.print("2. They leave, and another delta teaches the same MiniLM to find spam.")
    spam = attach_messages(model, len(texts.classes))
    introduce(texts, "text messages", console)
    train(model, texts, epochs, 5e-3, seed, folder / "trainer", console)
    composition(model).save(folder / "messages")
    logits = predict(model, texts)
    spam.detach()
    return logits


def introduce(texts: Texts, what: str, console: Console) -> None:
    """Print the number of texts and their classes."""
    labels = labels_of(texts)
    largest = labels.bincount().max().item() / len(labels)
    console.print(
        f"\n{len(texts.train):,} {what} to train on, {len(texts.test):,} to test on; "
        f"classes: {', '.join(texts.classes)}; the largest is {largest:.0%} of them"
    )


def labels_of(texts: Texts) -> Tensor:
    """Return the right labels of the test texts."""
    return torch.tensor([example["labels"] for example in texts.test])


def compare(
    model: nn.Module, deltas: Sequence[Delta], texts: Texts, folder: Path
) -> tuple[list[Row], Tensor]:
    """Test the backbone with no delta, with each alone, and with all.

    Args:
        folder: holds the saved deltas, each in a folder of its name.

    Returns:
        A row for each test, and the logits with all deltas.
    """
    costs = {}
    for delta in deltas:
        parameters = sum(p.numel() for p in delta.parameters())
        costs[delta.name] = (parameters, size_of(folder / delta.name))
    total = statistics(model)
    backbone = (
        total.total_parameters - total.delta_parameters,
        (data.locate("MiniLM") / "model.safetensors").stat().st_size,
    )
    rows = []
    for names in [[], *([name] for name in costs), list(costs)]:
        with composition(model).only(*names):
            logits = predict(model, texts)
        what = " + ".join(names) or "MiniLM"
        chosen = [costs[name] for name in names] or [backbone]
        parameters, size = (sum(column) for column in zip(*chosen, strict=True))
        rows.append(Row(what, accuracy(logits, labels_of(texts)), parameters, size))
    return rows, logits


def size_of(folder: Path) -> int:
    """Return the size of the files in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir())


def table(rows: Sequence[Row], trained: float) -> Table:
    """Return the rows as a table to print; `trained` is a share of all parameters."""
    caption = (
        f"{trained:.2%} of all parameters were trained.\n"
        "The trained classifier belongs to lora, and acts only with it."
    )
    drawn = Table("what acts", caption=caption, caption_justify="left")
    for column in ("test accuracy", "parameters", "on disk"):
        drawn.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row.accuracy:.3f}", f"{row.parameters:,}", f"{row.size / 1e6:.1f} MB"]
        drawn.add_row(row.what, *cells)
    return drawn


def share(
    backbone: nn.Module,
    folder: Path,
    tasks: Mapping[str, Texts],
    expected: Mapping[str, Tensor],
    console: Console,
) -> None:
    """Put both saved compositions on a new backbone, and switch between them.

    Raises:
        DeltaError: a task gives other logits than before it was saved.
    """
    console.print("\n3. Both compositions on a new MiniLM, side by side, switched for each task.\n")
    names: dict[str, list[str]] = {}
    for task in tasks:
        known = composition(backbone).names
        names[task] = [n for n in load(folder / task, backbone).names if n not in known]
    both = composition(backbone)
    drawn = Table("task", "what acts")
    for column in ("labels", "accuracy", "on disk", "logits as saved"):
        drawn.add_column(column, justify="right")
    for task in [*tasks, *tasks]:  # twice: after a switch back the logits are the same again
        with both.only(*names[task]):
            logits = predict(backbone, tasks[task])
        if not torch.equal(logits, expected[task]):
            raise DeltaError(f"the reloaded {task} compute other logits than those that were saved")
        right = accuracy(logits, labels_of(tasks[task]))
        facts = [f"{logits.size(1)}", f"{right:.3f}", f"{size_of(folder / task) / 1e6:.1f} MB"]
        drawn.add_row(task, " + ".join(names[task]), *facts, f"all {logits.numel():,}")
    console.print(drawn)


def learn_mixed(
    model: nn.Module, tasks: Mapping[str, Texts], seed: int, folder: Path, console: Console
) -> dict[str, float]:
    """Learn to sort the texts of both tasks from few: with a new LoRA, a sum and a gate.

    Each has a classifier of its own; the deltas that are on the model stay as they are.

    Returns:
        {what acts: the share of the test texts that is sorted right}.
    """
    console.print("\n4. Both tasks mixed, few texts to learn from: a gate combines what is known.")
    texts = data.mixed(list(tasks.values()), max(1, len(tasks["questions"].train) // 90))
    introduce(texts, "texts", console)
    both = composition(model)
    names = list(both.names)
    own: dict[str, Any] = {"modules_to_save": ["classifier"], "num_labels": len(texts.classes)}
    trials: dict[str, Callable[[], Delta]] = {
        "a new LoRA alone": lambda: LoraModel(model, **own),
        "the sum of the three": lambda: AverageModel(
            model, deltas=names, weights=[1.0] * len(names), **own
        ),
        "a gate over the three": lambda: GateModel(model, deltas=names, **own),
    }
    found = {}
    drawn = Table("what acts")
    for column in ("trained parameters", "test accuracy"):
        drawn.add_column(column, justify="right")
    for what, attach in trials.items():
        delta = attach()
        delta.freeze_module(exclude=[delta.name])
        with both.only(delta.name):
            train(
                model,
                texts,
                10,
                3e-3,
                seed,
                folder / "trainer",
                console,
                per_device_train_batch_size=16,
                eval_strategy="no",
            )
            found[what] = accuracy(predict(model, texts), labels_of(texts))
        drawn.add_row(what, f"{statistics(model).trainable_parameters:,}", f"{found[what]:.3f}")
        delta.detach()
    console.print("", drawn, sep="\n")
    return found
