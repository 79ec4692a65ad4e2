"""Modules that get their sizes in their first forward, beside a delta."""

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

import opendelta
from opendelta import DeltaError, LoraModel, SiteError, composition

pytestmark = pytest.mark.covers("Delta.freeze_module", "snapshot", "Composition.save")

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))


def test_a_lazy_module_is_frozen_and_freed_before_its_first_forward():
    model = made()
    delta = LoraModel(model, modified_modules=["0"])
    delta.freeze_module()
    assert isinstance(model[1].weight, UninitializedParameter)
    model(X).sum().backward()
    assert not model[1].weight.requires_grad
    assert model[1].weight.grad is None
    delta.detach()
    assert model[1].weight.requires_grad


@pytest.mark.filterwarnings("ignore::opendelta.UnsavedWarning")
def test_a_model_with_a_lazy_module_is_saved_loaded_and_compared(tmp_path):
    model, fresh = made(), made()
    before = opendelta.snapshot(model)
    delta = LoraModel(model, modified_modules=["0"])
    composition(model).save(tmp_path)
    opendelta.load(tmp_path, fresh)
    composition(model).to_backbone()
    delta.detach()
    opendelta.assert_pristine(model, like=before)
    model(X)
    with pytest.raises(opendelta.PristineError, match=r"'1'"):
        opendelta.assert_pristine(model, like=before)


def test_what_needs_its_values_is_refused(tmp_path):
    model = made()
    with pytest.raises(SiteError, match=r"modules_to_save='1': .*run the model once"):
        LoraModel(model, modified_modules=["0"], modules_to_save=["1"])
    opendelta.assert_pristine(model)
    delta = LoraModel(model, modified_modules=["0"], unfrozen_modules=["1"])
    delta.freeze_module()
    with pytest.raises(DeltaError, match=r"1\.weight is to be saved .*run the model once"):
        composition(model).save(tmp_path)
    model(X)
    composition(model).save(tmp_path)
