"""Type checkers and editors know every option: programs right and wrong, and the stubs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import write_stubs
from support import ROOT

import opendelta
from opendelta import methods

TOOLS = Path(sys.executable).parent
PROGRAM = """\
import torch
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraConfig, LoraModel, composition


class Net(nn.Module):
    def save_pretrained(self, folder: str) -> None: ...


net = Net()
rank: int = LoraModel(net).config.lora_r
LoraModel(net, 8, 16, 0.0, ["query"])
LoraModel(net, modified_modules="fc2", dtype=torch.bfloat16, init="pissa")
AdapterModel(net, 24, "relu", ["fc2"], layer_norm="before")
LoraConfig(lora_r=4, modified_modules=["fc2"])
composition(net).to_backbone().save_pretrained("folder")
opendelta.load("folder", net).model.save_pretrained("folder")
with opendelta.route(net, ["lora", ["lora", "adapter"], None]) as routed:
    names: list[str] = routed.names
report = opendelta.load("folder", net, strict=False)
problem: str | None = report.problem
opendelta.combine(net, {"a": 1.0}, "dare_ties", density=0.5)
opendelta.combine(net, {"a": 1.0}, how="linaer")  # wrong: how
LoraModel(net, lora_rank=4)  # wrong: lora_rank
LoraModel(net, lora_r="four")  # wrong: int
AdapterModel(net, lora_r=4)  # wrong: lora_r
LoraModel(net, init="zeros")  # wrong: init
LoraModel(net, 8, 16, 0.0, ["query"], None, None, None, False, True)  # wrong: positional
LoraModel(net).config.bottleneck_dim  # wrong: bottleneck_dim
"""
STAR = f"""\
from torch import nn

from opendelta import *

names = [
    {", ".join(opendelta.__all__)},
]
rank: int = LoraModel(nn.Linear(1, 1)).config.lora_r
pattern: str | None = AddressError("no").pattern
own_version()  # wrong: no public name
"""
WRONG = {
    text: [n for n, line in enumerate(text.splitlines(), 1) if "# wrong" in line]
    for text in (PROGRAM, STAR)
}


@pytest.fixture
def programs(tmp_path):
    """{file: its lines that are wrong}, in one folder, so that a checker reads the package once."""
    paths = {tmp_path / "names.py": PROGRAM, tmp_path / "star.py": STAR}
    for path, text in paths.items():
        path.write_text(text)
    return {path.name: WRONG[text] for path, text in paths.items()}


def test_mypy_finds_the_wrong_calls_and_no_others(programs, tmp_path):
    settings = ["--config-file", ROOT / "pyproject.toml"]  # so that what `make lint` read is known
    settings += ["--cache-dir", ROOT / ".mypy_cache", "--show-error-codes"]
    command = [TOOLS / "mypy", *settings, *(tmp_path / name for name in programs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    errors = {name: set() for name in programs}
    for name, line in re.findall(r"(\w+\.py):(\d+): error", done.stdout):
        errors[name].add(int(line))
    assert {name: sorted(lines) for name, lines in errors.items()} == programs, done.stdout


def test_pyright_finds_the_wrong_calls_and_no_others(programs, tmp_path):
    command = [TOOLS / "pyright", "--outputjson", "--pythonpath", sys.executable, *programs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = {name: set() for name in programs}
    for found in json.loads(done.stdout)["generalDiagnostics"]:
        if found["severity"] == "error":
            errors[Path(found["file"]).name].add(found["range"]["start"]["line"] + 1)
    assert {name: sorted(lines) for name, lines in errors.items()} == programs, done.stdout


def test_the_stubs_are_those_of_the_configs():
    message = "a method or an error changed: run `python tools/write_stubs.py`"
    for file, room in write_stubs.FILES.items():
        assert file.read_text(encoding="utf-8") == write_stubs.text(room), message
    assert write_stubs.PACKAGE.read_text(encoding="utf-8") == write_stubs.package(), message


def test_every_file_of_a_method_is_imported_where_the_methods_are_listed():
    folder = Path(methods.__file__).parent
    text = Path(methods.__file__).read_text(encoding="utf-8")
    for path in folder.glob("[!_]*.py"):
        assert f"from .{path.stem} import " in text, (
            f"opendelta/methods/{path.name} is no method yet: import its config and its model in "
            "opendelta/methods/__init__.py"
        )
    for name in methods.__all__:
        assert getattr(opendelta, name) is getattr(methods, name)
        assert name in opendelta.__all__
