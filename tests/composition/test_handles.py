"""`composition(model)` gives handles to its deltas, by name or one after another."""

import pytest
from support.nets import net, small
from torch import nn

import opendelta
from opendelta import LoraModel

pytestmark = pytest.mark.covers("composition", "Composition", "DeltaError")


def test_the_composition_gives_back_the_handles_that_somebody_holds():
    model = net()
    lora = LoraModel(model, modified_modules=["linear"])
    composition = opendelta.composition(model)
    assert composition["lora"] is lora
    assert list(composition) == [lora]
    assert "lora" in composition
    assert lora in composition
    assert LoraModel(net(), modified_modules=["linear"]) not in composition
    assert len(composition) == 1
    with pytest.raises(opendelta.DeltaError, match=r"no delta 'lroa'.*nearest: 'lora'"):
        composition["lroa"]


@pytest.mark.parametrize("held", [True, False])
def test_a_composition_of_another_module_gives_whole_handles_or_says_where_to_look(held):
    wrapped = nn.Sequential(small())
    delta = LoraModel(wrapped[0], modified_modules=["0", "2"])
    if not held:
        del delta
    handle = opendelta.composition(wrapped)["lora"]
    assert handle.backbone_model is wrapped[0]
    assert list(handle.layers) == ["0", "2"]
    handle.detach()
    opendelta.assert_pristine(wrapped)
    outer = LoraModel(wrapped, modified_modules=["0.0", "0.2"], name="outer")
    if held:
        assert opendelta.composition(wrapped[0])["outer"] is outer
    else:
        del outer
        with pytest.raises(opendelta.DeltaError, match=r"attached through a module around this"):
            opendelta.composition(wrapped[0])["outer"]


def test_a_detached_delta_that_is_held_is_said_to_be_detached():
    model = net()
    delta = LoraModel(model, modified_modules=["linear"])
    delta.detach()
    for one in ("lora", delta):
        with (
            pytest.raises(opendelta.DeltaError, match=r"it is detached: call attach\(\)"),
            opendelta.composition(model).only(one),
        ):
            pass


def test_a_stranger_of_the_same_name_is_not_taken_for_our_own():
    model, other = net(), net()
    LoraModel(model, modified_modules=["linear"])
    stranger = LoraModel(other, modified_modules=["linear"])
    composition = opendelta.composition(model)
    with pytest.raises(opendelta.DeltaError, match=r"this 'lora' is a delta of another model"):
        composition.reorder([stranger])
    with pytest.raises(opendelta.DeltaError), composition.only(stranger):
        pass
    with pytest.raises(opendelta.DeltaError, match=r"must be a delta or the name of one"):
        composition.reorder([["lora"]])
