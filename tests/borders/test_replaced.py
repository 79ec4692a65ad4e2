"""A module, or a forward, that other code has replaced; and parts of a composition to merge."""

import types

import pytest
import torch
from support.nets import IDS, net, shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import AdapterModel, AverageModel, LoraModel, SiteError, UnreachedWarning

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone", "unreached")
VERBS = ["merge", "to_backbone"]


def replaced(*names):
    model = net()
    delta = shake(LoraModel(model, modified_modules=list(names)))
    delta.freeze_module()
    model(IDS)
    model.head = nn.Linear(8, 3).requires_grad_(False)
    return model, delta


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("names", [["head"], ["head", "linear"]])
def test_neither_a_merge_nor_a_plain_model_drops_it(names, verb):
    model, delta = replaced(*names)
    assert opendelta.unreached(model) == ["head.deltas.lora"]
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match="'head': 'lora' was on another module") as caught:
        getattr(opendelta.composition(model), verb)()
    assert caught.value.where == "head"
    assert opendelta.snapshot(model) == before
    delta.detach()
    delta.attach()
    output = model(IDS)
    made = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(IDS), output)


@pytest.mark.parametrize("verb", VERBS)
def test_a_disabled_one_and_one_whose_module_is_gone_are_no_obstacle(verb):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    shake(LoraModel(model, modified_modules=["0", "2"]))
    shake(LoraModel(model, modified_modules=["1"], name="off")).disable()
    model[1] = nn.Linear(4, 4)
    del model[2]
    x = torch.randn(2, 4)
    with pytest.warns(UnreachedWarning):
        output = model(x)
    made = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(x), output)


def test_saving_says_so_and_holds_it(tmp_path):
    _, delta = replaced("head", "linear")
    with pytest.warns(UnreachedWarning, match=r"1 delta layers .*: head \(lora\)"):
        delta.save_finetuned(tmp_path)
    fresh = net()
    (loaded,) = opendelta.load(tmp_path, fresh, check_backbone=False)
    for name, value in delta.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


# ---------------------------------------------------------------------- forwards that were replaced
class Small(nn.Linear):
    """A class whose forward the tests replace."""


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Small(6, 6)

    def forward(self, x):
        return self.fc(x)


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Around()

    def forward(self, x):
        return self.block(x)


def doubled(self, x):
    return F.linear(2 * x, self.weight, self.bias)


def shifted(self, x):
    return self.fc(x) + 1


@pytest.mark.parametrize("first", [True, False])
def test_the_forward_that_a_class_has_now_runs(first, monkeypatch):
    AdapterModel(Holding(), modified_modules=["block"]).detach()  # its class was a site's before
    model, x = Holding(), torch.randn(3, 6)
    before = model(x)
    delta = AdapterModel(model, modified_modules=["block"]) if first else None
    with monkeypatch.context() as patch:
        patch.setattr(Around, "forward", shifted)
        delta = delta or AdapterModel(model, modified_modules=["block"])
        torch.testing.assert_close(model(x), before + 1)
        with opendelta.composition(model).only():
            torch.testing.assert_close(model(x), before + 1)
    torch.testing.assert_close(model(x), before)
    delta.detach()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("cls", [Small, nn.Linear])
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_a_merge_asks_the_forward_that_acts(verb, cls, monkeypatch):
    model = Holding().double()
    if cls is nn.Linear:
        model.block.fc = nn.Linear(6, 6).double()
    shake(LoraModel(model, modified_modules=["fc"]))
    x = torch.randn(3, 6).double()
    monkeypatch.setattr(cls, "forward", doubled)
    fc = model.block.fc
    with opendelta.composition(model).only():
        torch.testing.assert_close(model(x), F.linear(2 * x, fc.weight, fc.bias))
    output = model(x)
    done = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else done)(x), output)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
def test_a_delta_on_a_module_whose_forward_was_replaced_since_is_not_merged(ran, verb):
    model, x = Holding(), torch.randn(3, 6)
    shake(LoraModel(model, modified_modules=["fc"]))
    if ran:
        model(x)
    model.block.fc.forward = types.MethodType(doubled, model.block.fc)
    output = model(x)
    with pytest.raises(SiteError, match=r"'block.fc' \(Small\): lora cannot be merged: a function"):
        getattr(opendelta.composition(model), verb)()
    assert torch.equal(model(x), output)
    del model.block.fc.forward
    opendelta.composition(model).merge()


# ------------------------------------------------------------------------- parts of a composition
class Divided(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / 4, self.bias)


@pytest.mark.parametrize("names", [("under",), ()])
def test_nothing_is_merged_by_a_factor_under_a_layer_that_looks_at_the_weight(names):
    model = nn.Sequential(Divided(6, 6)).double()
    shake(LoraModel(model, modified_modules=["0"], name="under"))
    shake(LoraModel(model, modified_modules=["0"], use_dora=True, name="over"))
    composed, x = opendelta.composition(model), torch.randn(3, 6).double()
    output = model(x)
    with pytest.raises(SiteError, match=r"'0' \(Divided\): \w+ cannot be merged"):
        composed.merge(*names)
    assert torch.equal(model(x), output)
    composed["over"].detach()
    output = model(x)
    composed.merge(*names)
    torch.testing.assert_close(model(x), output)


@pytest.mark.filterwarnings("ignore::opendelta.SharedDeltaWarning")
def test_a_block_is_not_merged_without_another_that_has_its_delta():
    model = nn.Sequential(nn.Linear(6, 6)).double()
    shake(LoraModel(model, modified_modules=["0"], name="law"))
    for name in ("one", "two"):
        AverageModel(model, deltas=["law"], name=name)
    composed, x = opendelta.composition(model), torch.randn(3, 6).double()
    output = model(x)
    with pytest.raises(SiteError, match="'one' shares a delta with a block that would not be mer"):
        composed.merge("one")
    for names in ((), ("one", "two")):
        composed.merge(*names)
        torch.testing.assert_close(model(x), output)
        composed.unmerge()


@pytest.mark.parametrize("name", ["law", "mean"])
@pytest.mark.parametrize("end", ["disable", "detach"])
def test_a_merge_of_what_does_not_act_in_a_block_says_so(end, name):
    model = nn.Sequential(nn.Linear(6, 6))
    law = LoraModel(model, modified_modules=["0"], name="law")
    LoraModel(model, modified_modules=["0"], name="news")
    AverageModel(model, deltas=["law"], name="mean")
    getattr(law, end)()
    if name == "law" and end == "detach":
        name = "mean"
    with pytest.raises(SiteError, match=f"'0': '{name}' is disabled, or nothing in it acts"):
        opendelta.composition(model).merge(name)
