"""README and CONTRIBUTING are true: their Python runs, and prints what they say."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from support import ROOT, TESTS
from support.nets import IDS, net, shake, untouched

import opendelta
from opendelta import AutoDeltaModel, LoraModel
from opendelta._deltas.registry import METHODS

README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """`from_pretrained("roberta-base")` gives a model of that configuration, in an empty folder."""

    def from_pretrained(name):
        assert name == "roberta-base"
        torch.manual_seed(0)
        return transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
            )
        ).eval()

    auto = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)


def blocks(path=README):
    return BLOCK.findall(path.read_text())


def contributed():
    """The Python of CONTRIBUTING: a whole method, and a layer that changes the weight."""
    return [c for language, c in blocks(README.parent / "CONTRIBUTING.md") if language == "python"]


@pytest.mark.slow
def test_the_examples_run_and_print_what_the_readme_says(offline, capsys):
    names = {}
    printed = compared = 0
    for language, code in blocks():
        if language == "python":
            printed = None
            exec(compile(code, str(README), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text" and printed:
            assert textwrap.dedent(code).strip() == printed.strip()
            printed, compared = None, compared + 1
    assert compared == 3


def test_the_set_up_is_two_commands():
    (commands,) = [code for language, code in blocks() if language == "sh"]
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == [
        "make demo",
        "make test",
    ]


def test_it_credits_its_predecessor_and_says_that_it_shares_no_code():
    text = " ".join(README.read_text().split())
    for fact in ("thunlp/OpenDelta", "2307.03084", "2203.06904", "shares no code"):
        assert fact in text


@pytest.mark.covers("Delta", "DeltaConfig", "InputLayer", "option")
def test_the_method_in_contributing_is_a_whole_method(tmp_path):
    code, _ = contributed()
    assert len([line for line in code.splitlines() if line.strip()]) < 45
    names = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    del METHODS["scale"]
    model = net()
    with untouched(model):
        delta = names["ScaleModel"](model, modified_modules=["linear"], groups=4)
        outer = LoraModel(model, modified_modules=["linear"])
        assert (
            opendelta.composition(model).explain("linear").formula
            == "y = linear(scale(x)) + lora(x)"
        )
        shake(delta)
        expected = model(IDS)
        delta.freeze_module()
        delta.save_finetuned(tmp_path)
        outer.detach()
        delta.detach()
    METHODS["scale"] = names["ScaleModel"]
    try:
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    finally:
        del METHODS["scale"]
    assert torch.equal(model(IDS), expected)
    with pytest.raises(opendelta.OptionError, match=r"groups=3 must be a multiple of 2"):
        names["ScaleConfig"](groups=3)
    with pytest.raises(opendelta.OptionError, match=r"'linear': groups=6 does not divide 8"):
        names["ScaleModel"](model, modified_modules=["linear"], groups=6)


@pytest.mark.covers("WeightLayer")
def test_the_layer_in_contributing_that_changes_the_weight_folds():
    names = {}
    for code in contributed():
        exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    del METHODS["scale"]

    class DenseModel(names["ScaleModel"]):
        delta_type = "dense"
        layer_class = names["DenseLayer"]

    del METHODS["dense"]
    model = net()
    plain = model(IDS)
    with untouched(model):
        delta = DenseModel(model, modified_modules=["linear"])
        assert torch.equal(model(IDS), plain)
        for layer in delta.layers.values():
            torch.nn.init.normal_(layer.D)
        expected = model(IDS)
        assert not torch.allclose(expected, plain)
        opendelta.composition(model).merge()
        torch.testing.assert_close(model(IDS), expected)
        opendelta.composition(model).unmerge()
        delta.detach()


@pytest.mark.slow
def test_the_method_in_contributing_passes_the_contract_from_outside(tmp_path):
    code, _ = contributed()
    (tmp_path / "contributed.py").write_text(code)
    contract = str(TESTS / "contract" / "test_methods.py")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", contract, "-k", "scale"),
            *("-p", "contributed", "-p", "no:cacheprovider", "-p", "no:xdist"),
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 60
