"""What the package promises as a whole: budgets, imports, public names."""

import subprocess
import sys
from pathlib import Path

import lint_budget
import pytest

import opendelta

SOURCE = Path(opendelta.__file__).parent
METHOD_FILES = [p for p in (SOURCE / "methods").glob("*.py") if p.name != "__init__.py"]


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.stem)
def test_a_method_is_one_short_file(path):
    assert lint_budget.code_lines(path) <= 60


def test_functions_are_short():
    long = [
        f"{path.name}:{line} {name} has {count} code lines"
        for path in SOURCE.rglob("*.py")
        for name, line, count in lint_budget.functions(path)
        if count > 40
    ]
    assert not long


def test_every_file_says_what_it_owns():
    for path in SOURCE.rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def test_importing_it_imports_no_heavy_library():
    script = (
        "import sys, opendelta; "
        "print(sorted({'transformers', 'accelerate', 'peft', 'typer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_every_public_name_is_documented():
    for name in opendelta.__all__:
        assert getattr(opendelta, name).__doc__, name


def test_the_version_is_that_of_the_installed_package():
    assert opendelta.__version__.startswith("1.0.0")
