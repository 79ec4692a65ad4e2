"""`delta.scale` multiplies what a delta adds: forward, backward, merged, saved, shown."""

import json

import numpy as np
import pytest
import torch
from support.nets import COPIES, IDS, copied, net, places_of, put, shake

import opendelta
from opendelta import LoraModel
from opendelta._deltas.registry import METHODS
from opendelta.author import BranchLayer, DeltaLayer, InputLayer, OutputLayer, WeightLayer
from opendelta.errors import DeltaError, DeltaLoadError, OptionError

pytestmark = pytest.mark.covers("Delta.scale")

FORMS = (BranchLayer, InputLayer, OutputLayer, WeightLayer)
SCALED = sorted(name for name, method in METHODS.items() if method.layer_class.scales)
NOT_SCALED = sorted({*METHODS} - {*SCALED})
CASES = [(name, place) for name in SCALED for place in places_of(METHODS[name])]


def own_forward(layer_class):
    """False for a forward of `opendelta.author`, which heeds the scale whatever `fold` does."""
    return not any(layer_class.forward is form.forward for form in FORMS)


def acting(name, place):
    """A network in float64, and a delta of this method that acts on one module."""
    model = net().double()
    return model, shake(put(METHODS[name], model, place))


def output_of(model, delta, place):
    """What the module called `place` gives in a forward of the whole."""
    seen = []
    handle = model.get_submodule(place).register_forward_hook(lambda *call: seen.append(call[-1]))
    model(IDS)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_scale_multiplies_what_a_delta_adds(name, place):
    model, delta = acting(name, place)
    with delta.disabled():
        before = output_of(model, delta, place)
    change = output_of(model, delta, place) - before
    assert change.abs().max() > 1e-3
    for scale in (np.float32(0.5), -1.0, 3, 0.0):
        delta.scale = scale
        assert delta.scale == scale
        now = output_of(model, delta, place)
        assert torch.allclose(now, before + scale * change, atol=1e-12)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_gradients_go_through_the_scale(name, place):
    model, delta = acting(name, place)
    loss = model(IDS).pow(2).sum()
    delta.scale = 0.5
    one, other = loss, model(IDS).pow(2).sum()
    parameter = next(p for p in delta.parameters() if p.requires_grad)
    step = torch.randn_like(parameter) * 1e-6
    (gradient,) = torch.autograd.grad(other, parameter)
    with torch.no_grad():
        parameter += step
        up = model(IDS).pow(2).sum()
        parameter -= 2 * step
        down = model(IDS).pow(2).sum()
    assert one != other
    assert torch.allclose((up - down) / 2, (gradient * step).sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        case
        for case in CASES
        if METHODS[case[0]].layer_class.fold is not DeltaLayer.fold
        if case != ("bitfit", "bare")  # that module has no bias to fold into
    ],
)
def test_what_folds_folds_with_its_scale(name, place):
    model, delta = acting(name, place)
    delta.scale = 0.5
    expected = model(IDS)
    composed = opendelta.composition(model)
    composed.merge()
    assert torch.allclose(model(IDS), expected, atol=1e-10)
    with pytest.raises(DeltaError, match=r"cannot scale .*unmerge"):
        delta.scale = 1
    composed.unmerge()
    assert torch.allclose(model(IDS), expected, atol=1e-12)


def test_a_scale_is_saved_copied_and_shown(model, lora, tmp_path):
    expected = model(IDS)
    lora.scale = 0.25
    assert "0.25 lora(x)" in opendelta.composition(model).explain("linear").formula
    assert "scale 0.25" in str(opendelta.composition(model).explain("linear"))
    assert "lora scale 0.25" in opendelta.tree(model, to="text")
    scaled = model(IDS)
    assert not torch.allclose(scaled, expected)
    lora.freeze_module()
    lora.save_finetuned(tmp_path)
    for how in COPIES:
        assert torch.equal(copied(model, how)(IDS), scaled)
    lora.detach()
    again = opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert again.scale == 0.25
    assert torch.equal(model(IDS), scaled)


def test_two_loras_of_different_scales_run_as_one(model, lora):
    other = shake(LoraModel(model, modified_modules=["linear"], name="other"), seed=2)
    lora.scale, other.scale = 0.5, -2
    with torch.no_grad():
        x = torch.randn(3, 8)
        W, b = model.linear.weight, model.linear.bias
        D = sum(d.scale * d.layers["linear"].delta_weight() for d in (lora, other))
        assert torch.allclose(model.linear(x), x @ (W + D).T + b, atol=1e-5)
    mix = opendelta.combine(model, {"lora": 1.0, "other": 1.0})
    assert torch.allclose(mix.layers["linear"].delta_weight(), D, atol=1e-5)


def test_a_delta_made_in_inference_mode_is_scaled_outside_of_it(model):
    with torch.inference_mode():
        delta = LoraModel(model, modified_modules=["linear"], name="served")
        delta.scale = 0.25
    delta.scale = 0.5
    assert [delta.scale, *delta.record.scale_tensors] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e7, "1", True, None])
def test_a_scale_is_a_number(model, lora, scale):
    with pytest.raises(OptionError, match=r"'lora'.scale=.* must be a number"):
        lora.scale = scale
    assert lora.scale == 1


@pytest.mark.parametrize("name", NOT_SCALED)
def test_methods_that_add_to_no_output_have_no_scale(model, name):
    delta = put(METHODS[name], model, places_of(METHODS[name])[0])
    with pytest.raises(OptionError, match="does not just add to an output"):
        delta.scale = 0.5
    delta.scale = 1


@pytest.mark.parametrize("name", [n for n in NOT_SCALED if own_forward(METHODS[n].layer_class)])
def test_a_method_whose_own_forward_heeds_the_scale_says_so(name):
    for place in places_of(METHODS[name]):
        model, delta = acting(name, place)
        before = output_of(model, delta, place)
        delta.record.set_scale(0.5)
        same = torch.equal(output_of(model, delta, place), before)
        assert same, f"{name} heeds strength(): set scales = True in its layer"


@pytest.mark.parametrize("scale", ["0.5", 1e7, True])
def test_a_scale_in_a_file_is_a_number(model, lora, tmp_path, scale):
    lora.freeze_module()
    lora.save_finetuned(tmp_path)
    lora.detach()
    config = json.loads((tmp_path / "config.json").read_text())
    config["deltas"][0]["scale"] = scale
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaLoadError, match=r"scale="):
        opendelta.load(tmp_path, model)
    assert opendelta.composition(model).names == []
