"""Tasks to learn: texts with classes, texts to continue, or a task of the user's own."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import data
from ..errors import DeltaError, listed, shown
from .fingerprints import of_examples, of_function, short

# {name: entry in the demo's data}
BUILT_IN = {"trec": "questions", "sms": "messages", "tales": "tales"}
TALES = "tales"  # the one without classes
SHARE = 5  # a fifth of the texts is held out where nothing else is said
Batch = Mapping[str, Any]


def right(output: Any, batch: Batch) -> Tensor:
    """Return 1 for each row whose largest logit is at its label, else 0, [batch]."""
    return (output.logits.argmax(-1) == batch["labels"]).float()


def token_losses(output: Any, batch: Batch) -> Tensor:
    """Return the loss of each next token that counts, in nats, [tokens]."""
    logits, labels = output.logits[:, :-1].float(), batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses[labels != -100]


def own_loss(output: Any, batch: Batch) -> Tensor:
    """Return the loss that the model computed."""
    loss = getattr(output, "loss", None)
    if loss is None:
        raise DeltaError(
            f"the model returns a {type(output).__name__} without a loss for the keys "
            f"{list(batch)}: give Task(loss=...), a function of its output and the batch"
        )
    return loss


@dataclass
class Task:
    """A task: examples to learn from, held-out examples, and how they are measured.

    Attributes:
        name: a name for tables and files.
        train: the examples to learn from, of any type.
        test: held-out examples.
        collate: makes a batch of examples: a dict, whose entries are the model's arguments.
        measure: (the model's output, batch) -> values of the batch, [any]; the score is the mean of
            all values of the test examples.
        loss: (the model's output, batch) -> what is minimised, []. The default is `output.loss`.
        unit: what the score is called.
        higher_is_better: False for losses.
        labels: the number of classes; the deltas own a head of that size. None: no head.
        head: the full names of the modules that make the head. Empty: they are found, which needs a
            model of transformers.
        classes: the names of the classes, if they have names.
        length: the length of an example. A batch to learn from then holds examples of like length,
            so that little of it is padding. None: batches are drawn whatever the lengths are.

    Example:
        >>> import torch, opendelta
        >>> x = torch.randn(64, 4)
        >>> rows = [{"input": each, "target": each.sum()} for each in x]
        >>> task = opendelta.Task(
        ...     "sums", rows[:48], rows[48:],
        ...     collate=lambda rows: {"input": torch.stack([row["input"] for row in rows])},
        ...     measure=lambda output, batch: (output[:, 0] - batch["input"].sum(1)).abs(),
        ...     loss=lambda output, batch: (output[:, 0] - batch["input"].sum(1)).square().mean(),
        ...     unit="distance", higher_is_better=False,
        ... )
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> report = opendelta.compare(model, task, ["lora@0", "bitfit@0"], progress=False)
        >>> [row.deltas for row in report.rows]
        ['lora@0', 'bitfit@0']
    """

    name: str
    train: Sequence[Any]
    test: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    measure: Callable[[Any, Batch], Tensor]
    loss: Callable[[Any, Batch], Tensor] = own_loss
    unit: str = "score"
    higher_is_better: bool = True
    labels: int | None = None
    head: Sequence[str] = ()
    classes: Sequence[str] = field(default_factory=list)
    length: Callable[[Any], int] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not len(getattr(self, part)):
                raise DeltaError(f"task {self.name!r} has no examples in {part}=")

    @property
    def baseline(self) -> float | None:
        """Return the score of always naming the largest class; None: there are no classes."""
        if self.measure is not right:
            return None
        labels = [example["labels"] for example in self.test]
        return max(map(labels.count, set(labels))) / len(labels)

    def fingerprint(self) -> str:
        """Return a hash of the examples and of the functions, by their code."""
        functions = (self.collate, self.measure, self.loss, self.length)
        code = [of_function(each) for each in functions if each is not None]
        return short(repr((of_examples(self.train, self.test), code, self.labels, self.head)))


# ------------------------------------------------------------------------------- tasks of texts
@dataclass(frozen=True)
class Texts:
    """A task of texts, with classes or to be continued, before they are token ids.

    Attributes:
        given: "trec" or "sms", "tales" (to be continued), the path of a .csv, .tsv, .json or
            .jsonl file, a dataset of the library `datasets`, or a list of dicts.
        test: a file, dataset or list of held-out texts. None: the dataset's own split "test" or
            "validation", else a fifth of the texts.
        text: the column of the texts.
        label: the column of the classes. None: there are none, and the texts are to be continued.
        train_size: at most so many texts are learnt from.
        test_size: so many texts are held out.
        max_length: longer texts are cut to so many tokens; texts to continue are joined and cut
            into pieces of that length.
        tokenizer: one of transformers. None: the model's own.

    Example:
        >>> import opendelta
        >>> rows = [{"text": "good", "stars": 5}, {"text": "bad", "stars": 1}] * 10
        >>> texts = opendelta.Texts(rows, label="stars", test_size=4)
        >>> [len(rows) for rows in texts.splits()]
        [16, 4]
    """

    given: Any
    test: Any = None
    text: str = "text"
    label: str | None = "label"
    train_size: int | None = None
    test_size: int | None = None
    max_length: int = 128
    tokenizer: Any = None

    @property
    def name(self) -> str:
        """Return a name for tables and files."""
        if isinstance(self.given, str | Path):
            return Path(self.given).stem
        return str(getattr(getattr(self.given, "info", None), "dataset_name", None) or "task")

    @property
    def classes(self) -> str | None:
        """Return the column of the classes; None: there are none."""
        return None if self.given == TALES else self.label

    def splits(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows to learn from and those held out, in a fixed random order."""
        given, test = self.given, self.test
        if isinstance(given, Mapping):  # a DatasetDict
            if "train" not in given:
                raise DeltaError(f"the dataset has no split 'train'; it has {list(given)}")
            test = test if test is not None else given.get("test", given.get("validation"))
            given = given["train"]
        rows = rows_of(given, self.text, self.classes)
        random.Random(0).shuffle(rows)
        if test is None:
            count = len(rows) // SHARE if self.test_size is None else self.test_size
            if not 1 <= count < len(rows):
                raise DeltaError(
                    f"test_size={count} must be from 1 to {len(rows) - 1}: there are {len(rows)} "
                    "texts, and some must be left to learn from"
                )
            held, rows = rows[:count], rows[count:]
        else:
            held = rows_of(test, self.text, self.classes)
            random.Random(0).shuffle(held)
            held = held[: self.test_size]
        return rows[: self.train_size], held

    def task(self, tokenizer: Any) -> Task:
        """Return the task, with texts as token ids.

        Raises:
            DeltaError: a file, a column or a class is not as it should be.
        """
        train, test = self.splits()
        if self.classes is None:
            return _to_continue(self, train, test, tokenizer)
        return _to_classify(self, train, test, tokenizer)


def rows_of(given: Any, text: str, label: str | None) -> list[dict[str, Any]]:
    """Return rows with the columns `text` and `label` of a file, a dataset or a list."""
    if isinstance(given, str | Path):
        if str(given) in BUILT_IN:
            what = BUILT_IN[str(given)]
            data.check_packages(what)
            return [{text: line, label or "label": name} for line, name in data.read(what)]
        rows = _read(Path(given))
    elif isinstance(given, Iterable):
        rows = list(given)
    else:
        raise DeltaError(
            f"task={shown(given)} must be one of {listed(BUILT_IN)}, the path of a .csv, .tsv, "
            ".json or .jsonl file, a dataset, a list of dicts or a Task"
        )
    for row in rows[:1]:
        if not isinstance(row, Mapping):
            raise DeltaError(f"task: a row must be a dict, not {type(row).__name__}")
    for number, row in enumerate(rows, 1):
        for column in filter(None, (text, label)):
            if row.get(column) is None:
                raise DeltaError(
                    f"task: row {number} has no value in column {column!r}; its columns are "
                    f"{list(row)}: name yours by text= and label= (--text, --label)"
                )
    return [dict(row) for row in rows]


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    if not path.is_file():
        raise DeltaError(
            f"task {str(path)!r}: there is no such file, and the built-in tasks are "
            f"{listed(BUILT_IN)}"
        )
    kind = path.suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind in (".csv", ".tsv"):
                return list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","))
            if kind == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            if kind == ".json":
                rows = json.load(file)
                return rows if isinstance(rows, list) else [rows]
    except (ValueError, csv.Error, RecursionError) as error:
        raise DeltaError(f"task {str(path)!r} cannot be read as {kind[1:]}: {error}") from None
    raise DeltaError(f"task {str(path)!r} must end in .csv, .tsv, .json or .jsonl")


def _to_classify(source: Texts, train: list[Any], test: list[Any], tokenizer: Any) -> Task:
    from transformers import DataCollatorWithPadding

    labels = [row[source.label] for row in train + test]
    if any(isinstance(label, float) for label in labels):
        raise DeltaError(
            f"column {source.label!r} holds numbers with a point, and classes are texts or whole "
            "numbers; for a regression write a Task of your own"
        )
    classes = sorted(set(labels), key=lambda label: (str(type(label)), label))
    if unknown := sorted(
        {str(r[source.label]) for r in test} - {str(r[source.label]) for r in train}
    ):
        raise DeltaError(f"classes {unknown} are in no text to learn from")
    if len(classes) < 2:
        raise DeltaError(f"all texts are of the one class {classes[0]!r}")

    def examples(rows: list[Any]) -> list[dict[str, Any]]:
        texts = [str(row[source.text]) for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=source.max_length)["input_ids"]
        return [
            {"input_ids": tokens, "labels": classes.index(row[source.label])}
            for tokens, row in zip(ids, rows, strict=True)
        ]

    def length(example: dict[str, Any]) -> int:
        return len(example["input_ids"])

    return Task(
        source.name,
        examples(train),
        sorted(examples(test), key=length),
        DataCollatorWithPadding(tokenizer),
        right,
        unit="accuracy",
        labels=len(classes),
        classes=[str(each) for each in classes],
        length=length,
    )


def _to_continue(source: Texts, train: list[Any], test: list[Any], tokenizer: Any) -> Task:
    def pieces(rows: list[Any]) -> list[list[int]]:
        tokens: list[int] = []
        for ids in tokenizer([str(row[source.text]) for row in rows])["input_ids"]:
            tokens += [*ids, *[tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)]
        length = min(source.max_length, len(tokens))
        return [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]

    def collate(batch: list[list[int]]) -> Batch:
        ids = torch.tensor(batch)
        return {"input_ids": ids, "labels": ids}

    return Task(
        source.name,
        pieces(train),
        pieces(test),
        collate,
        token_losses,
        unit="loss",
        higher_is_better=False,
    )
