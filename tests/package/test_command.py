"""The command `opendelta` itself: help, version, and errors in one line."""

import pytest
from support.processes import python, run

import opendelta


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["Example: opendelta demo", "--version"]),
        ([], ["Example: opendelta demo", "--version"]),
        (["demo", "--help"], ["Example: opendelta demo --seed 1", "--train-size", "--epochs"]),
    ],
)
def test_help_shows_an_example_and_the_options(arguments, shown):
    result = run(*arguments)
    assert all(text in result.stdout + result.stderr for text in shown)
    assert (result.returncode == 0) == bool(arguments)


def test_it_shows_its_version():
    assert run("--version").stdout == f"opendelta {opendelta.__version__}\n"


def test_without_typer_one_line_says_how_to_install_it():
    result = python(
        "import sys; sys.modules['typer'] = None; from opendelta.cli import main; main()"
    )
    assert result.returncode == 1
    assert result.stderr == (
        "the command opendelta needs typer; install with: pip install 'opendelta[cli]'\n"
    )


def test_an_error_of_opendelta_is_one_line():
    result = run("demo", "--train-size", "5381")
    assert result.returncode == 2
    assert result.stderr.startswith("opendelta: train_size=5381 must be from 1 to 4,481")
    assert result.stderr.count("\n") == 1
