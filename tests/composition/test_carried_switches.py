"""`switches` and `load_switches` bring along what no state dict holds."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.nets import IDS, net, shake
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, composition

pytestmark = pytest.mark.covers("Composition.switches", "Composition.load_switches")


@pytest.fixture
def model():
    model = net()
    for seed, method in enumerate((LoraModel, AdapterModel)):
        shake(method(model, modified_modules=["linear"]), seed=seed)
    return model


def test_a_checkpoint_with_switches_brings_back_the_outputs(model, tmp_path):
    composed = composition(model)
    composed["lora"].scale = 0.1  # no float32
    composed["adapter"].disable()
    expected = model(IDS)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file(composed.switches(), tmp_path / "switches.safetensors")
    again = net(seed=1)
    LoraModel(again, modified_modules=["linear"])
    AdapterModel(again, modified_modules=["linear"])
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not torch.allclose(again(IDS), expected)
    composition(again).load_switches(load_file(tmp_path / "switches.safetensors"))
    assert torch.equal(again(IDS), expected)
    assert [(d.active, d.scale) for d in composition(again)] == [(True, 0.1), (False, 1)]


def test_an_average_follows_the_switches(model):
    ema = torch.optim.swa_utils.AveragedModel(model)
    composition(model)["lora"].scale = -2
    assert not torch.allclose(ema(IDS), model(IDS))
    composition(ema.module).load_switches(composition(model).switches())
    ema.update_parameters(model)
    torch.testing.assert_close(ema(IDS), model(IDS))


def test_the_order_comes_along_in_a_file_and_to_an_average(model, tmp_path):
    IA3Model(model, modified_modules=["linear"])
    shake(composition(model)["ia3"], seed=2)
    ema = torch.optim.swa_utils.AveragedModel(model)
    for order in itertools.permutations(("lora", "adapter", "ia3")):
        composition(model).reorder(order)
        expected = model(IDS)
        save_file(composition(model).switches(), tmp_path / "switches.safetensors")
        composition(ema.module).load_switches(load_file(tmp_path / "switches.safetensors"))
        assert composition(ema.module).names == [*order]
        assert torch.equal(ema(IDS), expected)


def test_switches_that_do_not_fit_change_nothing(model):
    composed = composition(model)
    IA3Model(model, modified_modules=["linear"])
    before, good = composed.switches(), composed.switches()
    good["adapter.active"] = torch.tensor(False)
    for key, value, error in (
        ("ia3.scale", 0.5, opendelta.OptionError),
        ("adapter.scale", float("nan"), opendelta.OptionError),
        ("adapter.position", 0, opendelta.OptionError),
        ("adapter.position", 0.5, opendelta.OptionError),
    ):
        with pytest.raises(error):
            composed.load_switches({**good, key: torch.tensor(value)})
        assert composed.switches() == before
    with pytest.raises(
        opendelta.DeltaError, match=r"missing are \['ia3\.scale'\], .* \['x\.scale'\]"
    ):
        composed.load_switches(
            {k.replace("ia3.scale", "x.scale"): value for k, value in good.items()}
        )
    composed["ia3"].detach()
    with composed.only("lora"):
        composed.merge("lora")
    switches = composed.switches()
    composed.load_switches(switches)
    with pytest.raises(opendelta.DeltaError, match="merged"):
        composed.load_switches({**switches, "lora.active": torch.tensor(False)})
    with pytest.raises(opendelta.DeltaError, match="cannot move deltas"):
        composed.load_switches(
            {**switches, "lora.position": torch.tensor(1), "adapter.position": torch.tensor(0)}
        )
    assert composed.switches() == switches


@pytest.mark.covers("Delta.save_finetuned")
def test_a_detached_delta_is_saved_as_it_is_inside_a_block_of_others(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    other, detached = (LoraModel(model, modified_modules=["0"], name=name) for name in "ab")
    detached.freeze_module()
    detached.detach()
    with opendelta.composition(model).only(other):
        detached.save_finetuned(tmp_path)
    fresh = nn.Sequential(nn.Linear(4, 4))
    assert opendelta.load(tmp_path, fresh, check_backbone=False)["b"].active


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("lora.scale", torch.ones(2), r"lora\.scale must be one real number"),
        ("lora.active", torch.ones(2), r"lora\.active must be one real number"),
        ("lora.scale", torch.tensor(1 + 2j), "must be one real number"),
        ("lora.scale", torch.empty((), device="meta"), "must be one real number with a value"),
        ("lora.scale", "big", "must be one real number"),
        ("lora.active", torch.tensor(0.3), r"lora\.active is 0\.3 and must be 0 or 1"),
    ],
)
def test_values_that_are_no_switches_are_refused_by_name(model, key, value, why):
    composed = composition(model)
    before = composed.switches()
    with pytest.raises(opendelta.OptionError, match=why):
        composed.load_switches({**before, key: value})
    with pytest.raises(opendelta.OptionError, match=r"switches=\[1\] must be"):
        composed.load_switches([1])
    assert composed.switches() == before
