"""Runs of one module, which find out what it computes, leave nothing in what a model holds."""

import contextlib

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import AdapterModel, LNTuningModel, LoraModel, SiteError
from opendelta._modules.faking import on_shapes

EVERYWHERE = {}  # a cache that all models share


class Cache:
    def __init__(self):
        self.kept = {}


def ones(kept, x):
    length = x.shape[-2] if x.dim() > 1 else 1
    if length not in kept:
        kept[length] = torch.ones(length, 1, device=x.device)
    return kept[length]


class Linear(nn.Linear):
    """A linear layer whose forward keeps what it makes."""

    def __init__(self):
        super().__init__(6, 6)
        self.own, self.object, self.calls = {}, Cache(), []

    def forward(self, x):
        self.calls.append(x.shape)
        scale = ones(self.own, x) * ones(self.object.kept, x) * ones(EVERYWHERE, x)
        return super().forward(x * scale)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.own, self.object = nn.Parameter(torch.ones(6)), {}, Cache()

    def forward(self, x):
        scale = ones(self.own, x) * ones(self.object.kept, x) * ones(EVERYWHERE, x)
        return F.rms_norm(x, (6,), self.weight) * scale


@pytest.mark.covers("Delta.attach")
@pytest.mark.parametrize("method", [LoraModel, AdapterModel, LNTuningModel])
@pytest.mark.parametrize("part", [Linear, Norm])
def test_no_cache_of_a_model_holds_tensors_without_values(part, method):
    EVERYWHERE.clear()
    model = nn.Sequential(part())
    model(torch.ones(1, 4, 6))
    own, held = model[0].own, model[0].object
    calls = list(getattr(model[0], "calls", ()))
    with contextlib.suppress(SiteError):  # the model must be as it was then, too
        method(model, modified_modules=["0"]).detach()
    assert model[0].own is own
    assert model[0].object is held
    assert [*own] == [*held.kept] == [4]
    assert getattr(model[0], "calls", []) == calls
    for length in range(1, 26):
        assert torch.isfinite(model(torch.ones(1, length, 6))).all()


class Observed(nn.Linear):
    """W x + b, and the largest input seen, as quantisation keeps it."""

    def __init__(self):
        super().__init__(6, 6)
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("seen", torch.tensor(0))
        self.inner, self.log = nn.BatchNorm1d(6), []

    def forward(self, x):
        self.seen += 1
        self.log.append(len(self.log))
        self.inner.running_mean.add_(1)
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return F.linear(x, self.weight, self.bias)


class Centred(Observed):
    """It is not W x + b, so that no merge is possible."""

    def forward(self, x):
        return super().forward(x - self.largest)


class Scaled(Observed):
    def forward(self, x):
        super().forward(x)
        return F.linear(x, 3 * self.weight, self.bias)


class ObservedNorm(nn.LayerNorm):
    def __init__(self):
        super().__init__(6)
        self.register_buffer("seen", torch.tensor(0))
        self.log = []

    def forward(self, x):
        self.seen += 1
        self.log.append(len(self.log))
        return super().forward(x)


@pytest.mark.covers("Composition.merge", "Composition.to_backbone")
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("part", [Observed, Scaled, Centred, ObservedNorm])
def test_a_merge_leaves_the_buffers_and_lists_of_a_module(part, verb):
    torch.manual_seed(0)
    model = nn.Sequential(part()).eval()
    cls = LNTuningModel if part is ObservedNorm else LoraModel
    delta = shake(cls(model, modified_modules=["0"]))
    model(torch.ones(2, 6))
    before = {key: value.clone() for key, value in model.named_buffers()}
    log, c = list(model[0].log), opendelta.composition(model)
    if part is Centred:
        with pytest.raises(SiteError, match="has a forward of its own"):
            getattr(c, verb)()
    else:
        plain = getattr(c, verb)()
        if verb == "to_backbone":
            for key, value in plain.named_buffers():
                assert torch.equal(value, before[key]), key
        c.unmerge()
    delta.detach()
    assert model[0].log == log
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]), key


def test_a_spectral_norm_takes_no_step_in_a_merge_that_is_refused():
    model = nn.ModuleDict({"fc": nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))})
    shake(LoraModel(model, modified_modules=["fc"]))
    before = {key: value.clone() for key, value in model.named_buffers()}
    with pytest.raises(SiteError, match="its weight is no parameter of its own"):
        opendelta.composition(model).merge()
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key]), key


def test_numbers_that_a_forward_makes_have_values_though_others_were_written_into():
    with on_shapes() as shapes:
        x = shapes.empty((4,), torch.float32, torch.device("cpu"))
        for _ in range(100):
            x.clone().add_(1)  # without values, and freed: the next tensor may be there
            assert torch.tensor([3, 4]).sum().item() == 7
