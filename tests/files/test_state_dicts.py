"""State dicts of a backbone with deltas: small in a file, whole for tools, complete on loading."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from support.models import build, logits
from support.nets import IDS, net, places_of, put, shake
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import opendelta
from opendelta import (
    AdapterModel,
    DeltaError,
    DeltaLoadError,
    FourierFTModel,
    LoraModel,
    OptionError,
    VeraModel,
)
from opendelta._deltas.registry import METHODS
from opendelta.interop import peft

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


@every_way
def test_a_file_that_lost_what_was_trained_is_refused(way):
    state = through_file(prepared(**way).state_dict())
    del state["head.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"head\.weight"'):
        prepared().load_state_dict(state)


@every_way
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_safetensors_loads_tied_weights_as_into_a_plain_model(name, way, tmp_path):
    def tied(acts=True):
        model = build(name)
        model.requires_grad_(True)
        delta = LoraModel(model)
        if acts:
            shake(delta)
        delta.freeze_module(**way)
        return model

    model, fresh = tied(), tied(acts=False)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(logits(fresh), logits(model))


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


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("key", ["linear.deltas.lora.lora_C", "head.deltas.other.bias"])
def test_a_tensor_of_no_delta_is_refused_by_name_before_the_first_copy(key, frozen):
    model = prepared()
    model.requires_grad_(not frozen)
    before = model(IDS)
    small = {k: v + 1 for k, v in model.state_dict().items() if ".deltas." in k or not frozen}
    small[key] = torch.ones(2)
    with pytest.raises(DeltaLoadError, match=f"1 tensors .*no delta on this Net: {key}.*strict="):
        model.load_state_dict(small)
    assert torch.equal(model(IDS), before)
    assert model.load_state_dict(small, strict=False).unexpected_keys == [key]


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


def test_a_given_state_dict_without_some_tensors_of_deltas_is_refused(tmp_path):
    model = bert()
    next(iter(opendelta.composition(model))).freeze_module(set_state_dict=False)
    state = as_tensors(model.state_dict())
    first, *others = (key for key in state if "deltas" in key)
    lacking = {key: tensor for key, tensor in state.items() if key != first}
    for given, why in ((lacking, "lacks"), ({**state, first: torch.ones(3)}, "another shape of")):
        with pytest.raises(DeltaError, match=rf"{why} 1 tensors of deltas: {first}; give "):
            model.save_pretrained(tmp_path, state_dict=given)
        assert not list(tmp_path.iterdir())
    plain = {key: tensor for key, tensor in lacking.items() if key not in others}
    model.save_pretrained(tmp_path, state_dict=plain)
    (path,) = (tmp_path / "deltas").glob("*.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in load_file(path).items())


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


def as_tensors(state):
    """What tools that know nothing but names and tensors make of a state dict."""
    return {key: value.clone() for key, value in state.items()}


def of_safetensors(state):
    return safetensors.torch.load(safetensors.torch.save(as_tensors(state)))


BY = {"as it is": dict, "torch": through_file, "tensors": as_tensors}
BY["safetensors"] = of_safetensors
every_medium = pytest.mark.parametrize("through", BY.values(), ids=BY)


def adapted(merged=(), acts=True):
    model = net()
    deltas = [LoraModel(model, modified_modules=["linear", "bare"], name=name) for name in "ab"]
    for delta in deltas if acts else ():
        shake(delta)
    if merged:
        opendelta.composition(model).merge(*merged)
    return model


@every_medium
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("there", "here"), [("ab", ""), ("", "ab"), ("ab", "a"), ("a", "ab")])
def test_one_with_other_deltas_merged_is_refused(there, here, strict, through):
    model, fresh = adapted(there), adapted(here)
    before, state = fresh(IDS), through(model.state_dict())
    with pytest.raises(
        DeltaLoadError, match=r"merged into the weights of 2 modules.*bare.*unmerge"
    ):
        fresh.load_state_dict(state, strict=strict)
    outer = nn.ModuleDict({"inside": fresh})
    with pytest.raises(DeltaLoadError, match="Nothing was loaded"):
        outer.load_state_dict({f"inside.{key}": state[key] for key in state}, strict=strict)
    assert torch.equal(fresh(IDS), before)


@every_medium
def test_one_with_the_same_deltas_merged_loads(through):
    model, fresh = adapted("a"), adapted("a", acts=False)
    assert not any(fresh.load_state_dict(through(model.state_dict())))
    assert torch.equal(fresh(IDS), model(IDS))
    outer, state = nn.ModuleDict({"inside": adapted("a", acts=False)}), through(model.state_dict())
    assert not any(outer.load_state_dict({f"inside.{key}": state[key] for key in state}))
    assert torch.equal(outer["inside"](IDS), model(IDS))


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"cpu_offload": True}])
def test_torch_s_distributed_state_dicts_say_what_is_merged(options):
    options = StateDictOptions(**options)
    model, fresh = adapted("ab"), adapted("ab", acts=False)
    state = get_model_state_dict(model, options=options)
    set_model_state_dict(fresh, dict(state), options=options)
    assert torch.equal(fresh(IDS), model(IDS))
    with pytest.raises(DeltaLoadError, match="count twice"):
        set_model_state_dict(adapted(), dict(state), options=options)


@every_way
def test_torch_s_distributed_state_dicts_leave_out_what_is_frozen(way):
    options = StateDictOptions(ignore_frozen_params=True)
    model, fresh = prepared(**way), prepared(acts=False, **way)
    state = get_model_state_dict(model, options=options)
    assert set(state) == trained(model)
    assert not any(set_model_state_dict(fresh, state, options=options))
    assert torch.equal(fresh(IDS), model(IDS))


def test_a_merged_module_with_two_names_loads():
    def twice(acts=True):
        linear = nn.Linear(3, 3)
        model = nn.Sequential(linear, linear)
        delta = LoraModel(model, modified_modules=["0"])
        if acts:
            shake(delta)
        opendelta.composition(model).merge()
        return model

    model, fresh = twice(), twice(acts=False)
    assert not any(fresh.load_state_dict(model.state_dict()))
    assert torch.equal(fresh(torch.eye(3)), model(torch.eye(3)))


def test_merged_deltas_without_the_weights_load_where_the_output_is_the_same():
    merged, model = adapted(), adapted()
    opendelta.composition(merged)["a"].freeze_module()
    opendelta.composition(merged).merge()
    small = through_file(merged.state_dict())
    fresh = adapted(acts=False)
    opendelta.composition(fresh)["a"].freeze_module()
    fresh.load_state_dict(small)
    assert torch.equal(fresh(IDS), model(IDS))
    merged.load_state_dict(small)
    other = adapted("ab", acts=False)
    with pytest.raises(DeltaLoadError, match=r"merged into the weights of 2 modules"):
        other.load_state_dict(small)


def test_a_hook_that_renames_keys_loses_none_of_what_trains():
    def rename(module, state, prefix, metadata):
        for key in list(state):
            state[f"model.{key}"] = state.pop(key)

    model = nn.Sequential(nn.Linear(4, 4))
    model.register_state_dict_post_hook(rename)
    delta = LoraModel(model, modified_modules=["0"])
    delta.freeze_module(set_state_dict=True)
    kept = {key for key in model.state_dict() if "deltas" in key}
    assert kept == {"model.0.deltas.lora.lora_A", "model.0.deltas.lora.lora_B"}


def test_save_pretrained_writes_the_values_that_it_is_given(tmp_path):
    model = build("bert")
    delta = shake(LoraModel(model))
    delta.freeze_module(exclude=["deltas", "cls"])
    average = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    (path,) = (tmp_path / "deltas").glob("*.safetensors")
    for key, value in load_file(path).items():
        assert torch.equal(value, average[key])
    plain = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, average[key]) for key, value in plain.items())
    again = opendelta.from_pretrained(tmp_path)
    wanted = build("bert")
    LoraModel(wanted)
    wanted.load_state_dict(average)
    torch.testing.assert_close(logits(again), logits(wanted))


def test_save_pretrained_knows_the_keys_of_compiled_modules(tmp_path):
    model = build("bert")
    delta = shake(LoraModel(model))
    delta.freeze_module()
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    average = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=average)
    (path,) = (tmp_path / "deltas").glob("*.safetensors")
    given = {key.replace("._orig_mod", ""): value for key, value in average.items()}
    assert all(torch.equal(value, given[key]) for key, value in load_file(path).items())


# ------------------------------------------------------------------- tensors that lost their values
def attached_on_meta(method, places):
    with torch.device("meta"):
        model = net()
    put(method, model, *places)
    return model


def made_on_meta(method, places):
    with torch.device("meta"):
        return attached_on_meta(method, places)


def emptied(method, places):
    model = net()
    put(method, model, *places)
    return model.to_empty(device="cpu")


WAYS = {
    "attached on meta, assigned": (attached_on_meta, True),
    "made on meta, assigned": (made_on_meta, True),
    "attached on meta, emptied": (lambda *of: attached_on_meta(*of).to_empty(device="cpu"), False),
    "emptied": (emptied, False),
    "sent to meta, emptied": (
        lambda *of: emptied(*of).to("meta").to_empty(device="cpu").float(), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_lost_its_values_computes_the_same_with_a_state_dict(name, way):
    torch.manual_seed(0)
    whole, method = net(), METHODS[name]
    places = places_of(method)[:2]
    shake(put(method, whole, *places))
    make, assign = WAYS[way]
    model = make(method, places)
    found = model.load_state_dict(whole.state_dict(), assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    torch.testing.assert_close(model(IDS), whole(IDS), rtol=0, atol=0)


@pytest.mark.covers("VeraModel", "FourierFTModel")
@pytest.mark.parametrize("cls", [VeraModel, FourierFTModel])
def test_what_is_drawn_from_a_seed_is_drawn_again_only_if_it_was_lost(cls, monkeypatch):
    model = net()
    delta = cls(model, modified_modules=["linear"])
    drawn = next(m for m in model.modules() if hasattr(m, "seed"))
    monkeypatch.setattr(type(drawn), "seed", lambda module: pytest.fail("drawn again"))
    before = {name: tensor.clone() for name, tensor in drawn.named_buffers()}
    model.double().to("cpu").share_memory()
    copy.deepcopy(model).half()
    model.load_state_dict(model.state_dict(), assign=True)
    for name, tensor in drawn.named_buffers():
        torch.testing.assert_close(tensor, before[name].to(tensor.dtype), rtol=0, atol=0)
    assert delta.name in opendelta.composition(model).names


class Sown(nn.Linear):
    """A head of somebody's own with a method that is called `seed`."""

    def seed(self):
        raise AssertionError("this is not the library's to call")


def test_a_method_called_seed_of_a_copied_module_is_not_called(tmp_path):
    models = [nn.Sequential(nn.Linear(4, 4), Sown(4, 2)) for _ in range(2)]
    delta = LoraModel(models[0], modified_modules=["0"], modules_to_save=["1"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    opendelta.load(tmp_path, models[1], check_backbone=False)
    models[1].to_empty(device="cpu").load_state_dict(models[0].state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(models[1](x), models[0](x), rtol=0, atol=0)


@pytest.mark.covers("load", "check", "UncheckedWarning")
@pytest.mark.filterwarnings("ignore:1 of 1 weights under the deltas:opendelta.UncheckedWarning")
@pytest.mark.parametrize("folder", ["own", "peft"])
def test_values_that_a_load_does_not_read_are_named(folder, tmp_path):
    delta = shake(LoraModel(net(), modified_modules=["linear"]))
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "own")
    peft.save(delta, tmp_path / "peft")
    with torch.device("meta"):
        model = net()
    with pytest.warns(
        opendelta.UncheckedWarning, match="values of lora in .* were not read, as th"
    ):
        opendelta.load(tmp_path / folder, model)
    opendelta.check(model)  # on shapes
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    with pytest.raises(DeltaError, match="tensors of lora have no values, being on the meta dev"):
        opendelta.check(model, IDS)
    opendelta.composition(model)["lora"].freeze_module()
    with pytest.raises(DeltaError, match=r"2 tensors have no values, .*remove_hook_from_submod"):
        opendelta.composition(model).save(tmp_path / "lost")
    opendelta.composition(model)["lora"].detach()
    opendelta.load(tmp_path / folder, model)
    torch.testing.assert_close(model(IDS), delta.backbone_model(IDS))
