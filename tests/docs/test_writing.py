"""The method and the block that the pages write are whole, and keep what every method promises."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support import ROOT, TESTS
from support.nets import IDS, net, shake, untouched

import opendelta
from opendelta import AutoDeltaModel, LoraModel


def python(page):
    """The Python of a page, block by block."""
    text = (ROOT / "docs" / "how-to" / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


METHOD, BLOCK = python("write_a_method.md"), python("write_a_block.md")


@pytest.mark.covers("Delta", "DeltaConfig", "InputLayer", "option")
def test_the_method_of_the_page_is_a_whole_method(tmp_path):
    code = METHOD[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 45
    names = {}
    exec(compile(code, "the page", "exec"), names)
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
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert torch.equal(model(IDS), expected)
    with pytest.raises(opendelta.OptionError, match=r"groups=3 must be a multiple of 2"):
        names["ScaleConfig"](groups=3)
    with pytest.raises(opendelta.OptionError, match=r"'linear': groups=6 does not divide 8"):
        names["ScaleModel"](model, modified_modules=["linear"], groups=6)


@pytest.mark.covers("WeightLayer")
def test_the_layer_of_the_page_that_changes_the_weight_folds():
    names = {}
    for code in (METHOD[0], METHOD[-1]):
        exec(compile(code, "the page", "exec"), names)

    class DenseModel(names["ScaleModel"]):
        delta_type = "dense"
        layer_class = names["DenseLayer"]

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
def test_the_method_of_the_page_passes_the_contract_from_outside(tmp_path):
    code = METHOD[0]
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


@pytest.mark.covers("Block", "BlockLayer")
def test_the_block_of_the_page_is_a_whole_block():
    code, names = BLOCK[0], {}
    exec(compile(code, "the page", "exec"), names)
    model, x = net(), torch.randn(2, 3, 8)
    with untouched(model):
        a, b = (
            shake(LoraModel(model, modified_modules=["linear"], name=n), i)
            for i, n in enumerate("ab")
        )
        outs = []
        for chosen in ([], [a], [b]):
            with opendelta.composition(model).only(*chosen):
                outs.append(model.linear(x))
        h, *z = outs[0], outs[1] - outs[0], outs[2] - outs[0]
        block = names["SwitchesModel"](model, deltas=["a", "b"], sharpness=2.0)
        torch.testing.assert_close(model.linear(x), h + (z[0] + z[1]) / 2)
        g = (2 * x @ shake(block).layers["linear"].w.T).sigmoid()
        expected = h + g[..., :1] * z[0] + g[..., 1:] * z[1]
        torch.testing.assert_close(model.linear(x), expected)
        for delta in (a, block, b):
            delta.detach()
