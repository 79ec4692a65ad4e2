"""Where the tensors of a new delta start, by the options that decide it."""

import copy
import math

import pytest
import torch
from support.models import build
from torch import nn

import opendelta
from opendelta import (
    CompacterModel,
    FourierFTModel,
    LoraModel,
    LowRankAdapterModel,
    SoftPromptModel,
    VeraModel,
)


def wide():
    """One linear module with so many values that their spread is known well."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64))


def assert_uniform(values, bound):
    assert values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def assert_normal(values, std):
    assert values.std() == pytest.approx(std, rel=0.1)
    assert values.abs().max() > 2.5 * std


@pytest.mark.covers("LoraConfig.init")
def test_lora_starts_with_b_at_0_and_a_uniform_or_normal():
    for init, check, size in (
        ("kaiming", assert_uniform, 1 / math.sqrt(64)),
        ("gaussian", assert_normal, 1 / 16),
    ):
        delta = LoraModel(wide(), modified_modules=["0"], lora_r=16, init=init)
        check(delta.layers["0"].lora_A.detach(), size)
        assert not delta.layers["0"].lora_B.any()


@pytest.mark.covers("LowRankAdapterConfig.low_rank_w_init")
def test_a_low_rank_adapter_starts_as_glorot_says():
    for init, check, gain in (
        ("glorot-uniform", assert_uniform, math.sqrt(6)),
        ("glorot-normal", assert_normal, math.sqrt(2)),
    ):
        options = {"reduction_factor": 2, "low_rank_rank": 8, "low_rank_w_init": init}
        delta = LowRankAdapterModel(wide(), modified_modules=["0"], **options)
        check(delta.layers["0"].down_sampler.W_left.detach(), gain / math.sqrt(64 + 8))


@pytest.mark.covers(
    "CompacterConfig.phm_c_init",
    "CompacterConfig.phm_init_range",
    "CompacterConfig.hypercomplex_nonlinearity",
)
@pytest.mark.parametrize("rule", ["normal", "uniform"])
@pytest.mark.parametrize("blocks", ["glorot-normal", "glorot-uniform"])
def test_compacter_starts_its_rules_and_its_blocks_as_it_is_told(rule, blocks):
    delta = CompacterModel(
        wide(), modified_modules=["0"], reduction_factor=2, hypercomplex_division=8,
        factorized_phm=False, phm_c_init=rule, phm_init_range=0.05,
        hypercomplex_nonlinearity=blocks,
    )  # fmt: skip
    part = delta.layers["0"].down_sampler
    assert part.rule.phm_rule.shape == (8, 8, 8)
    (assert_normal if rule == "normal" else assert_uniform)(part.rule.phm_rule.detach(), 0.05)
    gain, check = (2, assert_normal) if blocks == "glorot-normal" else (6, assert_uniform)
    check(part.blocks.W.detach(), math.sqrt(gain / (64 / 8 + 32 / 8)))


@pytest.mark.covers("VeraConfig.d_initial")
def test_vera_starts_its_d_at_the_value_that_is_given_and_its_b_at_0():
    delta = VeraModel(wide(), modified_modules=["0"], r=4, d_initial=0.25)
    assert delta.layers["0"].vera_lambda_d.tolist() == [0.25] * 4
    assert not delta.layers["0"].vera_lambda_b.any()


@pytest.mark.covers("SoftPromptConfig.init_range", "SoftPromptConfig.token_init")
def test_a_soft_prompt_that_starts_at_random_is_uniform_in_its_range():
    delta = SoftPromptModel(build("gpt2"), soft_token_num=40, token_init=False, init_range=0.2)
    (prompt,) = delta.parameters()
    assert_uniform(prompt.detach(), 0.2)


@pytest.mark.parametrize("method", [VeraModel, FourierFTModel])
def test_a_default_device_without_values_changes_no_start(method, tmp_path):
    buffers = []
    for default in ("cpu", "meta"):
        model = nn.Sequential(nn.Linear(4, 4))
        other = copy.deepcopy(model)
        with torch.device(default):
            delta = method(model, modified_modules=["0"])
            delta.freeze_module()
            delta.save_finetuned(tmp_path)
            loaded = opendelta.load(tmp_path, other)
        buffers += [dict(d.layers["0"].named_buffers()) for d in (delta, *loaded)]
        assert all(p.device.type == "cpu" for p in delta.parameters())
    for own in buffers[1:]:
        for name, buffer in own.items():
            assert torch.equal(buffer, buffers[0][name])
