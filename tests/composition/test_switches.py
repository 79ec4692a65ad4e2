"""Attached, active and trainable are three switches, and none of them flips another."""

import pytest
import torch
from support.nets import IDS, net, shake

import opendelta
from opendelta import AdapterModel, LoraModel

pytestmark = pytest.mark.covers(
    "Delta.attached", "Delta.active", "Delta.enable", "Delta.disable", "Delta.disabled",
    "Delta.requires_grad_",
)  # fmt: skip


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


@pytest.mark.covers("Composition.only")
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


@pytest.mark.covers("Delta.attach", "Delta.detach")
def test_attach_and_detach_twice_change_nothing_more(model, lora):
    lora.attach()
    expected = model(IDS)
    lora.detach()
    lora.detach()
    lora.attach()
    lora.attach()
    assert torch.equal(model(IDS), expected)


@pytest.mark.covers(
    "Delta.parameters", "Delta.named_parameters", "Delta.state_dict", "Delta.load_state_dict"
)
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


@pytest.mark.covers("Delta.train", "Delta.eval")
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


# -------------------------------------------------------------------------------- unentered blocks
@pytest.mark.covers("UnusedWarning", "Composition.only", "Composition.frozen", "route")
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
    block, expected = calls[verb](), rf"this block of {verb}\(\) was entered before"
    with block, pytest.raises(opendelta.DeltaError, match=expected), block:
        pass
    with pytest.raises(opendelta.DeltaError, match=expected), block:
        pass
    assert lora.active


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
