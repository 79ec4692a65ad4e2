"""Deltas on quantised backbones: bitsandbytes and torchao, for real."""

import copy

import pytest
import torch
from support.nets import shake
from support.quantised import BACKBONES, X, torchao, with_bitsandbytes, with_torchao

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel
from opendelta._modules.tensors import in_full

pytestmark = pytest.mark.covers("Delta.attach", "Delta.detach")


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_deltas_act_train_and_leave(kind):
    model = BACKBONES[kind]()
    plain, keys = model(X), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    deltas = [
        shake(method(model, modified_modules=["up", "down"]), scale=0.1)
        for method in (LoraModel, IA3Model, AdapterModel)
    ]
    assert {p.dtype for delta in deltas for p in delta.parameters()} == {torch.float32}
    acting = model(X)
    assert not torch.allclose(acting, plain)
    acting.sum().backward()
    assert all(p.grad.abs().sum() > 0 for delta in deltas for p in delta.parameters())
    assert torch.allclose(copy.deepcopy(model)(X), acting, atol=1e-5)
    assert set(keys) < set(model.state_dict())
    for delta in deltas:
        delta.detach()
    assert torch.equal(model(X), plain)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys


@pytest.mark.covers("LostGradientWarning")
def test_a_kind_that_loses_gradients_is_warned_of():
    model = with_torchao(torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(
        opendelta.LostGradientWarning, match=r"'up' is quantised so that no gradient"
    ):
        LoraModel(model, modified_modules=["down"])


@pytest.mark.covers("unreached")
def test_trying_for_gradients_runs_no_delta():
    model = BACKBONES["torchao int8"]()
    LoraModel(model, modified_modules=["up"])
    AdapterModel(model, modified_modules=["down"])
    assert opendelta.unreached(model) == ["up.deltas.lora", "down.deltas.adapter"]


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_merge_is_the_same_after_a_forward_that_reorders_the_weight(bits):
    """On CPUs with bfloat16 instructions, bitsandbytes packs a weight of 4 bits in a forward."""
    merged = []
    for ran in (False, True):
        model = with_bitsandbytes(bits).eval()
        shake(LoraModel(model, modified_modules=["up"]))
        if ran:
            with torch.no_grad():
                model(X)
        opendelta.composition(model).merge()
        merged.append(in_full(model.up, "weight"))
    off = (merged[0] - merged[1]).norm() / merged[0].norm()
    assert off < 0.01  # the packed scales have 16 bits


@pytest.mark.covers("Composition.merge", "Composition.unmerge")
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_a_weight_that_changed_while_it_was_merged_is_not_put_back(kind):
    model, other = BACKBONES[kind](), BACKBONES[kind]()
    shake(LoraModel(model, modified_modules=["up"]))
    shake(LoraModel(other, modified_modules=["up"]), seed=2)
    opendelta.composition(other).merge()
    composition = opendelta.composition(model)
    for changed in (False, True):
        composition.merge()
        with torch.no_grad():
            model(X)
            model(X)
            if changed:
                model.up.weight.copy_(other.up.weight)
                break
        composition.unmerge()
    with pytest.raises(opendelta.DeltaError, match=r"up\.weight was changed after the merge"):
        composition.unmerge()
