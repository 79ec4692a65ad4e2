"""State dicts of a backbone with deltas: small in a file, whole for tools, complete on loading."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import build, logits
from support.nets import IDS, net, shake
from torch import nn

import opendelta
from opendelta import AdapterModel, DeltaError, DeltaLoadError, LoraModel, OptionError

pytestmark = pytest.mark.covers("Delta.freeze_module")


def prepared(acts=True, **way):
    """A net with two deltas; a head trains with them, and the rest is frozen."""
    model = net()
    deltas = (
        LoraModel(model, modified_modules=["linear"]),
        AdapterModel(model, modified_modules=["bare"]),
    )
    for delta in deltas if acts else ():
        shake(delta)
    deltas[0].freeze_module(exclude=["deltas", "head"], **way)
    return model


def through_file(state):
    """What `torch.load` reads of a state dict that `torch.save` wrote, as data alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_it_is_whole_in_memory_and_small_in_a_file():
    model = prepared()
    state = model.state_dict()
    whole = set(state)
    assert whole == {*net().state_dict(), *trained(model)}
    assert set(through_file(state)) == trained(model)
    assert type(through_file(state)) is type(net().state_dict())
    for copied in (copy.deepcopy(state), copy.copy(state), state.copy()):
        assert set(copied) == whole
        assert set(pickle.loads(pickle.dumps(copied))) == trained(model)
    assert copy.deepcopy(state)["linear.weight"] is not state["linear.weight"]
    assert set(through_file({"model": state, "step": 3})["model"]) == trained(model)


def test_what_a_user_puts_into_it_is_in_the_file():
    model = prepared()
    state = model.state_dict()
    state["linear.bias"] = state["linear.bias"] + 1
    state.update({"bare.weight": torch.zeros(8, 8), "mine": torch.ones(1)})
    assert set(through_file(state)) == trained(model) | {"linear.bias", "bare.weight", "mine"}


WAYS = {"default": {}, "True": {"set_state_dict": True}, "False": {"set_state_dict": False}}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_file_of_it_loads_strictly_and_nothing_is_missing(way, strict, frozen):
    model, fresh = prepared(**way), prepared(acts=False, **way)
    if not frozen:
        fresh.requires_grad_(True)
    result = fresh.load_state_dict(through_file(model.state_dict()), strict=strict)
    assert not any(result)
    assert torch.equal(fresh(IDS), model(IDS))


def test_a_file_of_safetensors_loads_strictly_where_the_same_is_frozen(tmp_path):
    model, fresh = prepared(set_state_dict=True), prepared(acts=False)
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    small = load_file(tmp_path / "small.safetensors")
    fresh.load_state_dict(small)
    assert torch.equal(fresh(IDS), model(IDS))
    fresh.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r'Missing key.*"linear\.weight"'):
        fresh.load_state_dict(small)


@every_way
def test_a_module_around_it_has_a_whole_one_unless_it_was_asked_otherwise(way):
    outer = nn.ModuleDict({"inside": prepared(**way), "beside": nn.Linear(1, 1)})
    small = way.get("set_state_dict") is True
    assert ("inside.linear.weight" in outer.state_dict()) != small
    fresh = nn.ModuleDict({"inside": prepared(acts=False, **way), "beside": nn.Linear(1, 1)})
    fresh.load_state_dict(through_file(outer.state_dict()))
    assert torch.equal(fresh["inside"](IDS), outer["inside"](IDS))


def test_a_whole_one_that_lacks_a_tensor_is_refused_as_ever():
    model = prepared()
    state = dict(model.state_dict())
    del state["linear.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"linear\.weight"'):
        prepared().load_state_dict(state)


def test_a_strict_loading_without_the_deltas_is_refused_before_the_first_copy():
    plain = net()
    for parameter in plain.parameters():
        nn.init.ones_(parameter)
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DeltaLoadError, match=r"6 of 6 tensors .*Net are missing.*strict=False"):
        model.load_state_dict(plain.state_dict())
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == {key for key in before if ".deltas." in key}
    assert torch.equal(model.linear.weight, plain.linear.weight)


def test_the_hooks_leave_with_the_last_delta():
    model = prepared()
    for delta in opendelta.composition(model):
        delta.detach()
    opendelta.assert_pristine(model)
    assert type(model.state_dict()) is type(net().state_dict())
    model.load_state_dict(net().state_dict())


# ---------------------------------------------------------------------------------- save_pretrained
def bert():
    model = build("bert")
    shake(LoraModel(model))
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_saves_itself(copied, tmp_path):
    model = bert()
    twin = copied(model)
    shake(next(iter(opendelta.composition(twin))))
    nn.init.ones_(twin.bert.embeddings.LayerNorm.bias)
    twin.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    opendelta.load(tmp_path, plain)
    assert torch.equal(logits(plain.eval()), logits(twin))


def test_a_given_state_dict_is_saved_without_deltas_and_with_what_it_lacks(tmp_path):
    model = bert()
    next(iter(opendelta.composition(model))).freeze_module(set_state_dict=True)
    small = model.state_dict()
    small["cls.predictions.bias"] = torch.ones_like(model.cls.predictions.bias)
    model.save_pretrained(tmp_path, state_dict=small)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(plain.cls.predictions.bias, small["cls.predictions.bias"])


def test_what_it_cannot_write_is_refused_before_anything_is_written(tmp_path):
    model = bert()
    with pytest.raises(OptionError, match=r"without its deltas: use model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    opendelta.composition(model).merge()
    with pytest.raises(DeltaError, match=r"plain model: cannot save 'lora'.*unmerge"):
        model.save_pretrained(tmp_path)
    opendelta.composition(model).unmerge()
    lora = next(iter(opendelta.composition(model)))
    next(iter(lora.parameters())).data.fill_(float("nan"))
    with pytest.raises(DeltaError, match="not finite"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*"))
    lora.detach()
    assert "save_pretrained" not in vars(model)
