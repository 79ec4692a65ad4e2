"""The contract: what every registered method promises, tested once for all of them."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from support.nets import COPIES, IDS, copied, net, places_of, put, shake, untouched
from torch import nn

import opendelta
from opendelta._deltas.registry import METHODS
from opendelta._layers.base import DeltaLayer
from opendelta.author import Acts, change_hidden, hidden

pytestmark = pytest.mark.covers("*Model", "*Config")

NAMES = sorted(METHODS)
PLACES = [(name, place) for name in NAMES for place in places_of(METHODS[name])]


@pytest.fixture(params=NAMES)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=PLACES, ids=lambda pair: "-".join(pair))
def placed(request):
    """(method, name of one module of the network that it takes)."""
    return METHODS[request.param[0]], request.param[1]


@pytest.mark.covers("DeltaLayer")
def test_it_starts_as_the_identity(placed):
    method, place = placed
    model = net()
    plain = model(IDS)
    put(method, model, place)
    same = torch.allclose(model(IDS), plain, atol=1e-6)
    assert same == method.layer_class.identity  # the exceptions say so


def test_its_layers_act_as_they_say(placed):
    """A layer that says so falsely would give wrong numbers once others are merged: see `Acts`."""
    method, place = placed
    model, calls = net(), []
    module = model.get_submodule(place)
    hook = module.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    model(IDS)
    hook.remove()
    layer = shake(put(method, model, place)).layers[place]
    ((args, kwargs, out),) = calls
    if layer.acts is Acts.BEFORE and not place:
        return  # a prompt asks for an output of more positions

    def around(result):
        given = []

        def call(*new, **options):
            given.append((new, options))
            return result

        return layer.around(call, module, ())(*args, **kwargs), given

    changed, given = around(out)
    if layer.acts is Acts.BESIDE:
        moved = change_hidden(out, hidden(out).size(-1), lambda h: h + 1)
        other, _ = around(moved)
        assert torch.allclose(hidden(other) - hidden(changed), torch.ones(()), atol=1e-5)
    elif layer.acts is Acts.AFTER:
        assert len(given) == 1
        assert all(new is old for new, old in zip(given[0][0], args, strict=True))
    elif layer.acts is Acts.BEFORE:
        assert changed is out
        assert given[0][0][0] is not args[0]


def test_it_acts_and_leaves_without_a_trace(placed):
    method, place = placed
    model = net()
    plain = model(IDS)
    with untouched(model):
        delta = shake(put(method, model, place))
        assert not torch.allclose(model(IDS), plain)
        delta.detach()
        assert torch.equal(model(IDS), plain)


@pytest.mark.covers("Delta.freeze_module", "Delta.named_parameters")
def test_gradients_reach_all_of_its_parameters_and_no_others(placed):
    method, place = placed
    model = net()
    delta = shake(put(method, model, place))
    delta.freeze_module()
    model(IDS).pow(2).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in delta.named_parameters()}
    assert all(p.grad.abs().sum() > 0 for p in delta.parameters())


def test_it_learns_in_twenty_steps(method):
    model = net()
    delta = put(method, model, *places_of(method))
    delta.freeze_module()
    target = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(IDS) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.covers("Delta.state_dict")
def test_its_tensors_stand_under_the_slot_of_its_modules(placed):
    method, place = placed
    model = net()
    keys = list(model.state_dict())
    delta = put(method, model, place, name="mine")
    added = [key for key in model.state_dict() if key not in keys]
    assert added == list(delta.state_dict())
    assert all(key.startswith(f"{place}.deltas.mine.".lstrip(".")) for key in added)
    delta.detach()
    assert list(model.state_dict()) == keys
    assert list(delta.state_dict()) == added


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_independent(method, how):
    model = net()
    delta = shake(put(method, model, *places_of(method)))
    expected = model(IDS)
    twin = copied(model, how)
    assert torch.equal(twin(IDS), expected)
    own = opendelta.composition(twin)[delta.name]
    assert own is not delta
    own.detach()
    assert torch.equal(twin(IDS), net()(IDS))
    assert torch.equal(model(IDS), expected)
    own.attach()
    assert torch.equal(twin(IDS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_computes_in_the_dtype_of_its_module(method, dtype):
    model = net().to(dtype)
    delta = shake(put(method, model, *places_of(method), dtype="backbone"))
    assert {p.dtype for p in delta.parameters()} == {dtype}
    out = model(IDS)
    assert out.dtype == dtype
    out.sum().backward()


@pytest.mark.covers("DeltaConfig.dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_16_bit_backbone_it_is_float32_and_computes_what_it_does_in_float64(method, dtype):
    model = net().to(dtype)
    delta = put(method, model, *places_of(method))
    exact = copy.deepcopy(model).double()
    for each in (delta, opendelta.composition(exact)[delta.name]):
        shake(each, scale=0.05)
    delta.freeze_module()
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    out, wanted = model(IDS), exact(IDS)
    assert out.dtype == dtype
    assert (out - wanted).norm() < 3 * torch.finfo(dtype).eps * wanted.norm()
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in delta.parameters()} == {torch.float32}


@pytest.mark.covers("Delta.to")
def test_it_is_converted_to_another_dtype_and_back(method):
    model = net().to(torch.bfloat16)
    delta = shake(put(method, model, *places_of(method), gate=True))
    wide = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    delta.to("backbone")
    out = model(IDS)
    assert {p.dtype for p in delta.parameters()} == {torch.bfloat16}
    delta.to(torch.float32)
    assert torch.allclose(model(IDS), out, atol=0.1)
    for name, tensor in delta.state_dict().items():
        rounded = wide[name].bfloat16().float() if tensor.is_floating_point() else wide[name]
        assert torch.equal(tensor, rounded)


def test_it_runs_under_autocast(method):
    model = net()
    delta = shake(put(method, model, *places_of(method)))
    delta.freeze_module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(IDS)
    assert torch.allclose(out.float(), model(IDS), atol=0.1)
    out.float().sum().backward()
    assert {p.grad.dtype for p in delta.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_folding_into_the_weights_equals_its_forward(placed, dtype, atol):
    method, place = placed
    model = net().to(dtype)
    delta = shake(put(method, model, place))
    if not delta.layers[place].folds:
        return  # test_what_can_fold_folds_somewhere
    expected = model(IDS)
    layer = delta.layers[place]
    delta.detach()
    module = model.get_submodule(place)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    given = dict(before)
    folded = layer.fold(given)
    assert given.keys() == before.keys()
    assert all(torch.equal(given[name], before[name]) for name in before), "fold must be pure"
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(folded[name])
    assert torch.allclose(model(IDS), expected, atol=atol, rtol=atol)


def test_what_can_fold_folds_somewhere(method):
    able = method.layer_class.fold is not DeltaLayer.fold
    layers = [put(method, net(), place).layers[place] for place in places_of(method)]
    assert any(layer.folds for layer in layers) == able


def test_it_compiles_into_one_graph(method):
    model = net()
    shake(put(method, model, *places_of(method)))
    expected = model(IDS)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(IDS), expected, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_under_checkpointing(method, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    places = [place for place in places_of(method) if place != "embedding"]
    grads = []
    for checkpointed in (False, True):
        model = net()
        delta = shake(put(method, model, *places))
        x = torch.ones(2, 4, 8, requires_grad=True)

        def run(x, model=model):
            return model(inputs_embeds=x)

        out = checkpoint(run, x, use_reentrant=use_reentrant) if checkpointed else run(x)
        out.pow(2).sum().backward()
        grads.append([p.grad for p in delta.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.covers("Delta.save_finetuned", "AutoDeltaModel")
def test_saved_and_loaded_it_gives_the_same_bits(method, tmp_path):
    model = net()
    delta = shake(put(method, model, *places_of(method)))
    delta.freeze_module()
    expected = model(IDS)
    delta.save_finetuned(tmp_path)
    fresh = net()
    loaded = opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert type(loaded) is type(delta)
    assert torch.equal(fresh(IDS), expected)


@pytest.mark.covers("SiteError")
def test_it_refuses_modules_of_other_kinds(method):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

    model = Odd()
    with untouched(model), pytest.raises(opendelta.SiteError, match=r"'conv' \(Conv2d\) cannot"):
        put(method, model, "conv")


def test_its_signature_is_its_config(method):
    first, *options, samples = inspect.signature(method).parameters.values()
    assert (first.name, samples.name) == ("backbone_model", "sample_inputs")
    assert sorted(p.name for p in options) == sorted(method.config_class.option_names())
    by_position = [p.name for p in options if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == method.config_class.positional_names()
    config = method.config_class.from_options({})
    for parameter in options:
        assert getattr(config, parameter.name) == parameter.default


def test_its_options_survive_json(method):
    config = method.config_class(modified_modules=["a"], name="x", dtype="float32")
    assert opendelta.AutoDeltaConfig.from_dict(config.to_dict()) == config


@pytest.mark.covers("OptionError")
def test_it_names_the_nearest_option(method):
    model = net()
    with untouched(model), pytest.raises(opendelta.OptionError, match="modified_modules"):
        method(model, modified_module=["linear"])


def on_one_layer(one, other):
    """A module that both take, or else one for each."""
    mine, others = places_of(METHODS[one]), places_of(METHODS[other])
    both = [place for place in mine if place in others]
    return (both[0], both[0]) if both else (mine[0], others[0])


@pytest.mark.covers("Composition.reorder", "Delta.disabled")
@pytest.mark.parametrize(
    "pair",
    list(itertools.combinations_with_replacement(NAMES, 2)),
    ids=lambda pair: "+".join(pair),
)
def test_any_two_of_them_share_a_layer_in_both_orders(pair):
    outputs = []
    places = on_one_layer(*pair)
    for order in ([0, 1], [1, 0]):
        model = net()
        plain = model(IDS)
        with untouched(model):
            deltas = {}
            for i in order:
                torch.manual_seed(i)
                deltas[i] = put(METHODS[pair[i]], model, places[i], name=f"d{i}")
                shake(deltas[i], seed=i)
            outputs.append(model(IDS))
            assert opendelta.composition(model).names == [f"d{i}" for i in order]
            with deltas[0].disabled(), deltas[1].disabled():
                assert torch.equal(model(IDS), plain)
            opendelta.composition(model).reorder([f"d{i}" for i in reversed(order)])
            outputs.append(model(IDS))
            deltas[0].detach()
            deltas[1].detach()
    assert torch.equal(outputs[0], outputs[3])
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("seed", range(12))
def test_any_number_of_them_share_a_model_in_any_order(seed):
    random = np.random.default_rng(seed)
    chosen = list(random.choice(NAMES, 6, replace=False))
    order = list(random.permutation(6))

    def attach(model, indices):
        deltas = {}
        for i in indices:
            torch.manual_seed(int(i))
            deltas[i] = put(METHODS[chosen[i]], model, *places_of(METHODS[chosen[i]]))
            shake(deltas[i], seed=int(i), scale=0.1)
        return deltas

    model, again = net(), net()
    with untouched(model):
        deltas = attach(model, range(6))
        attach(again, order)
        opendelta.composition(model).reorder([deltas[i] for i in order])
        assert torch.equal(model(IDS), again(IDS))
        for i in random.permutation(6):
            deltas[i].detach()


@pytest.mark.covers("DeltaConfig.gate")
def test_the_gate_of_a_layer_before_a_norm_reads_the_norm_s_input():
    options = {"modified_modules": ["0"], "residual": "input", "gate": True}
    delta = opendelta.AdapterModel(nn.Sequential(nn.LayerNorm(8)), **options)
    assert delta.layers["0"].gate.weight.shape == (1, 8)


@pytest.mark.covers("DeltaConfig.gate")
@pytest.mark.parametrize("gated", [False, True])
def test_a_gate_scales_what_it_changes_from_nothing_to_all(placed, gated):
    method, place = placed
    if place == "" and not gated:
        return  # what a closed gate leaves of a prompt is rows of zeros
    model = net()
    plain = model(IDS)
    torch.manual_seed(0)
    delta = shake(put(method, model, place), seed=5)
    values = {name: p.detach().clone() for name, p in delta.state_dict("gated").items()}
    full = model(IDS)
    delta.detach()
    gate = put(method, model, place, gate=True, name="gated")
    opened = gate.layers[place].gate
    with torch.no_grad():
        for name, tensor in gate.state_dict().items():
            if name in values:
                tensor.copy_(values[name])
        opened.bias.fill_(50.0 if gated else -50.0)
    assert torch.allclose(model(IDS), full if gated else plain, atol=1e-5)
    assert not gate.layers[place].folds
    assert {p.grad_fn for p in opened.parameters()} == {None}
    with torch.no_grad():
        opened.bias.zero_()
    model(IDS).pow(2).sum().backward()
    assert all(p.grad is not None for p in opened.parameters())
