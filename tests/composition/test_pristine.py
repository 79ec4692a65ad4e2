"""`assert_pristine` finds each trace of a delta, and with a `snapshot` each other change."""

import pytest
import torch
from support.nets import small
from torch import nn

import opendelta
from opendelta import LoraModel, PristineError


@pytest.mark.covers("assert_pristine", "PristineError")
def test_a_delta_on_the_model_is_a_trace_until_it_leaves():
    model = small()
    opendelta.assert_pristine(model)
    delta = LoraModel(model, modified_modules=["0"])
    with pytest.raises(PristineError, match=r"^'0' \(Linear\) carries lora; detach first$"):
        opendelta.assert_pristine(model)
    delta.disable()
    with pytest.raises(PristineError, match="carries lora"):
        opendelta.assert_pristine(model)
    delta.detach()
    opendelta.assert_pristine(model)


CHANGES = {
    "values changed: weight": lambda m: m[0].weight.data.mul_(2),
    "requires_grad changed: bias": lambda m: m[0].bias.requires_grad_(True),
    "training was True and is False": lambda m: m[0].eval(),
    "hooks changed: _forward_hooks": lambda m: m[0].register_forward_hook(lambda *_: None),
    r"attributes got \['mine'\]": lambda m: setattr(m[0], "mine", 1),
    "class was": lambda m: setattr(m[0], "__class__", type("Linear", (nn.Linear,), {})),
    r"modules came or went: \['3'\]": lambda m: m.append(nn.ReLU()),
}


@pytest.mark.covers("snapshot", "assert_pristine")
@pytest.mark.parametrize("message", CHANGES)
def test_each_change_since_a_snapshot_is_named(message):
    model = small()
    before = opendelta.snapshot(model)
    model(torch.ones(1, 6))
    LoraModel(model, modified_modules=["0"]).detach()
    opendelta.assert_pristine(model, like=before)
    CHANGES[message](model)
    opendelta.assert_pristine(model)
    with pytest.raises(PristineError, match=message):
        opendelta.assert_pristine(model, like=before)


@pytest.mark.covers("snapshot")
def test_a_snapshot_of_a_model_with_deltas_is_of_no_use_and_so_is_anything_else():
    model = small()
    delta = LoraModel(model, modified_modules=["0"])
    before = opendelta.snapshot(model)
    delta.detach()
    with pytest.raises(PristineError, match="taken while deltas were attached: take it before"):
        opendelta.assert_pristine(model, like=before)
    with pytest.raises(opendelta.DeltaError, match=r"like= takes what .*snapshot.* not a Sequen"):
        opendelta.assert_pristine(model, like=model)
