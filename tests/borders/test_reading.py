"""Weights that the module around reads, and modules that it calls, are told apart by its code."""

import pytest
import torch
import transformers
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import AdapterModel, LoraModel, SiteError

pytestmark = [pytest.mark.covers("DeltaConfig.reads")]


class Reads(nn.Module):
    """As torchvision's Swin: the projections are never called."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        return self.attend(x) + x

    def attend(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        mixed = (q @ k.mT).softmax(-1) @ v
        return F.linear(mixed, self.proj.weight, bias=self.proj.bias)


class Looks(nn.Module):
    """As T5: the weight is looked at, and the module called."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(6, 6)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


def is_reading(module):
    return getattr(type(module), "_site_reads", False)


def test_a_delta_acts_on_a_weight_that_is_read():
    model = Reads()
    plain = model(X)
    before = opendelta.snapshot(model)
    delta = LoraModel(model, modified_modules=["qkv", "proj"])
    assert torch.allclose(model(X), plain)
    shake(delta)
    changed = model(X)
    assert not torch.allclose(changed, plain)
    assert not opendelta.unreached(model)
    assert torch.allclose(opendelta.composition(model).to_backbone()(X), changed, atol=1e-6)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), changed, atol=1e-6)
    opendelta.composition(model).unmerge()
    delta.detach()
    opendelta.assert_pristine(model, like=before)


def test_a_layer_that_does_not_fold_is_refused_there():
    with pytest.raises(SiteError, match=r"'proj' \(.*\): its parent reads .weight"):
        AdapterModel(Reads(), modified_modules=["proj"])


def test_a_module_that_is_called_is_not_taken_for_read():
    model = Looks()
    LoraModel(model, modified_modules=["wo"])
    AdapterModel(model, modified_modules=["wo"])
    assert not is_reading(model.wo)
    model(X)
    assert not opendelta.unreached(model)


def test_the_default_places_of_wavlm_act():
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WavLMModel(config).eval()
    x = torch.randn(1, 800)
    with torch.no_grad():
        plain = model(x).last_hidden_state
        shake(LoraModel(model))
        changed = model(x).last_hidden_state
        merged = opendelta.composition(model).to_backbone()(x).last_hidden_state
    assert not torch.allclose(changed, plain)
    assert torch.allclose(merged, changed, atol=1e-4)


def test_a_plan_says_what_is_read():
    plan = opendelta.plan(Reads(), opendelta.LoraConfig(modified_modules=["qkv"]))
    assert [module.reads for module in plan.deltas[0].modules] == [True]
