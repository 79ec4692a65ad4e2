"""What is made inside torch.autocast() is computed in its own dtype, as if made outside."""

from functools import partial

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import HRAModel, LohaModel, LoraModel, OFTModel, VeraModel, composition

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone", "combine")

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
METHODS = [LoraModel, partial(LoraModel, use_dora=True), OFTModel, HRAModel, VeraModel, LohaModel]
INSIDE = {"device_type": "cpu", "dtype": torch.bfloat16}


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.3 * super().forward(x)


def net(cls=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(cls(8, 8, bias=cls is nn.Linear))


def merged(model):
    composition(model).merge()
    return model


def plain(model):
    return composition(model).to_backbone()


def combined(model):
    model.both = opendelta.combine(model, {composition(model).names[0]: 1.0})
    with torch.autocast("cpu", enabled=False), composition(model).only(model.both):
        return plain(model)


@pytest.mark.parametrize("verb", [merged, plain, combined])
@pytest.mark.parametrize("method", METHODS)
def test_changes_of_a_weight_have_its_precision(method, verb):
    outputs = []
    for inside in (False, True):
        model = net()
        with torch.autocast(**INSIDE, enabled=inside):
            shake(method(model, modified_modules=["0"]))
            assert torch.is_autocast_enabled("cpu") is inside
            made = verb(model)
        outputs.append(made(X))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("verb", [merged, plain])
def test_a_factor_is_found_inside(verb):
    model = net(Scaled)
    shake(LoraModel(model, modified_modules=["0"]))
    before = model(X)
    with torch.autocast(**INSIDE):
        made = verb(model)
    assert torch.allclose(made(X), before, atol=1e-6)


def test_a_forward_inside_sees_the_merge():
    model = net()
    shake(LoraModel(model, modified_modules=["0"]))
    with torch.autocast(**INSIDE):
        before = model(X)
        composition(model).merge()
        assert torch.allclose(model(X), before, atol=0.1)
        composition(model).unmerge()
        assert torch.equal(model(X), before)


def test_a_check_runs_as_the_training_does():
    model = net().bfloat16()
    LoraModel(model, modified_modules=["0"])
    with torch.autocast(**INSIDE):
        assert not opendelta.check(model, X).unreached
