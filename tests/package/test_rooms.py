"""Refused by `make lint`: circles, arrows that run up, private access, tests of a layer's class."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lint_budget
import lint_rooms
import pytest
from support import ROOT


@pytest.fixture
def house(tmp_path):
    """A copy of the package to break."""
    shutil.copytree(ROOT / "opendelta", tmp_path / "opendelta")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def append(house, file, line):
    path = house / "opendelta" / file
    path.write_text(f"{path.read_text() if path.exists() else ''}\n\n{line}\n")


def contracts(house):
    """The exit code and the output of import-linter."""
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=house, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_the_package_keeps_its_contracts(house):
    code, output = contracts(house)
    assert code == 0, output
    assert lint_rooms.broken() == []


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("_sites/stack.py", "from .routed import Routed", "No circles BROKEN"),
        ("_modules/kinds.py", "from .._layers.base import DeltaLayer", "Rooms.* BROKEN"),
        (
            "_deltas/order.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from .._handles.delta import Delta",
            "Rooms.* BROKEN",
        ),
        ("_show/tree.py", "from .._deltas.base import BaseDelta", "Rooms.* BROKEN"),
        ("flat.py", "x = 1", "not listed as layers:\\s+- opendelta.flat"),
    ],
)
def test_an_import_that_runs_up_or_round_is_refused(house, file, line, wrong):
    append(house, file, line)
    code, output = contracts(house)
    assert code == 1
    assert re.search(wrong, output)


REFUSED = [  # (a room, lines in a file there, what is wrong with them)
    ("_verbs", "from .._sites.merged import _float_of", "private '_float_of'"),
    ("_verbs", "x = DeltaLayer()._gated", "private '_gated'"),
    ("_verbs", "x = Handles()._known", "private '_known'"),
    ("_verbs", "x = isinstance(1, DeltaLayer)", "isinstance of DeltaLayer"),
    ("_verbs", "x = issubclass(type(1), DeltaLayer)", "isinstance of DeltaLayer"),
    ("_sites", "x = isinstance(1, int | BranchEnd)", "isinstance of BranchEnd"),
    (
        "_verbs",
        "from .._layers.base import DeltaLayer as D\nx = isinstance(1, (int, D))",
        "isinstance of DeltaLayer",
    ),
    ("_verbs", "x = type(1) is DeltaLayer", "isinstance of DeltaLayer"),
    ("_verbs", "match 1:\n    case DeltaLayer():\n        x = 1", "isinstance of"),
    ("_verbs", "from .._sites.swap import _cache", "private '_cache'"),
    ("_verbs", "from opendelta._sites.swap import _cache", "private '_cache'"),
    ("_verbs", "import warnings\nwarnings.warn('', stacklevel=2)", "errors.warn"),
    ("_verbs", "import warnings\nwarnings.warn('', UserWarning, 2)", "errors.warn"),
    ("_verbs", "from warnings import warn", "errors.warn"),
    ("_verbs", "import warnings as w\nw.warn('', stacklevel=2)", "errors.warn"),
    ("_verbs", "async def f():\n    import opendelta.names", "needs a reason"),
    ("_verbs", "def f():\n    import opendelta.names  # start-up:", "needs a reason"),
    ("_verbs", "def f():\n    from .merging import merge", "needs a reason"),
    ("_verbs", 'def f():\n    """What it gives."""', "names no thing"),
    ("_verbs", 'async def f():\n    """Those of it."""', "names no thing"),
    ("_verbs", 'def f():\n    """Whether a, or b."""', "names no thing"),
]


def test_what_a_file_may_not_do_is_refused(house):
    files = [f"{room}/case_{number}.py" for number, (room, *_) in enumerate(REFUSED)]
    for file, (_, lines, _) in zip(files, REFUSED, strict=True):
        append(house, file, lines)
    problems = lint_rooms.broken(house / "opendelta")
    assert len(problems) == len(REFUSED)
    for file, (_, _, wrong) in zip(files, REFUSED, strict=True):
        (problem,) = [each for each in problems if each.startswith(f"opendelta/{file}:")]
        assert wrong in problem


def test_a_room_that_grew_is_refused(monkeypatch, tmp_path):
    budgets = lint_budget.room_lines()
    assert budgets.keys() == json.loads(lint_budget.ROOMS.read_text()).keys()
    monkeypatch.setattr(lint_budget, "ROOMS", tmp_path / "rooms.json")
    lint_budget.ROOMS.write_text(json.dumps(budgets))
    assert lint_budget.broken() == []
    lint_budget.ROOMS.write_text(json.dumps({**budgets, "_sites": budgets["_sites"] - 1}))
    (problem,) = lint_budget.broken()
    assert "opendelta/_sites" in problem
    lint_budget.ROOMS.write_text(json.dumps({k: n for k, n in budgets.items() if k != "cli"}))
    (problem,) = lint_budget.broken()
    assert "cli" in problem


def test_each_room_says_what_it_owns_and_who_may_import_it():
    for folder in sorted((ROOT / "opendelta").iterdir()):
        if (folder / "__init__.py").exists():
            text = (folder / "__init__.py").read_text()
            assert "import" in text.split('"""')[1], folder.name


def test_no_function_shadows_a_module():
    import opendelta

    for name in opendelta.__all__:
        assert not (ROOT / "opendelta" / name).exists(), name
        assert not (ROOT / "opendelta" / f"{name}.py").exists(), name
