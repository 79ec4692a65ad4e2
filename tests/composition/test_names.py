"""The names of deltas: unique on a backbone, keys of its modules, kept while somebody holds one."""

import pytest
from support.nets import net, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel, LowRankAdapterModel
from opendelta._sites.stack import RESERVED

pytestmark = pytest.mark.covers("DeltaConfig.name", "Delta.name", "Composition.names")


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


@pytest.mark.covers("Delta.prefix")
def test_the_prefix_of_a_module_is_the_start_of_the_names_of_the_tensors_on_it():
    model = net()
    delta = AdapterModel(model, modified_modules=["linear", "bare"])
    assert delta.prefix("linear") == "linear.deltas.adapter."
    assert delta.prefix("", named="other") == "deltas.other."
    for named in (None, "other"):
        starts = tuple(delta.prefix(where, named) for where in delta.layers)
        assert all(name.startswith(starts) for name in delta.state_dict(named))


@pytest.mark.parametrize("name", ["layers", "router", "kept_factors", "acting", "mark", "values_1"])
def test_no_further_names_are_refused(name):
    own = {
        "__prepare_scriptable__",
        "_acting",
        "around",
        "fold",
        "frozen",
        "holds",
        "in_order",
        "merged",
        "onion",
        "ran",
    }
    assert RESERVED - {*dir(nn.ModuleDict())} == own | {"routed", "sort", "steps"}
    model = net()
    delta = LoraModel(model, modified_modules=["linear"], name=name)
    assert model.get_submodule(f"linear.deltas.{name}") is delta.layers["linear"]
