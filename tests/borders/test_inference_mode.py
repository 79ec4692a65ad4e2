"""What is made inside torch.inference_mode() trains later as if made outside."""

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import BitFitModel, LoraModel

pytestmark = pytest.mark.covers("Delta", "Composition.merge", "Composition.to_backbone")

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def attach(model, tmp_path):
    return LoraModel(model, modified_modules=["0"], modules_to_save=["2"])


def load(model, tmp_path):
    other = net()
    delta = attach(other, tmp_path)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    opendelta.load(tmp_path, model)


def convert(model, tmp_path):
    attach(model, tmp_path).to("float64")


def combine(model, tmp_path):
    for name in "ab":
        shake(LoraModel(model, modified_modules=["0"], name=name))
    opendelta.combine(model, {"a": 1.0, "b": -0.5})
    opendelta.composition(model)["a_b"].enable()


@pytest.mark.parametrize("make", [attach, load, convert, combine])
def test_deltas_that_are_made_inside_train(make, tmp_path):
    model = net()
    with torch.inference_mode():
        make(model, tmp_path)
        assert torch.is_inference_mode_enabled()
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    for delta in opendelta.composition(model):
        assert not any(tensor.is_inference() for tensor in delta.record.scale_tensors)
    model(X).sum().backward()
    grads = [p.grad for d in opendelta.composition(model) for p in d.parameters()]
    assert all(grad is not None for grad in grads)


def folded(model):
    shake(LoraModel(model, modified_modules=["0"]))
    shake(BitFitModel(model, modified_modules=["2"]))
    return model(X).detach()


def test_a_merged_model_trains_and_comes_back():
    model = net()
    expected = folded(model)
    before = opendelta.snapshot(model)
    with torch.inference_mode():
        opendelta.composition(model).merge()
        assert torch.allclose(model(X), expected, atol=1e-6)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    with torch.inference_mode():
        opendelta.composition(model).unmerge()
    assert opendelta.snapshot(model) == before
    model(X).sum().backward()


@pytest.mark.parametrize("make", ["to_backbone", "shared_copy"])
def test_a_copy_of_the_model_trains(make):
    model = net()
    expected = folded(model) if make == "to_backbone" else model(X)
    with torch.inference_mode():
        if make == "to_backbone":
            plain = opendelta.composition(model).to_backbone()
        else:
            plain = opendelta.shared_copy(model)
    assert torch.allclose(plain(X), expected, atol=1e-6)
    plain(X).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_check_inside_says_what_it_says_outside():
    model = net()
    LoraModel(model, modified_modules=["0"])
    with torch.inference_mode():
        assert opendelta.check(model, X).no_gradient == []
        assert opendelta.check(model).no_gradient == []


def test_gradients_stay_off_where_they_are_off():
    model = net()
    expected = folded(model)
    with torch.no_grad():
        opendelta.composition(model).merge()
        assert not torch.is_grad_enabled()
        assert torch.allclose(model(X), expected, atol=1e-6)


@torch.inference_mode()
def test_a_model_of_inference_tensors_is_merged_as_any_other():
    model = net()
    shake(LoraModel(model, modified_modules=["0"]))
    expected = model(X)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), expected, atol=1e-6)
    opendelta.composition(model).unmerge()
    assert torch.allclose(model(X), expected, atol=1e-6)
