"""`freeze_module`: what trains afterwards, and what the state dict of the backbone holds."""

import copy
import io
import pickle

import pytest
import torch
from support.nets import IDS, net, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel

pytestmark = pytest.mark.covers("Delta.freeze_module")


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freezing_leaves_just_what_is_excluded(model, lora, adapter):
    lora.freeze_module(exclude=["deltas", "head", "norm.weight"])
    own = {name for name, _ in [*lora.named_parameters(), *adapter.named_parameters()]}
    assert trainable(model) == own | {"head.weight", "head.bias", "norm.weight"}


def test_freezing_without_arguments_leaves_the_deltas(model, lora):
    lora.freeze_module()
    assert trainable(model) == {name for name, _ in lora.named_parameters()}


def test_deltas_can_be_excluded_by_name(model, lora, adapter):
    lora.freeze_module(exclude=["adapter"])
    assert trainable(model) == {name for name, _ in adapter.named_parameters()}


@pytest.mark.parametrize("several", [True, False])
def test_deltas_can_be_excluded_by_handle(model, lora, adapter, several):
    lora.freeze_module(exclude=[adapter] if several else adapter)
    assert trainable(model) == {name for name, _ in adapter.named_parameters()}
    other = copy.deepcopy(model)
    with pytest.raises(opendelta.DeltaError, match="a delta of another model"):
        lora.freeze_module(exclude=[opendelta.composition(other)["adapter"]])
    adapter.detach()
    with pytest.raises(opendelta.DeltaError, match="it is detached"):
        lora.freeze_module(exclude=["norm", adapter])
    assert not model.norm.weight.requires_grad


def test_the_last_call_decides_whichever_delta_it_is_called_on(model, lora, adapter):
    lora.freeze_module()
    adapter.freeze_module(exclude=["deltas", "head"])
    assert {"head.weight", "head.bias"} <= trainable(model)
    lora.freeze_module(exclude=["deltas", "norm"])
    assert {"norm.weight", "norm.bias"} <= trainable(model)
    assert "head.weight" not in trainable(model)


def test_one_module_can_be_frozen_alone(model, lora):
    lora.freeze_module(model.head)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"head.weight", "head.bias"}
    with pytest.raises(opendelta.DeltaError, match=r"not a module of the backbone"):
        lora.freeze_module(nn.Linear(2, 2))


def test_an_exclusion_that_names_nothing_freezes_nothing(model, lora):
    before = trainable(model)
    with pytest.raises(opendelta.AddressError, match=r"'haed'.*nearest: 'head'"):
        lora.freeze_module(exclude=["haed", "linaer"])
    assert trainable(model) == before
    with pytest.warns(opendelta.UnusedWarning, match=r"exclude.*'haed'.*nearest: 'head'"):
        lora.freeze_module(exclude=["deltas", "haed"])
    assert trainable(model) == {name for name, _ in lora.named_parameters()}


def test_a_tied_weight_is_spared_under_each_of_its_names(model):
    model.tied = nn.Linear(8, 11, bias=False)
    model.tied.weight = model.embedding.weight
    delta = LoraModel(model, modified_modules=["linear"])
    delta.freeze_module(exclude=["deltas", "tied"])
    assert model.embedding.weight.requires_grad


def test_the_last_detach_restores_the_flags(model):
    model.head.bias.requires_grad_(False)
    with untouched(model):
        lora = LoraModel(model, modified_modules=["linear"])
        adapter = AdapterModel(model, modified_modules=["bare"])
        lora.freeze_module()
        lora.detach()
        assert not model.head.weight.requires_grad
        adapter.detach()


def test_flags_that_the_user_changed_since_stay(model, lora):
    lora.freeze_module()
    model.head.weight.requires_grad_(True)
    lora.detach()
    assert model.head.weight.requires_grad


def test_a_copy_restores_its_own_flags(model, lora):
    lora.freeze_module()
    twin = copy.deepcopy(model)
    opendelta.composition(twin)["lora"].detach()
    assert twin.head.weight.requires_grad
    assert not model.head.weight.requires_grad


def test_the_last_call_decides_about_deltas_too(model, lora, adapter):
    own = {d.name: {n for n, _ in d.named_parameters()} for d in (lora, adapter)}
    lora.freeze_module(exclude=["adapter"])
    assert trainable(model) == own["adapter"]
    lora.freeze_module(exclude=["lora"])
    assert trainable(model) == own["lora"]
    lora.freeze_module(exclude=["deltas"])
    assert trainable(model) == own["lora"] | own["adapter"]


@pytest.mark.covers("Delta.requires_grad_")
def test_a_delta_that_its_user_froze_stays_frozen(model, lora, adapter):
    lora.requires_grad_(False)
    adapter.freeze_module()
    adapter.freeze_module(exclude=["deltas", "head"])
    assert not any(p.requires_grad for p in lora.parameters())


def flags(delta):
    return {parameter.requires_grad for parameter in delta.parameters()}


def test_a_new_delta_with_the_name_of_a_frozen_one_has_flags_of_its_own(model, adapter):
    old = LoraModel(model, modified_modules=["linear"], name="old")
    old.freeze_module(exclude=["adapter"])
    assert flags(old) == {False}
    old.detach()
    del old
    new = LoraModel(model, modified_modules=["linear"], name="old")
    new.requires_grad_(False)
    adapter.freeze_module()
    assert flags(new) == {False}
    new.requires_grad_(True)
    adapter.freeze_module(exclude=["adapter"])
    assert flags(new) == {False}
    new.detach()
    new.attach()  # it is the same, and so what froze it is known
    adapter.freeze_module()
    assert flags(new) == {True}


@pytest.mark.covers("DeltaConfig.unfrozen_modules")
def test_each_delta_keeps_its_unfrozen_modules_whoever_freezes(tmp_path):
    model = net()
    lora = LoraModel(model, modified_modules=["linear"])
    AdapterModel(model, modified_modules=["bare"], unfrozen_modules=["head.bias"])
    lora.freeze_module()
    trains = {n for n, p in model.named_parameters() if p.requires_grad and ".deltas." not in n}
    assert trains == {"head.bias"}


# --------------------------------------------------------------------- state dict
def test_the_state_dict_holds_just_what_trains_until_the_last_detach(model, lora, adapter):
    everything = set(model.state_dict())
    lora.freeze_module(exclude=["deltas", "head"], set_state_dict=True)
    assert set(model.state_dict()) == trainable(model)
    wrapped = nn.ModuleDict({"inside": model, "beside": nn.Linear(1, 1)})
    keys = {f"inside.{name}" for name in trainable(model)} | {"beside.weight", "beside.bias"}
    assert set(wrapped.state_dict()) == keys
    lora.detach()
    assert set(model.state_dict()) == trainable(model)
    adapter.detach()
    assert set(model.state_dict()) == everything - {
        name for d in (lora, adapter) for name in d.state_dict()
    }


def test_the_filter_is_kept_in_mind_while_no_delta_is_attached(model, lora):
    lora.detach()
    lora.freeze_module(set_state_dict=True)
    lora.attach()
    assert set(model.state_dict()) == trainable(model)


def test_the_filter_can_be_left_out_and_taken_back(model, lora):
    everything = set(model.state_dict())
    lora.freeze_module(set_state_dict=False)
    assert set(model.state_dict()) == everything
    lora.freeze_module(set_state_dict=True)
    assert set(model.state_dict()) == trainable(model)
    lora.freeze_module()
    assert set(model.state_dict()) == everything
    assert set(model.state_dict()) == everything


def test_the_filtered_state_dict_is_0_3_s_way_of_saving(model, lora):
    lora.freeze_module()
    expected = model(IDS)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = net()
    LoraModel(fresh, modified_modules=["linear"], lora_r=2)
    result = fresh.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(fresh(IDS), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_filter_of_its_own(model, lora, copied):
    lora.freeze_module(set_state_dict=True)
    twin = copied(model)
    assert set(twin.state_dict()) == trainable(model)
    opendelta.composition(twin)["lora"].detach()
    assert set(twin.state_dict()) == set(net().state_dict())
    assert set(model.state_dict()) == trainable(model)
