"""`composition(model)` gives handles to its deltas, by name or one after another."""

import copy
import json
import pickle

import pytest
from support.nets import IDS, net, small
from torch import nn

import opendelta
from opendelta import LoraModel
from opendelta.integrations.trl import reference

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


TAKING = {
    "merge": lambda model, delta: opendelta.composition(model).merge(delta),
    "[]": lambda model, delta: opendelta.composition(model)[delta],
    "route": lambda model, delta: opendelta.route(model, [delta]).__enter__(),
    "parallel": lambda model, delta: opendelta.parallel(model, [delta], x=IDS),
    "combine": lambda model, delta: opendelta.combine(model, {delta: 1.0}),
    "optimizer_groups": lambda model, delta: opendelta.optimizer_groups(model, {delta: {"lr": 1}}),
    "deltas=": lambda model, delta: opendelta.AverageModel(model, deltas=["b", delta]),
    "a config's deltas=": lambda model, delta: opendelta.AverageModel.from_config(
        opendelta.AverageConfig(deltas=[delta]), model
    ),
    "plan": lambda model, delta: opendelta.plan(model, opendelta.AverageConfig(deltas=[delta])),
    "reference": lambda model, delta: reference(model, delta),
    "attach(after=)": lambda model, delta: opendelta.composition(model)["b"].attach(after=delta),
}


@pytest.mark.parametrize("verb", TAKING)
def test_no_verb_takes_a_stranger_of_the_same_name(verb):
    model, other = net(), net()
    for name in "ab":
        LoraModel(model, modified_modules=["linear"], name=name)
    stranger = LoraModel(other, modified_modules=["linear"], name="a")
    before = opendelta.snapshot(model)
    with pytest.raises(opendelta.DeltaError, match=r"this 'a' is a delta of another model"):
        TAKING[verb](model, stranger)
    assert opendelta.snapshot(model) == before
    assert opendelta.composition(model).names == ["a", "b"]


def test_a_config_copies_the_names_of_deltas_without_the_deltas():
    model = net()
    lora = LoraModel(model, modified_modules=["linear"])
    config = opendelta.AverageConfig(deltas=[lora])
    mean = opendelta.AverageModel.from_config(config, model)
    for each in (config, mean.config):
        for copied in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert copied.deltas == ["lora"]
            assert type(copied.deltas[0]) is str
        assert json.loads(each.to_json_string())["deltas"] == ["lora"]
