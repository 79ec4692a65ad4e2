"""`GateModel(init="arrow")`: a gate that reads from trained LoRAs which tokens they are for."""

import pytest
import torch
from support.nets import IDS, net, shake

import opendelta
from opendelta import AdapterModel, GateConfig, GateModel, LoraModel, OptionError

pytestmark = pytest.mark.covers("GateConfig.init")


@pytest.fixture
def model():
    return net()


def experts(model, names="abc"):
    return [shake(LoraModel(model, modified_modules=["linear"], lora_r=3, name=n)) for n in names]


def test_each_token_goes_by_the_direction_that_a_lora_changes_most(model):
    loras = experts(model)
    x = torch.randn(4, 5, model.linear.in_features)
    plain = torch.nn.functional.linear(x, model.linear.weight, model.linear.bias).double()
    moe = GateModel(model, deltas=loras, top_k=2, temperature=0.5, init="arrow")
    changes = [delta.layers["linear"].delta_weight().double() for delta in loras]
    aims = torch.stack([torch.linalg.svd(change).Vh[0] for change in changes])
    logits = (x.double() @ aims.T).abs() / 0.5
    best = logits.topk(2).indices
    weights = logits.masked_fill(~torch.zeros_like(logits).scatter(-1, best, 1).bool(), -torch.inf)
    parts = torch.stack([x.double() @ change.T for change in changes], -1)
    expected = plain + (parts * weights.softmax(-1)[..., None, :]).sum(-1)
    with opendelta.watching(model) as seen:
        torch.testing.assert_close(model.linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        seen.logits(moe.name)["linear"].double(), logits, rtol=1e-5, atol=1e-5
    )


def test_it_is_saved_and_loaded_with_its_rule(model, tmp_path):
    moe = GateModel(model, deltas=experts(model), init="arrow")
    moe.freeze_module()
    expected = model(IDS)
    moe.save_finetuned(tmp_path)
    fresh = net()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh(IDS), expected)


@pytest.mark.parametrize("other", ["untrained", "adapter", "dora", "disabled", "elsewhere"])
def test_what_has_no_trained_factors_there_is_refused_by_name(model, other):
    experts(model, "a")
    if other == "adapter":
        shake(AdapterModel(model, modified_modules=["linear"], name=other))
    else:
        where = ["bare"] if other == "elsewhere" else ["linear"]
        lora = LoraModel(model, modified_modules=where, use_dora=other == "dora", name=other)
        if other != "untrained":
            shake(lora)
        if other == "disabled":
            lora.disable()
    options = {"deltas": ["a", other], "modified_modules": ["linear"], "init": "arrow"}
    message = rf"'linear': init='arrow' .*, and '{other}' is none"
    with pytest.raises(OptionError, match=message):
        opendelta.plan(model, [GateConfig(**options)])
    with pytest.raises(OptionError, match=message):
        GateModel(model, **options)
    assert opendelta.composition(model).names == ["a", other]


def test_on_an_embedding_it_is_refused(model):
    shake(LoraModel(model, modified_modules=["embedding"], name="a"))
    with pytest.raises(OptionError, match=r"'embedding': init='arrow' .*, and 'a' is none"):
        GateModel(model, deltas=["a"], init="arrow")
