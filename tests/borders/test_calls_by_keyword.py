"""Calls of own modules by keywords in any order, and forwards that write to what they are given."""

import copy
import pickle

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    GateModel,
    HRAModel,
    IA3Model,
    LNTuningModel,
    LohaModel,
    LoraModel,
    LoReftModel,
    OFTModel,
    ParallelAdapterModel,
    SiteError,
    VeraModel,
)

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Masked(nn.Linear):
    def forward(self, x, mask=None):
        return F.linear(x, self.weight, self.bias) * (1 if mask is None else mask)


class ByKeyword(nn.Module):
    def __init__(self, reverse):
        super().__init__()
        self.fc, self.reverse = Masked(8, 8), reverse

    def forward(self, x, mask=None):
        return self.fc(mask=mask, x=x) if self.reverse else self.fc(x=x, mask=mask)


METHODS = [
    (LoraModel, {}),
    (LoraModel, {"use_dora": True}),
    (LohaModel, {}),
    (VeraModel, {}),
    (OFTModel, {"oft_block_size": 4}),
    (HRAModel, {"r": 2}),
    (IA3Model, {"feedforward_modules": ["fc"]}),
    (AdapterModel, {"bottleneck_dim": 4}),
    (ParallelAdapterModel, {"bottleneck_dim": 4, "modified_modules": ["fc", "fc"]}),
]


@pytest.mark.parametrize("mask", [None, torch.full((2, 5, 1), 0.5), torch.full((2, 5, 8), 0.5)])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_keywords_come_in_any_order(method, options, mask):
    outs = []
    for reverse in (False, True):
        torch.manual_seed(0)
        model = ByKeyword(reverse)
        shake(method(model, **{"modified_modules": ["fc"], **options}))
        outs.append(model(X, mask))
    torch.testing.assert_close(*outs)


@pytest.mark.covers("GateModel")
def test_a_gate_reads_the_input_whatever_comes_first():
    outs = []
    for reverse in (False, True):
        torch.manual_seed(0)
        model = ByKeyword(reverse)
        for name in ("a", "b"):
            shake(LoraModel(model, modified_modules=["fc"], name=name))
        shake(GateModel(model, ["a", "b"]))
        outs.append(model(X, torch.full((2, 5, 8), 0.5)))
    torch.testing.assert_close(*outs)


class InPlace(nn.Linear):
    def forward(self, x):
        return F.linear(F.relu_(x), self.weight, self.bias)


class Residual(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.inp, self.fc = nn.Linear(8, 8), fc

    def forward(self, x):
        h = self.inp(x)
        return h + self.fc(h)


@pytest.mark.covers("IA3Model", "OFTModel", "HRAModel")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_what_a_forward_writes_to_its_input_is_seen_behind_any_method(method, options, mode):
    torch.manual_seed(0)
    model = Residual(InPlace(8, 8))
    with mode():
        expected = model(X)
        method(model, **{"modified_modules": ["fc"], **options})
        torch.testing.assert_close(model(X), expected)


@pytest.mark.covers("DeltaConfig.modules_to_save")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_copy_in_another_dtype_writes_to_its_input_is_seen(mode):
    torch.manual_seed(0)
    model = Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))).bfloat16()
    with mode():
        expected = model(X.bfloat16())
        LoraModel(model, modified_modules=["inp"], modules_to_save=["fc"])
        torch.testing.assert_close(model(X.bfloat16()), expected, atol=0.05, rtol=0.05)


@pytest.mark.covers("LoReftModel", "SoftPromptModel")
def test_several_deltas_that_note_the_tokens_are_pickled():
    model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)).eval()
    ids = torch.arange(6)[None]
    for name in ("a", "b"):
        shake(opendelta.LoReftModel(model, first=1, name=name))
    shake(opendelta.SoftPromptModel(model, soft_token_num=2))
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


# ------------------------------------------------------------- what is not the first argument
class Behind(nn.Linear):
    def forward(self, residual, x):
        return residual + super().forward(x)


class BehindMask(nn.Linear):
    def forward(self, mask, x, scale=1.0):
        return mask * F.linear(x, self.weight, self.bias) * scale


class AnyName(nn.Linear):
    def forward(self, **inputs):
        return super().forward(inputs["x"])


class BehindIds(nn.Embedding):
    def forward(self, kinds, ids):
        return super().forward(ids) * kinds[..., None]


class BehindScale(nn.LayerNorm):
    def forward(self, scale, x):
        return scale * super().forward(x)


@pytest.mark.parametrize(
    ("module", "method", "said"),
    [
        (Behind(8, 8), LoraModel, "takes its input as 'x', behind 'residual'"),
        (Behind(8, 8), OFTModel, "takes its input as 'x', behind 'residual'"),
        (BehindMask(8, 8), IA3Model, "takes its input as 'x', behind 'mask'"),
        (AnyName(8, 8), LoraModel, "takes arguments of any name"),
        (BehindIds(9, 8), LoraModel, "takes its input as 'ids', behind 'kinds'"),
        (BehindScale(8), LNTuningModel, "takes its input as 'x', behind 'scale'"),
    ],
)
def test_an_input_behind_another_argument_is_refused_when_attaching(module, method, said):
    model = nn.Sequential(module)
    with pytest.raises(SiteError, match=said):
        method(model, modified_modules=["0"])
    opendelta.assert_pristine(model)


class Ahead(nn.Linear):
    def forward(self, x, residual):
        return residual + super().forward(x)


class AheadOfAll(nn.Linear):
    def forward(self, x, *more, **options):
        return super().forward(x)


class Passing(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "given"), [(Ahead(8, 8), (X, X)), (AheadOfAll(8, 8), (X, 1)), (Passing(8, 8), (X,))]
)
def test_an_input_before_other_arguments_is_taken(module, given):
    model = nn.ModuleDict({"fc": module})
    plain = module(*given)
    delta = shake(LoraModel(model, modified_modules=["fc"], lora_r=2, lora_alpha=2))
    layer = delta.layers["fc"]
    wanted = plain + X @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(model["fc"](*given), wanted)


class FromDict(nn.Linear):
    def forward(self, batch):
        return super().forward(batch["x"])


@pytest.mark.parametrize(("method", "options"), METHODS[:7])
def test_a_first_argument_that_is_no_tensor_is_named(method, options):
    model = nn.ModuleDict({"fc": FromDict(8, 8)})
    method(model, **{"modified_modules": ["fc"], **options})
    with pytest.raises(SiteError, match="which is a dict here and no tensor"):
        model["fc"]({"x": X})


def test_what_changes_the_output_alone_needs_no_tensor_first():
    model = nn.ModuleDict({"fc": FromDict(8, 8)})
    plain = model["fc"]({"x": X})
    delta = shake(AdapterModel(model, modified_modules=["fc"], bottleneck_dim=4))
    layer = delta.layers["fc"]
    torch.testing.assert_close(model["fc"]({"x": X}), plain + layer.bottleneck(plain))


# ---------------------------------------------------- what another argument adds to the output
class WithBias(nn.Linear):
    def forward(self, x, return_bias=False):
        y = F.linear(x, self.weight)
        return (y, self.bias) if return_bias else y + self.bias


class Fused(nn.Module):
    """An RMSNorm as in flash-attn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x, residual=None):
        x = x if residual is None else x + residual
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return y if residual is None else (y, x)


FusedRMSNorm = type("FusedRMSNorm", (Fused,), {})


@pytest.mark.parametrize(
    ("method", "module", "more"),
    [
        (LoraModel, WithBias(8, 8), {"return_bias": True}),
        (IA3Model, WithBias(8, 8), {"return_bias": True}),
        (BitFitModel, WithBias(8, 8), {"return_bias": True}),
        (LNTuningModel, FusedRMSNorm(), {"residual": X}),
        (BitFitModel, FusedRMSNorm(), {"residual": X}),
    ],
)
def test_a_tuple_that_an_argument_asks_for_is_refused_by_name(method, module, more):
    model = nn.ModuleDict({"fc": copy.deepcopy(module)})
    plain = module(X, **more)
    delta = shake(method(model, modified_modules=["fc"]))
    assert not torch.equal(model["fc"](X), module(X))
    with pytest.raises(SiteError, match=rf"{type(module).__name__} returned a tuple, and a delta"):
        model["fc"](X, **more)
    with delta.disabled():
        torch.testing.assert_close(model["fc"](X, **more), plain)
    delta.detach()
    torch.testing.assert_close(model["fc"](X, **more), plain)


@pytest.mark.parametrize("method", [AdapterModel, LoReftModel])
def test_hidden_states_in_a_tuple_that_an_argument_asks_for_are_changed(method):
    model = nn.ModuleDict({"fc": WithBias(8, 8)})
    plain = model["fc"](X, return_bias=True)
    shake(method(model, modified_modules=["fc"]))
    changed, bias = model["fc"](X, return_bias=True)
    assert not torch.equal(changed, plain[0])
    assert torch.equal(bias, plain[1])
