"""Groups of parameters for optimizers, one for each delta."""

import pytest
import torch
from support.nets import IDS, net

from opendelta import AdapterModel, IA3Model, LoraModel, OptionError, optimizer_groups

pytestmark = pytest.mark.covers("optimizer_groups")


@pytest.fixture
def three(model, lora, adapter):
    """A net whose two deltas and head train."""
    lora.freeze_module(exclude=["deltas", "head"])
    return model


def test_each_parameter_that_trains_is_in_one_group(three, lora, adapter):
    groups = optimizer_groups(three, {"adapter": {"lr": 0.5}}, lora={"weight_decay": 0.1})
    assert [group["name"] for group in groups] == ["lora", "adapter", "backbone"]
    rate = LoraModel.default_learning_rate
    assert [group.get("lr") for group in groups] == [rate, 0.5, None]
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in three.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(groups, lr=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [rate, 0.5, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01, 0.01]
    three(IDS).sum().backward()
    optimizer.step()


def test_each_delta_trains_at_the_rate_of_its_method(three):
    IA3Model(three, modified_modules=["linear"], name="second")
    rates = {group["name"]: group.get("lr") for group in optimizer_groups(three)}
    assert rates == {
        "lora": LoraModel.default_learning_rate,
        "adapter": AdapterModel.default_learning_rate,
        "second": IA3Model.default_learning_rate,
        "backbone": None,
    }


def test_lora_plus_trains_b_so_many_times_as_fast(three, lora):
    groups = optimizer_groups(three, lora={"lr": 0.25, "lora_plus_ratio": 16, "betas": (0.5, 0.9)})
    down, up = groups[:2]
    assert (down["name"], down["lr"]) == ("lora", 0.25)
    assert (up["name"], up["lr"], up["betas"]) == ("lora.B", 4.0, (0.5, 0.9))
    assert {id(p) for p in up["params"]} == {id(ly.lora_B) for ly in lora.layers.values()}
    assert {id(p) for p in down["params"]} == {id(ly.lora_A) for ly in lora.layers.values()}


def test_a_handle_names_its_delta(three, lora):
    by_handle, by_name = ({key: {"lr": 1}} for key in (lora, lora.name))
    assert optimizer_groups(three, by_handle) == optimizer_groups(three, by_name)


def test_what_is_frozen_and_what_is_shared_is_left_out(three, adapter):
    adapter.requires_grad_(False)
    assert [group["name"] for group in optimizer_groups(three)] == ["lora", "backbone"]
    assert optimizer_groups(net().requires_grad_(False)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lorra": {}}, r"no delta 'lorra' is on this Net; there are: lora"),
        ({"lora": {"lora_plus_ratio": 16}}, r"16 must be a number above 0, beside an lr"),
        ({"lora": {"lora_plus_ratio": -1, "lr": 1}}, r"-1 must be a number above 0"),
        ({"adapter": {"lora_plus_ratio": 16, "lr": 1}}, r"not for 'adapter' \(adapter\)"),
        ({"fa": {"lora_plus_ratio": 16, "lr": 1}}, r"not for 'fa' \(lora\)"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(three, options, message):
    LoraModel(three, modified_modules=["bare"], freeze_A=True, name="fa")
    with pytest.raises(OptionError, match=message):
        optimizer_groups(three, options)


def test_other_deltas_of_one_name_s_type_have_groups_of_their_own(three):
    AdapterModel(three, modified_modules=["linear"], name="second")
    names = [group["name"] for group in optimizer_groups(three, second={"lr": 1})]
    assert names == ["lora", "adapter", "second", "backbone"]
