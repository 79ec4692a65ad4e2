"""Combinations of deltas that papers give a name."""

import pytest
import torch
from support.models import build, inputs, logits
from support.nets import shake, untouched

import opendelta
from opendelta import adapter_drop, mam, unipelt

FAMILIES = ["bert", "gpt2", "llama", "t5", "bart"]


@pytest.mark.covers("mam")
@pytest.mark.parametrize("name", FAMILIES)
def test_mam_is_a_prefix_and_a_scaled_parallel_adapter(name):
    model = build(name)
    with untouched(model):
        prefix, adapter = mam(model, prefix_token_num=4, bottleneck_dim=6)
        assert adapter.config.scaled == 4.0
        assert opendelta.composition(model).names == ["prefix", "parallel_adapter"]
        ends = adapter.modified_modules
        roles = opendelta.roles(model)
        assert {roles[n] for n in ends[::2]} == {"ff.w1"}
        assert {roles[n] for n in ends[1::2]} == {"ff.w2"}
        shake(adapter)
        assert bool(opendelta.check(model, inputs(model)))
        prefix.detach(), adapter.detach()


@pytest.mark.covers("unipelt", "DeltaConfig.gate")
@pytest.mark.parametrize("name", FAMILIES)
def test_unipelt_trains_three_deltas_behind_gates(name):
    model = build(name)
    with untouched(model):
        deltas = unipelt(model)
        assert [d.delta_type for d in deltas] == ["lora", "prefix", "adapter"]
        for delta in deltas:
            shake(delta, scale=0.1)
            gates = [n for n, _ in delta.named_parameters() if ".gate." in n]
            own = [n for n in delta.layers if n in delta.modified_modules]
            assert len(gates) == 2 * len(own)
        model(**inputs(model)).logits.sum().backward()
        for delta in deltas:
            assert all(p.grad is not None for p in delta.parameters())
        for delta in deltas:
            delta.detach()
        model.zero_grad()


@pytest.mark.covers("adapter_drop")
def test_adapter_drop_leaves_the_lowest_blocks_alone():
    model = build("t5")
    plain = logits(model)
    with untouched(model):
        delta = adapter_drop(model, [0], bottleneck_dim=5)
        assert len(delta.modified_modules) == 4
        assert all(".block.1." in name for name in delta.modified_modules)
        assert delta.name == "adapter"
        assert not torch.equal(plain, logits(shake(delta).backbone_model))
        delta.detach()


@pytest.mark.covers("adapter_drop")
@pytest.mark.parametrize("layers", [[7], [], [0, 1]])
def test_adapter_drop_names_the_blocks_that_there_are(layers):
    model = build("bert")
    with untouched(model), pytest.raises(opendelta.AddressError, match=r"adapter_drop\(layers="):
        adapter_drop(model, layers)


@pytest.mark.covers("mam", "unipelt")
def test_a_recipe_that_fails_leaves_nothing_behind():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for recipe in (mam, unipelt):
        with untouched(model), pytest.raises(opendelta.AddressError, match=r"has the role"):
            recipe(model)
