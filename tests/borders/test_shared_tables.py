"""A table of embeddings that its model also calls on hidden states, as MPT's, or on floats."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import AdapterModel, CompacterModel, LoraModel, LoReftModel, SiteError

pytestmark = pytest.mark.covers("DeltaConfig.modified_modules", "SiteError")

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Shared(nn.Embedding):
    def forward(self, input, unembed=False):
        return F.linear(input, self.weight) if unembed else super().forward(input)


class OneHot(nn.Embedding):
    def forward(self, x):
        return x @ self.weight if x.is_floating_point() else super().forward(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.ffn = Shared(20, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.wte(self.ffn(self.wte(ids)), unembed=True)


@pytest.mark.parametrize("given", [{}, {"sample_inputs": (IDS,)}])
@pytest.mark.parametrize("method", [LoraModel, AdapterModel, CompacterModel, LoReftModel])
def test_a_call_on_hidden_states_is_refused(method, given):
    model = Tied()
    before = model(IDS)
    delta = method(model, modified_modules=["wte"], **given)
    with pytest.raises(SiteError, match=rf"Shared was given .* \[2, 3, 8\], and '{delta.name}'"):
        model(IDS)
    with delta.disabled():
        assert torch.equal(model(IDS), before)
    delta.detach()
    assert torch.equal(model(IDS), before)


def test_what_the_message_advises_works():
    model = Tied()
    before = model(IDS)
    delta = LoraModel(model, modified_modules=["ffn"], modules_to_save=["wte"])
    assert torch.equal(model(IDS), before)
    copy = delta.layers["wte"]
    assert [p.shape for p in copy.parameters()] == [model.wte.weight.shape]
    for p in copy.parameters():
        nn.init.zeros_(p)
    assert not model(IDS).any()


def test_floats_for_ids_are_refused_where_a_layer_looks_ids_up():
    model = nn.Sequential(OneHot(20, 8), nn.Linear(8, 8))
    vectors = F.one_hot(IDS, 20).float()
    delta = LoraModel(model, modified_modules=["0"])
    model(IDS)
    with pytest.raises(SiteError, match=r"OneHot was given torch.float32 .* acts on ids alone"):
        model(vectors)
    delta.detach()
    AdapterModel(model, modified_modules=["0"], bottleneck_dim=2)  # it acts on the output
    assert torch.allclose(model(IDS), model(vectors))
    assert not opendelta.unreached(model)
