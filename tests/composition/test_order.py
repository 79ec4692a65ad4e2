"""The onion: attaching order is stack order, and any layer may leave, return or move."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.nets import X, net, shake, small, untouched
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    AverageModel,
    DeltaConfig,
    IA3Model,
    LoraModel,
    ParallelAdapterModel,
)
from opendelta._deltas.registry import METHODS
from opendelta._handles.delta import Delta
from opendelta.author import Acts, DeltaLayer, first_input, replace_input

pytestmark = pytest.mark.covers(
    "Composition.reorder", "Composition.names", "Delta.attach", "Delta.detach", "DeltaLayer"
)


class ShiftLayer(DeltaLayer):
    """Acts before the module: adds a vector to its input."""

    kinds = ("linear",)
    acts = Acts.BEFORE

    def __init__(self, site, config):
        super().__init__()
        self.shift = site.parameter(site.in_features)
        nn.init.zeros_(self.shift)

    def forward(self, call, *args, **kwargs):
        args, kwargs = replace_input(args, kwargs, first_input(args, kwargs) + self.shift)
        return call(*args, **kwargs)


class ShiftConfig(DeltaConfig):
    pass


class ShiftModel(Delta):
    delta_type = "shift"
    config_class = ShiftConfig
    layer_class = ShiftLayer
    default_modified_modules = ("ff.w1",)


del METHODS["shift"]  # the contract suite is for the library's own methods
MAKERS = {
    "lora": lambda model: LoraModel(model, modified_modules=["0"], lora_r=2),
    "adapter": lambda model: AdapterModel(model, modified_modules=["0"], bottleneck_dim=3),
    "ia3": lambda model: IA3Model(model, modified_modules=["0"]),
    "shift": lambda model: ShiftModel(model, modified_modules=["0"]),
}
ALL = tuple(MAKERS)


def attach(model, names):
    deltas = {}
    for name in names:
        torch.manual_seed(7 + ALL.index(name))
        deltas[name] = shake(MAKERS[name](model), seed=ALL.index(name), scale=0.5)
    return deltas


def algebra(model, deltas, order):
    """The definition, written out independently: f(i+1) = layer_i around f_i."""

    def f(y):
        return F.linear(y, model[0].weight, model[0].bias)

    def wrap(name, f):
        p = {
            key.rpartition(".deltas.")[2].partition(".")[2]: t
            for key, t in deltas[name].named_parameters()
        }
        if name == "lora":
            return lambda y: f(y) + F.linear(F.linear(y, p["lora_A"]), p["lora_B"]) * (16 / 2)
        if name == "adapter":

            def adapter(y):
                h = f(y)
                down = F.linear(h, p["down_proj.weight"], p["down_proj.bias"])
                inner = F.gelu(down, approximate="tanh")
                return h + F.linear(inner, p["up_proj.weight"], p["up_proj.bias"])

            return adapter
        if name == "ia3":
            return lambda y: f(y) * p["ia3_l"]
        return lambda y: f(y + p["shift"])

    for name in order:
        f = wrap(name, f)
    return F.linear(torch.tanh(f(X)), model[2].weight, model[2].bias)


@pytest.mark.parametrize("order", list(itertools.permutations(ALL)), ids="-".join)
def test_outputs_follow_the_algebra_while_layers_leave_in_every_order(order):
    for leaving in itertools.permutations(ALL):
        model = small()
        plain = model(X)
        with untouched(model):
            deltas = attach(model, order)
            assert torch.allclose(model(X), algebra(model, deltas, order), atol=1e-6)
            left = list(order)
            for name in leaving:
                deltas[name].detach()
                left.remove(name)
                assert torch.allclose(model(X), algebra(model, deltas, left), atol=1e-6)
        assert torch.equal(model(X), plain)


def test_lora_then_adapter_is_not_adapter_then_lora():
    one, other = small(), small()
    first = attach(one, ["lora", "adapter"])
    second = attach(other, ["adapter", "lora"])
    assert not torch.allclose(one(X), other(X), atol=1e-3)
    assert torch.allclose(one(X), algebra(one, first, ["lora", "adapter"]), atol=1e-6)
    assert torch.allclose(other(X), algebra(other, second, ["adapter", "lora"]), atol=1e-6)


@pytest.mark.parametrize("leaving", list(itertools.permutations(ALL)), ids="-".join)
@pytest.mark.parametrize("returning", [ALL, ALL[::-1], ("ia3", "lora", "shift", "adapter")])
def test_a_delta_that_returns_takes_its_old_place(leaving, returning):
    model = small()
    deltas = attach(model, ALL)
    expected = model(X)
    for name in leaving:
        deltas[name].detach()
    for name in returning:
        deltas[name].attach()
    assert opendelta.composition(model).names == list(ALL)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(ALL)), ids="-".join)
def test_reordering_is_the_same_as_attaching_in_that_order(order):
    model, other = small(), small()
    attach(model, ALL)
    attach(other, order)
    opendelta.composition(model).reorder(list(order))
    assert opendelta.composition(model).names == list(order)
    assert torch.equal(model(X), other(X))


verbs = st.lists(
    st.tuples(
        st.sampled_from(["attach", "before", "after", "detach", "toggle", "reorder", "only"]),
        st.sampled_from(ALL),
        st.sampled_from(ALL),
        st.permutations(ALL),
    ),
    max_size=12,
)


@pytest.mark.covers("Delta.enable", "Delta.disable", "Composition.only")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=verbs, end=st.permutations(ALL))
def test_any_walk_over_all_verbs_follows_a_plain_list(steps, end):
    model = small()
    plain = model(X)
    before = opendelta.snapshot(model)
    deltas = attach(model, ALL)
    order, attached, active = list(ALL), set(ALL), set(ALL)
    composition = opendelta.composition(model)
    for verb, name, other, permutation in steps:
        if verb == "attach":
            deltas[name].attach()
            attached.add(name)
        elif verb in ("before", "after") and name != other:
            deltas[name].attach(**{verb: deltas[other]})
            attached.add(name)
            order.remove(name)
            order.insert(order.index(other) + (verb == "after"), name)
        elif verb == "detach":
            deltas[name].detach()
            attached.discard(name)
        elif verb == "toggle":
            (deltas[name].disable if name in active else deltas[name].enable)()
            active ^= {name}
        elif verb == "reorder":
            wanted = iter([n for n in permutation if n in attached])
            composition.reorder([n for n in permutation if n in attached])
            order = [next(wanted) if n in attached else n for n in order]
        elif verb == "only" and name in attached:
            with composition.only(name):
                assert torch.allclose(model(X), algebra(model, deltas, [name]), atol=1e-6)
        acting = [n for n in order if n in attached and n in active]
        assert composition.names == [n for n in order if n in attached]
        assert [d.name for d in composition] == composition.names
        assert torch.allclose(model(X), algebra(model, deltas, acting), atol=1e-6)
    for name in end:
        deltas[name].detach()
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(model(X), plain)


def test_attach_next_to_a_stranger_names_the_neighbours():
    model, other = net(), net()
    lora = LoraModel(model, modified_modules=["linear"])
    AdapterModel(model, modified_modules=["linear"])
    stranger = AdapterModel(other, modified_modules=["linear"], name="stranger")
    for wrong in (stranger, "nobody", lora):
        with pytest.raises(opendelta.DeltaError, match=r"the other deltas .* are \['adapter'\]"):
            lora.attach(before=wrong)
    with pytest.raises(opendelta.DeltaError, match=r"one neighbour"):
        lora.attach(before="adapter", after="adapter")


@pytest.mark.parametrize("wrong", [["lora"], ["lora", "lora"], ["lora", "adapter", "x"], []])
def test_reorder_takes_exactly_the_attached_deltas(wrong):
    model = net()
    LoraModel(model, modified_modules=["linear"])
    AdapterModel(model, modified_modules=["linear"])
    with pytest.raises(opendelta.DeltaError):
        opendelta.composition(model).reorder(wrong)
    assert opendelta.composition(model).names == ["lora", "adapter"]


@pytest.mark.parametrize("in_block", [False, True])
def test_what_runs_the_module_twice_stands_above_the_end_of_a_branch(in_block):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double()
    branch = shake(ParallelAdapterModel(model, modified_modules=["0", "1"], name="branch"))
    if in_block:
        AverageModel(model, deltas=["branch"], weights=[0.5], name="halved")
    adapter = shake(AdapterModel(model, modified_modules=["1"], residual="input", name="a"))
    x = torch.randn(3, 8, dtype=torch.float64)
    term = branch.layers["0"].branch(x) * (0.5 if in_block else 1)
    beneath, norm = model[0](x), lambda h: F.layer_norm(h, (8,), model[1].weight, model[1].bias)
    change = adapter.layers["1"].bottleneck(norm(beneath) + term)
    torch.testing.assert_close(model(x), norm(beneath + change) + term)
    with pytest.raises(opendelta.SiteError, match="'0' did not run first"):
        model[1](x)
