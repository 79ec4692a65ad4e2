"""Compositions as one artifact: what is saved of several deltas, and what comes back."""

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import nets
from support.models import build, logits, put_default
from support.nets import IDS, places_of, put, shake, untouched

import opendelta
from opendelta import AdapterModel, AutoDeltaConfig, AutoDeltaModel, LoraModel
from opendelta._deltas.registry import METHODS

pytestmark = pytest.mark.covers("Composition.save", "load")


def net():
    """The network of all tests, frozen, as it is while deltas train."""
    return nets.net().requires_grad_(False)


def compose(model, seed, count=5):
    """Some deltas of random methods in a random order with random switches."""
    random = np.random.default_rng(seed)
    deltas = []
    for method in random.choice(sorted(METHODS), count):
        places = places_of(METHODS[method])
        delta = put(METHODS[method], model, *random.permutation(places)[:2])
        deltas.append(shake(delta, seed=len(deltas), scale=0.1))
    for delta in deltas:
        if random.random() < 0.3:
            delta.disable()
        if random.random() < 0.3:
            delta.requires_grad_(False)
    opendelta.composition(model).reorder(list(random.permutation([d.name for d in deltas])))
    return deltas


def switches(model):
    """(name, whether it acts, which tensors train) of each delta in order."""
    return [
        (d.name, d.active, [n for n, p in d.named_parameters() if p.requires_grad])
        for d in opendelta.composition(model)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_a_composition_comes_back_bit_for_bit_with_its_switches(seed, tmp_path):
    model = net()
    compose(model, seed)
    opendelta.composition(model).save(tmp_path)
    fresh = net()
    with untouched(fresh):
        loaded = opendelta.load(tmp_path, fresh)
        assert torch.equal(fresh(IDS), model(IDS))
        assert switches(fresh) == switches(model)
        again = tmp_path / "again"
        loaded.save(again)
        assert [f.read_bytes() for f in sorted(again.iterdir())] == [
            f.read_bytes() for f in sorted(tmp_path.iterdir()) if f.is_file()
        ]
        for name in loaded.names:
            loaded[name].detach()


def test_loading_any_method_draws_no_random_numbers(tmp_path):
    model = net()
    for method in METHODS.values():
        put(method, model, *places_of(method))
    opendelta.composition(model).save(tmp_path)
    fresh = net()
    state = torch.get_rng_state()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_deltas_come_after_those_that_are_there_and_taken_names_change(tmp_path):
    model = net()
    shake(LoraModel(model, modified_modules=["linear"]))
    shake(AdapterModel(model, modified_modules=["linear"]))
    opendelta.composition(model).save(tmp_path)
    model = net()
    shake(LoraModel(model, modified_modules=["bare"]), seed=8)
    assert opendelta.load(tmp_path, model).names == ["lora", "lora_1", "adapter"]


@pytest.mark.covers("AutoDeltaModel", "AutoDeltaConfig")
def test_a_folder_of_several_deltas_is_no_single_delta(tmp_path):
    model = net()
    LoraModel(model, modified_modules=["linear"])
    AdapterModel(model, modified_modules=["linear"], name="style")
    opendelta.composition(model).save(tmp_path)
    fresh = net()
    with untouched(fresh), pytest.raises(opendelta.DeltaLoadError, match=r"holds 2 deltas: lora, "):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    with pytest.raises(opendelta.DeltaLoadError, match=r"use opendelta.load"):
        AutoDeltaConfig.from_finetuned(tmp_path)


def test_a_folder_of_one_delta_is_a_composition_too(tmp_path):
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear"]))
    delta.save_finetuned(tmp_path)
    fresh = net()
    assert opendelta.load(tmp_path, fresh).names == ["lora"]
    assert torch.equal(fresh(IDS), model(IDS))


def test_one_delta_that_does_not_fit_keeps_all_from_the_model(tmp_path):
    model = net()
    LoraModel(model, modified_modules=["linear"])
    LoraModel(model, modified_modules=["head"])
    opendelta.composition(model).save(tmp_path)
    fresh = net()
    fresh.head = torch.nn.Linear(8, 9)
    with untouched(fresh), pytest.raises(opendelta.DeltaLoadError, match=r"head.*\[3, 8\] instead"):
        opendelta.load(tmp_path, fresh)


def test_nothing_to_save_says_so(tmp_path):
    with pytest.raises(opendelta.DeltaError, match=r"no delta is attached to Net"):
        opendelta.composition(net()).save(tmp_path)
    assert not list(tmp_path.iterdir())


compositions = st.lists(
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(sorted(METHODS)),
            "active": st.sampled_from([True, True, False]),
            "trains": st.booleans(),
            "options": st.sampled_from([{}, {}, {"gate": True}, {"dtype": "float64"}]),
        }
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(facts=compositions, data=st.data())
def test_any_composition_on_any_model_is_one_artifact(name, facts, data):
    model = build(name).requires_grad_(False)
    for place, fact in enumerate(facts):
        delta = put_default(fact["method"], model, seed=place, **fact["options"])
        delta.requires_grad_(fact["trains"])
        if not fact["active"]:
            delta.disable()
    composed = opendelta.composition(model)
    composed.reorder(data.draw(st.permutations(composed.names)))
    fresh = build(name).requires_grad_(False)
    plain = logits(fresh)
    with untouched(fresh), tempfile.TemporaryDirectory() as folder:
        composed.save(folder)
        loaded = opendelta.load(folder, fresh)
        assert torch.equal(logits(fresh), logits(model))
        assert switches(fresh) == switches(model)
        for delta in data.draw(st.permutations(list(loaded))):
            delta.detach()
        assert torch.equal(logits(fresh), plain)
