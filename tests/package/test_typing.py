"""Type checkers and editors know every option: programs right and wrong, and the stubs."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import write_stubs
from torch import nn

import opendelta
from opendelta import methods

ROOT = Path(__file__).parents[2]
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
LoraModel(net, lora_rank=4)  # wrong: lora_rank
LoraModel(net, lora_r="four")  # wrong: int
AdapterModel(net, lora_r=4)  # wrong: lora_r
LoraModel(net, init="zeros")  # wrong: init
LoraModel(net, 8, 16, 0.0, ["query"], None, None, None, False, True)  # wrong: positional
LoraModel(net).config.bottleneck_dim  # wrong: bottleneck_dim
"""
WRONG = [n for n, line in enumerate(PROGRAM.splitlines(), 1) if "# wrong" in line]


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_mypy_finds_the_wrong_calls_and_no_others(program):
    command = [TOOLS / "mypy", "--no-incremental", "--show-error-codes", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=program.parent)
    errors = {int(n) for n in re.findall(r"^program.py:(\d+): error", done.stdout, re.MULTILINE)}
    assert sorted(errors) == WRONG, done.stdout + done.stderr


def test_pyright_finds_the_wrong_calls_and_no_others(program):
    command = [TOOLS / "pyright", "--outputjson", "--pythonpath", sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=program.parent)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = {d["range"]["start"]["line"] + 1 for d in found if d["severity"] == "error"}
    assert sorted(errors) == WRONG, done.stdout


def test_the_stubs_are_those_of_the_configs():
    message = "the options of a method changed: run `python tools/write_stubs.py`"
    assert write_stubs.FILE.read_text(encoding="utf-8") == write_stubs.text(), message


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


PLACES = "modified_modules exclude_modules unfrozen_modules common_structure interactive_modify"
LORA_PLACES = "modified_modules unfrozen_modules exclude_modules common_structure"
# The arguments of OpenDelta 0.3.2's classes by position, after the backbone and without `backend`.
ORDER_OF_0_3 = {
    "AdapterModel": f"bottleneck_dim non_linearity {PLACES}",
    "BitFitModel": PLACES,
    "CompacterModel": f"{PLACES} reduction_factor non_linearity phm_c_init hypercomplex_division "
    "learn_phm hypercomplex_nonlinearity shared_phm_rule factorized_phm shared_W_phm "
    "factorized_phm_rule phm_rank phm_init_range kronecker_prod use_bias_up_sampler "
    "use_bias_down_sampler",
    "LoraModel": f"lora_r lora_alpha lora_dropout {LORA_PLACES} interactive_modify",
    "LowRankAdapterModel": "reduction_factor non_linearity low_rank_w_init low_rank_rank " + PLACES,
    "ParallelAdapterModel": f"bottleneck_dim non_linearity {PLACES}",
    "PrefixModel": f"prefix_token_num reparameterize embed_dim mid_dim {PLACES}",
}


@pytest.mark.parametrize("name", ORDER_OF_0_3)
def test_options_by_position_have_the_order_of_opendelta_0_3(name):
    parameters = inspect.signature(getattr(opendelta, name)).parameters
    by_position = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["backbone_model", *ORDER_OF_0_3[name].split()]


def test_options_by_position_reach_their_names():
    delta = opendelta.LoraModel(_net(), 2, 4, 0.1, ["0"], ["2"])
    assert vars(delta.config).items() >= {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}.items()
    assert (delta.modified_modules, delta.unfrozen_modules) == (["0"], ["2"])
    with pytest.raises(opendelta.OptionError, match=r"at most 8 options by position"):
        opendelta.LoraModel(_net(), 2, 4, 0.1, ["0"], None, None, None, False, True)


def _net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
