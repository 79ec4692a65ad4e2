"""Modules that return dataclasses, namespaces, or objects of one's own."""

import collections
import dataclasses
import types
from typing import Any

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import LoraModel, SiteError

pytestmark = pytest.mark.covers("route", "check", "Composition.only")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Out:
    logits: Any
    name: str = "out"


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: Any
    left: Any = dataclasses.field(init=False)


class Plain:
    def __init__(self, logits):
        self.logits = logits


def namespace(logits):
    return types.SimpleNamespace(logits=logits)


def nested(logits):
    return Out([Frozen(logits)])


class WithSlots:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


class InDeque(collections.deque):
    @property
    def logits(self):
        return self[0]


RECORDS = [Out, Frozen, Slotted, namespace, nested]


class Head(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(8, 8), kind

    def forward(self, x):
        return self.kind(self.linear(x))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), Head(kind)

    def forward(self, x):
        out = self.head(self.body(x)).logits
        return out[0].logits if isinstance(out, list) else out


def two_heads(kind):
    torch.manual_seed(0)
    model = Net(kind)
    for name in ("a", "b"):
        shake(LoraModel(model, modified_modules=["body"], modules_to_save=["head"], name=name))
    return model


@pytest.mark.parametrize("kind", RECORDS)
def test_rows_of_several_heads_are_joined(kind):
    model = two_heads(kind)
    composed = opendelta.composition(model)
    with composed.only("a"):
        a = model(X)
    with composed.only("b"):
        b = model(X)
    with opendelta.route(model, ["a", "b", "a", "b"]):
        out = model(X)
    torch.testing.assert_close(out, torch.stack([a[0], b[1], a[2], b[3]]))


@pytest.mark.parametrize("kind", [Plain, WithSlots, lambda logits: InDeque([logits])])
def test_rows_in_objects_of_one_s_own_are_refused_by_name(kind):
    model = two_heads(kind)
    with (
        opendelta.route(model, ["a", "b", "a", "b"]),
        pytest.raises(SiteError, match=r"outputs of 'head' in objects of the class [PWI]"),
    ):
        model(X)
    with opendelta.route(model, ["a", "a", "a", "a"]):
        assert model(X).shape == (4, 8)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_float32_copy_in_a_16_bit_model_casts_its_output_back(kind):
    model = Net(kind).to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    before = model(x)
    LoraModel(model, modified_modules=["body"], modules_to_save=["head"])
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


class Whole(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = nn.Linear(8, 8), kind

    def forward(self, x):
        return self.kind(self.body(x))


@pytest.mark.parametrize("kind", [*RECORDS, Plain, WithSlots])
def test_check_finds_the_gradients(kind):
    model = Whole(kind)
    LoraModel(model, modified_modules=["body"]).freeze_module()
    report = opendelta.check(model, X)
    assert report.no_gradient == []


def test_check_says_that_it_finds_no_tensor():
    model = Whole(lambda logits: InDeque([logits]))
    LoraModel(model, modified_modules=["body"]).freeze_module()
    report = opendelta.check(model, X)
    assert report.no_gradient == []
    assert report.not_checked == ["gradients: no tensor is in the output, a InDeque"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.rnn = nn.Linear(8, 8), nn.GRU(8, 8, num_layers=2, batch_first=True)

    def forward(self, x, state=None):
        return self.rnn(self.body(x), state)


@pytest.mark.parametrize("batch", [2, 3])  # as many rows as layers, or not
def test_states_of_copied_recurrent_modules_are_not_cut_by_rows(batch):
    torch.manual_seed(0)
    model = Recurrent()
    for name in ("a", "b"):
        shake(LoraModel(model, modified_modules=["body"], modules_to_save=["rnn"], name=name))
    x, state = torch.randn(batch, 5, 8), torch.randn(2, batch, 8)
    with (
        opendelta.route(model, ["a", "b", "a"][:batch]),
        pytest.raises(SiteError, match="'rnn' run on its rows by themselves, but that takes stat"),
    ):
        model(x, state)
    with opendelta.composition(model).only("a"):
        expected = model(x, state)
    with opendelta.route(model, ["a"] * batch):
        out = model(x, state)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", [Out, Frozen, Slotted, namespace])
@pytest.mark.parametrize("cls", [opendelta.AdapterModel, opendelta.LoReftModel])
def test_methods_change_the_hidden_states_in_a_record(cls, kind):
    net = Net(kind).eval()
    sizes = {"bottleneck_dim": 4} if cls is opendelta.AdapterModel else {}
    bare = net(X)
    delta = shake(cls(net, modified_modules=["head"], sample_inputs=X, **sizes))
    layer, out = delta.layers["head"], net(X)
    assert not torch.allclose(out, bare)
    delta.detach()
    again = cls(net, modified_modules=["head.linear"], **sizes)
    again.layers["head.linear"].load_state_dict(layer.state_dict())
    torch.testing.assert_close(net(X), out)
