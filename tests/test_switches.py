"""Attached, active and trainable are three switches, and none of them flips another."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from nets import COPIES, IDS, copied, net, places_of, put, shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel
from opendelta._deltas.registry import METHODS
from opendelta.author import Acts, DeltaLayer
from opendelta.errors import DeltaError, DeltaLoadError, OptionError


@pytest.fixture
def model():
    return net()


@pytest.fixture
def lora(model):
    return shake(LoraModel(model, modified_modules=["linear"], lora_r=2))


@pytest.fixture
def adapter(model, lora):
    return shake(AdapterModel(model, modified_modules=["linear", "bare"]))


def switches(*deltas):
    return [
        (d.attached, d.active, {p.requires_grad for p in d.parameters()} == {True}) for d in deltas
    ]


def test_no_verb_flips_another_switch(model, lora, adapter):
    on = (True, True, True)
    assert switches(lora, adapter) == [on, on]
    lora.disable()
    assert switches(lora, adapter) == [(True, False, True), on]
    lora.detach()
    assert switches(lora, adapter) == [(False, False, True), on]
    lora.requires_grad_(False)
    assert switches(lora, adapter) == [(False, False, False), on]
    lora.attach()
    assert switches(lora, adapter) == [(True, False, False), on]
    lora.enable()
    assert switches(lora, adapter) == [(True, True, False), on]
    with opendelta.composition(model).only("lora"):
        assert switches(lora, adapter) == [(True, True, False), (True, False, True)]
    opendelta.composition(model).reorder(["adapter", "lora"])
    assert switches(lora, adapter) == [(True, True, False), on]
    adapter.freeze_module()
    assert switches(lora, adapter) == [(True, True, False), on]


def test_loading_another_delta_leaves_the_switches_of_the_first(model, lora, tmp_path):
    lora.freeze_module()
    lora.save_finetuned(tmp_path)
    lora.disable()
    lora.requires_grad_(False)
    second = opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert switches(lora, second) == [(True, False, False), (True, True, True)]


def test_one_delta_trains_on_top_of_a_frozen_one(model, lora, adapter):
    lora.requires_grad_(False)
    lora.freeze_module()
    kept = {name: p.detach().clone() for name, p in lora.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).pow(2).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, kept[name]) for name, p in lora.named_parameters())
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_disabled_delta_is_as_if_it_were_not_there(model, lora, adapter):
    with_both = model(IDS)
    adapter.detach()
    only_lora = model(IDS)
    adapter.attach()
    adapter.disable()
    assert torch.equal(model(IDS), only_lora)
    adapter.enable()
    with adapter.disabled():
        assert torch.equal(model(IDS), only_lora)
    assert torch.equal(model(IDS), with_both)


def test_attach_and_detach_twice_change_nothing_more(model, lora):
    lora.attach()
    expected = model(IDS)
    lora.detach()
    lora.detach()
    lora.attach()
    lora.attach()
    assert torch.equal(model(IDS), expected)


def test_parameters_and_state_dict_work_whether_attached_or_not(model, lora, adapter):
    names = [name for name, _ in adapter.named_parameters()]
    state = adapter.state_dict()
    adapter.detach()
    assert [name for name, _ in adapter.named_parameters()] == names == list(state)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (8 * 24 + 24 + 24 * 8 + 8)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    adapter.load_state_dict(zeros)
    assert all(not p.any() for p in adapter.parameters())
    adapter.attach()
    with adapter.disabled():
        expected = model(IDS)
    assert torch.equal(model(IDS), expected)
    with pytest.raises(opendelta.DeltaLoadError, match=r"1 missing: .*1 unexpected: bogus"):
        adapter.load_state_dict({**dict(list(zeros.items())[1:]), "bogus": torch.zeros(1)})


def test_train_and_eval_work_whether_attached_or_not(model):
    delta = LoraModel(model, modified_modules=["linear"], lora_dropout=0.5)
    layer = delta.layers["linear"]
    assert layer.training is False
    delta.train()
    assert layer.training is True
    delta.detach()
    delta.eval()
    assert layer.training is False
    model.train()
    delta.attach()
    assert layer.training is True


def test_dropout_acts_in_training_mode_only(model):
    delta = shake(LoraModel(model, modified_modules=["linear"], lora_dropout=0.5))
    assert torch.equal(model(IDS), model(IDS))
    delta.train()
    assert not torch.equal(model(IDS), model(IDS))


# ------------------------------------------------------------------------ fitting
@pytest.mark.parametrize("mode", [True, False])
def test_a_new_delta_takes_the_training_flag_of_its_module(model, mode):
    model.train(mode)
    delta = LoraModel(model, modified_modules=["linear"])
    assert delta.layers["linear"].training is mode


def test_a_returning_delta_follows_its_module_to_another_dtype(model, lora):
    lora.detach()
    model.to(torch.bfloat16)
    lora.attach()
    assert {p.dtype for p in lora.parameters()} == {torch.bfloat16}
    assert model(IDS).dtype == torch.bfloat16


def test_a_dtype_that_was_asked_for_stays(model):
    delta = LoraModel(model, modified_modules=["linear"], dtype=torch.float32)
    delta.detach()
    model.to(torch.bfloat16)
    delta.attach()
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    model(IDS)


def test_deltas_on_the_meta_device_take_no_memory():
    with torch.device("meta"):
        model = net()
    delta = LoraModel(model, modified_modules=["linear"])
    assert {p.device.type for p in delta.parameters()} == {"meta"}


def test_a_quantised_module_gets_deltas_in_the_dtype_around_it():
    class Int8Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 8
            packed = torch.randint(-8, 8, (4, 16), dtype=torch.int8)
            self.weight = nn.Parameter(packed, requires_grad=False)

        def forward(self, x):
            return x @ self.weight.view(8, 8).to(x.dtype) * 0.1

    model = net().to(torch.bfloat16)
    model.linear = Int8Linear()
    lora = shake(LoraModel(model, modified_modules=["linear"]))
    assert {p.dtype for p in lora.parameters()} == {torch.bfloat16}
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in lora.parameters())


# ----------------------------------------------------------------------- freezing
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
        lora.freeze_module(exclude=["deltas", "haed"])
    assert trainable(model) == before


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


def test_a_delta_that_its_user_froze_stays_frozen(model, lora, adapter):
    lora.requires_grad_(False)
    adapter.freeze_module()
    adapter.freeze_module(exclude=["deltas", "head"])
    assert not any(p.requires_grad for p in lora.parameters())


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
    lora.freeze_module()
    lora.attach()
    assert set(model.state_dict()) == trainable(model)


def test_the_filter_can_be_left_out_and_taken_back(model, lora):
    everything = set(model.state_dict())
    lora.freeze_module(set_state_dict=False)
    assert set(model.state_dict()) == everything
    lora.freeze_module()
    assert set(model.state_dict()) == trainable(model)
    lora.freeze_module(set_state_dict=False)
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
    lora.freeze_module()
    twin = copied(model)
    assert set(twin.state_dict()) == trainable(model)
    opendelta.composition(twin)["lora"].detach()
    assert set(twin.state_dict()) == set(net().state_dict())
    assert set(model.state_dict()) == trainable(model)


def test_ia3_scales_inputs_of_feed_forward_modules_and_outputs_of_others(model):
    delta = IA3Model(model, modified_modules=["linear", "conv1d"], feedforward_modules=["conv1d"])
    assert {name: layer.acts for name, layer in delta.layers.items()} == {
        "linear": Acts.AFTER,
        "conv1d": Acts.BEFORE,
    }
    with pytest.raises(opendelta.AddressError, match=r"no modified module matches 'bare'"):
        IA3Model(net(), modified_modules=["linear"], feedforward_modules=["bare"])


# ------------------------------------------------------------------------------------------- scale
SCALED = sorted(name for name, method in METHODS.items() if method.layer_class.scales)
NOT_SCALED = sorted({*METHODS} - {*SCALED})


CASES = [(name, place) for name in SCALED for place in places_of(METHODS[name])]


def acting(name, place):
    """A network in float64, and a delta of this method that acts on one module."""
    model = net().double()
    return model, shake(put(METHODS[name], model, place))


def output_of(model, delta, place):
    """What the module called `place` gives in a forward of the whole."""
    seen = []
    handle = model.get_submodule(place).register_forward_hook(lambda *call: seen.append(call[-1]))
    model(IDS)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_scale_multiplies_what_a_delta_adds(name, place):
    model, delta = acting(name, place)
    with delta.disabled():
        before = output_of(model, delta, place)
    change = output_of(model, delta, place) - before
    assert change.abs().max() > 1e-3
    for scale in (np.float32(0.5), -1.0, 3, 0.0):
        delta.scale = scale
        assert delta.scale == scale
        now = output_of(model, delta, place)
        assert torch.allclose(now, before + scale * change, atol=1e-12)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_gradients_go_through_the_scale(name, place):
    model, delta = acting(name, place)
    loss = model(IDS).pow(2).sum()
    delta.scale = 0.5
    one, other = loss, model(IDS).pow(2).sum()
    parameter = next(p for p in delta.parameters() if p.requires_grad)
    step = torch.randn_like(parameter) * 1e-6
    (gradient,) = torch.autograd.grad(other, parameter)
    with torch.no_grad():
        parameter += step
        up = model(IDS).pow(2).sum()
        parameter -= 2 * step
        down = model(IDS).pow(2).sum()
    assert one != other
    assert torch.allclose((up - down) / 2, (gradient * step).sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        case
        for case in CASES
        if METHODS[case[0]].layer_class.fold is not DeltaLayer.fold
        if case != ("bitfit", "bare")  # that module has no bias to fold into
    ],
)
def test_what_folds_folds_with_its_scale(name, place):
    model, delta = acting(name, place)
    delta.scale = 0.5
    expected = model(IDS)
    composed = opendelta.composition(model)
    composed.merge()
    assert torch.allclose(model(IDS), expected, atol=1e-10)
    with pytest.raises(DeltaError, match=r"cannot scale .*unmerge"):
        delta.scale = 1
    composed.unmerge()
    assert torch.allclose(model(IDS), expected, atol=1e-12)


def test_a_scale_is_saved_copied_and_shown(model, lora, tmp_path):
    expected = model(IDS)
    lora.scale = 0.25
    assert "0.25 lora(x)" in opendelta.composition(model).explain("linear").formula
    assert "scale 0.25" in str(opendelta.composition(model).explain("linear"))
    assert "lora scale 0.25" in opendelta.tree(model, to="text")
    scaled = model(IDS)
    assert not torch.allclose(scaled, expected)
    lora.freeze_module()
    lora.save_finetuned(tmp_path)
    for how in COPIES:
        assert torch.equal(copied(model, how)(IDS), scaled)
    lora.detach()
    again = opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert again.scale == 0.25
    assert torch.equal(model(IDS), scaled)


def test_two_loras_of_different_scales_run_as_one(model, lora):
    other = shake(LoraModel(model, modified_modules=["linear"], name="other"), seed=2)
    lora.scale, other.scale = 0.5, -2
    with torch.no_grad():
        x = torch.randn(3, 8)
        W, b = model.linear.weight, model.linear.bias
        D = sum(d.scale * d.layers["linear"].delta_weight() for d in (lora, other))
        assert torch.allclose(model.linear(x), x @ (W + D).T + b, atol=1e-5)
    mix = opendelta.combine(model, {"lora": 1.0, "other": 1.0})
    assert torch.allclose(mix.layers["linear"].delta_weight(), D, atol=1e-5)


def test_a_delta_made_in_inference_mode_is_scaled_outside_of_it(model):
    with torch.inference_mode():
        delta = LoraModel(model, modified_modules=["linear"], name="served")
        delta.scale = 0.25
    delta.scale = 0.5
    assert delta.scale == delta.record.scale_tensor == 0.5


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e7, "1", True, None])
def test_a_scale_is_a_number(model, lora, scale):
    with pytest.raises(OptionError, match=r"'lora'.scale=.* must be a number"):
        lora.scale = scale
    assert lora.scale == 1


@pytest.mark.parametrize("name", NOT_SCALED)
def test_methods_that_add_to_no_output_have_no_scale(model, name):
    delta = put(METHODS[name], model, places_of(METHODS[name])[0])
    with pytest.raises(OptionError, match="does not just add to an output"):
        delta.scale = 0.5
    delta.scale = 1


@pytest.mark.parametrize("scale", ["0.5", 1e7, True])
def test_a_scale_in_a_file_is_a_number(model, lora, tmp_path, scale):
    lora.freeze_module()
    lora.save_finetuned(tmp_path)
    lora.detach()
    config = json.loads((tmp_path / "config.json").read_text())
    config["deltas"][0]["scale"] = scale
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeltaLoadError, match=r"scale="):
        opendelta.load(tmp_path, model)
    assert opendelta.composition(model).names == []


def test_a_layer_that_computes_by_itself_has_no_scale_unless_it_says_so(model):
    class Twice(AdapterModel.layer_class):
        def forward(self, call, *args, **kwargs):
            return 2 * call(*args, **kwargs)

    class Heeding(Twice):
        scales = True

    class More(Heeding):
        pass

    assert AdapterModel.layer_class.scales
    assert not Twice.scales
    assert Heeding.scales
    assert More.scales


# -------------------------------------------------------------------------------- unentered blocks
@pytest.mark.parametrize("verb", ["only", "frozen", "disabled", "route"])
def test_a_block_that_nobody_enters_is_told(model, lora, verb):
    c = opendelta.composition(model)
    calls = {
        "only": lambda: c.only("lora"),
        "frozen": c.frozen,
        "disabled": lora.disabled,
        "route": lambda: opendelta.route(model, ["lora", None]),
    }
    with pytest.warns(opendelta.UnusedWarning, match=rf"{verb}\(\) did nothing") as told:
        calls[verb]()
    assert told[0].filename == __file__
    with calls[verb]():
        pass


def test_a_block_is_a_decorator_too(model, lora):
    @lora.disabled()
    def plain():
        return model(IDS), lora.active

    with opendelta.composition(model).only():
        expected = model(IDS)
    for _ in range(2):
        out, active = plain()
        assert torch.equal(out, expected)
        assert not active
    assert lora.active
