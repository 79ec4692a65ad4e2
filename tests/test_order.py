"""The onion: attaching order is stack order, and any layer may leave, return or move."""

import itertools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import IDS, net, shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, DeltaConfig, IA3Model, LoraModel, LowRankAdapterModel
from opendelta._deltas.registry import METHODS
from opendelta._handles.delta import Delta
from opendelta.author import Acts, DeltaLayer, first_input, replace_input


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
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def small():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[0].bias.requires_grad_(False)
    return model


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


def test_each_delta_has_a_unique_name_that_is_its_key_on_every_site():
    model = net()
    deltas = [
        AdapterModel(model, modified_modules=["linear"]),
        AdapterModel(model, modified_modules=["linear", "bare"]),
        LowRankAdapterModel(model, modified_modules=["linear"]),
        LoraModel(model, modified_modules=["linear"]),
        LoraModel(model, modified_modules=["linear"], name="style"),
    ]
    names = ["adapter", "adapter_1", "low_rank_adapter", "lora", "style"]
    assert [delta.name for delta in deltas] == names
    assert list(model.linear.deltas) == names
    assert list(model.bare.deltas) == ["adapter_1"]


def test_a_detached_delta_keeps_its_name_while_somebody_holds_it():
    model = net()
    first = LoraModel(model, modified_modules=["linear"])
    first.detach()
    second = LoraModel(model, modified_modules=["linear"])
    assert (first.name, second.name) == ("lora", "lora_1")
    first.attach()
    assert opendelta.composition(model).names == ["lora", "lora_1"]
    first.detach()
    del first
    assert LoraModel(model, modified_modules=["bare"]).name == "lora"


@pytest.mark.parametrize("name", ["type", "train", "items", "training", "forward", "in_order"])
def test_names_that_a_module_dict_refuses_are_refused_clearly(name):
    model = net()
    with untouched(model), pytest.raises(opendelta.SiteError, match=rf"'{name}' is no name"):
        LoraModel(model, modified_modules=["linear"], name=name)


@pytest.mark.parametrize("name", ["a.b", "", "..", "a/b", "a b", "x" * 65, "ü"])
def test_names_that_are_no_key_are_refused(name):
    model = net()
    with untouched(model), pytest.raises(opendelta.DeltaError):
        LoraModel(model, modified_modules=["linear"], name=name)


def test_a_taken_name_is_refused():
    model = net()
    LoraModel(model, modified_modules=["linear"], name="mine")
    with pytest.raises(opendelta.SiteError, match=r"has a delta 'mine' already.*'mine_1'"):
        LoraModel(model, modified_modules=["bare"], name="mine")


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


def test_explain_shows_the_flow_as_a_formula_and_as_a_list():
    model = net()
    for name in ("lora", "style"):
        kind = LoraModel if name == "lora" else AdapterModel
        kind(model, modified_modules=["linear"], name=name)
    IA3Model(model, modified_modules=["linear"], feedforward_modules=["linear"])
    explanation = opendelta.composition(model).explain("linear")
    assert explanation.formula == "y = style(linear(ia3(x)) + lora(ia3(x)))"
    assert [step.partition(":")[0] for step in explanation.steps] == [
        "linear",
        "lora",
        "style",
        "ia3",
    ]
    assert str(explanation).splitlines()[0] == f"linear:  {explanation.formula}"
    opendelta.composition(model)["style"].disable()
    assert (
        opendelta.composition(model).explain("linear").formula
        == "y = linear(ia3(x)) + lora(ia3(x))"
    )
    assert opendelta.composition(model).explain("bare").formula == "y = bare(x)"
    with pytest.raises(opendelta.AddressError, match=r"nearest: 'linear'"):
        opendelta.composition(model).explain("linaer")


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


def test_only_restores_the_switches_even_after_an_error():
    model = net()
    lora = shake(LoraModel(model, modified_modules=["linear"]))
    adapter = shake(AdapterModel(model, modified_modules=["linear"]))
    adapter.disable()
    seen = []

    def fail():
        seen.append((lora.active, adapter.active))
        raise RuntimeError

    with pytest.raises(RuntimeError), opendelta.composition(model).only("adapter"):
        fail()
    assert seen == [(False, True)]
    assert (lora.active, adapter.active) == (True, False)
    with opendelta.composition(model).only():
        assert torch.equal(model(IDS), net()(IDS))


def test_what_is_merged_inside_only_acts_until_it_is_unmerged():
    model = net()
    lora = shake(LoraModel(model, modified_modules=["linear"]))
    lora.disable()
    composition = opendelta.composition(model)
    with composition.only("lora"):
        expected = model(IDS)
        composition.merge("lora")
    torch.testing.assert_close(model(IDS), expected)
    assert lora.active
    assert composition.explain("linear").formula == "y = linear(x) + lora(x)"
    composition.unmerge()
    assert torch.equal(model(IDS), expected)


def test_all_deltas_of_a_model_are_attached_through_the_same_module():
    wrapped = nn.Sequential(small())
    with untouched(wrapped):
        inner = LoraModel(wrapped[0], modified_modules=["0"])
        with pytest.raises(opendelta.SiteError, match=r"attached through its module '0', not"):
            AdapterModel(wrapped, modified_modules=["0.0"])
        inner.detach()
        outer = AdapterModel(wrapped, modified_modules=["0.2"])
        for where in (wrapped[0], wrapped[0][0]):
            with pytest.raises(
                opendelta.SiteError, match=r"through (a module|the Sequential) around"
            ):
                LoraModel(where, modified_modules=[""] if where is wrapped[0][0] else ["0"])
        outer.detach()


def test_models_that_share_modules_with_deltas_are_kept_apart():
    shared = small()
    one, other = (nn.Sequential(OrderedDict(body=shared, head=nn.Linear(3, 3))) for _ in "ab")
    lora = LoraModel(one, modified_modules=["0", "head"])
    with (
        untouched(other.head),
        pytest.raises(opendelta.SiteError, match="another Sequential, which shares modules"),
    ):
        LoraModel(other, modified_modules=["head"])
    lora.detach()
    LoraModel(other, modified_modules=["head"])


def test_a_delta_returns_only_where_it_could_be_attached_anew():
    wrapped = nn.Sequential(small())
    with untouched(wrapped):
        inner = LoraModel(wrapped[0], modified_modules=["0"])
        inner.detach()
        outer = AdapterModel(wrapped, modified_modules=["0.2"])
        with pytest.raises(opendelta.SiteError, match="through a module around"):
            inner.attach()
        outer.detach()
        inner.attach()
        with pytest.raises(opendelta.SiteError, match=r"attached through its module '0', not"):
            outer.attach()
        inner.detach()


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


def test_numbered_modules_are_explained_with_their_list():
    model = nn.Sequential(small())
    LoraModel(model, modified_modules=["0.0"])
    assert opendelta.composition(model).explain("0.0").formula == "y = 0.0(x) + lora(x)"


# -------------------------------------------------------------------- containers
def test_a_container_that_carries_a_delta_is_the_container_it_was():
    model = small()
    plain, items = model(X), list(model)
    with untouched(model):
        adapter = shake(AdapterModel(model, modified_modules=["root"], bottleneck_dim=2))
        assert not torch.allclose(model(X), plain)
        assert len(model) == 3
        assert list(model) == items
        assert model[-1] is items[-1]
        with adapter.disabled():
            assert torch.equal(model(X), plain)
        adapter.detach()
    assert torch.equal(model(X), plain)


def test_a_container_can_be_owned_and_switched_off():
    whole = nn.Sequential()
    whole.add_module("body", nn.Linear(6, 6))
    whole.add_module("head", nn.Sequential(nn.Linear(6, 2)))
    plain = whole(X)
    delta = shake(LoraModel(whole, modified_modules=["body"], modules_to_save=["head"]))
    assert not torch.allclose(whole(X), plain)
    with delta.disabled():
        assert torch.equal(whole(X), plain)


@pytest.mark.parametrize("option", ["modified_modules", "modules_to_save"])
def test_a_list_that_is_never_called_is_refused(option):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(6, 6)])
    model.other = nn.Linear(6, 6)
    options = {"modified_modules": ["other"], option: ["blocks"]}
    with untouched(model), pytest.raises(opendelta.SiteError, match=r"never called.*\[r\]blocks"):
        AdapterModel(model, **options)


def test_a_module_that_took_the_place_of_a_site_is_noticed():
    model = net()
    delta = LoraModel(model, modified_modules=["linear", "head"])
    model.head = nn.Linear(8, 3)
    with pytest.warns(opendelta.UnreachedWarning, match=r"head.deltas.lora"):
        model(IDS)
    assert opendelta.check(model, IDS).unreached == ["head.deltas.lora"]
    assert len(delta.layers) == 2


def test_a_second_delta_goes_on_a_model_whose_blocks_were_wrapped_meanwhile():
    model = small()
    LoraModel(model, modified_modules=["0"])
    model[0] = torch.compile(model[0], backend="eager")
    AdapterModel(model, modified_modules=["2"])
    assert opendelta.composition(model).names == ["lora", "adapter"]
    opendelta.composition(model)["lora"].detach()
    opendelta.composition(model)["adapter"].detach()
    opendelta.assert_pristine(model)
