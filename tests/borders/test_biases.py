"""A bias that is a buffer, an attribute, parametrized or pruned counts, and is not merged into."""

from collections import OrderedDict

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.nn.utils import parametrize, prune

import opendelta
from opendelta import BitFitModel, IA3Model, LNTuningModel, LoraModel, OFTModel, SiteError
from opendelta import composition as composed

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone", "combine")

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    def forward(self, bias):
        return 2 * bias


def as_buffer(module):
    values = module._parameters.pop("bias").detach()
    module.register_buffer("bias", values + 1)
    return module


def as_attribute(module):
    module.__dict__["bias"] = module._parameters.pop("bias").detach() + 1
    return module


def parametrized(module):
    parametrize.register_parametrization(module, "bias", Twice())
    return module


def pruned(module):
    return prune.l1_unstructured(module, "bias", amount=2)


def by_property(module):
    module.stored = module._parameters.pop("bias")
    shown = {"bias": property(lambda self: 2 * self.stored)}
    module.__class__ = type("Own", (type(module),), {"forward": type(module).forward, **shown})
    return module


HOLDERS = [as_buffer, as_attribute, parametrized, pruned, by_property]
VERBS = ["merge", "to_backbone"]
pytestmark = [pytestmark, pytest.mark.parametrize("hold", HOLDERS)]


def with_delta(hold, method, options, make=nn.Linear, sizes=(6, 6)):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(fc=hold(make(*sizes))))
    return model, shake(method(model, modified_modules=["fc"], **options))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoraModel, {}),
        (LoraModel, {"use_dora": True}),
        (OFTModel, {"oft_block_size": 3}),
        (IA3Model, {"feedforward_modules": ["fc"]}),
    ],
)
def test_a_change_of_the_weight_alone_is_merged(hold, method, options, verb):
    model, _ = with_delta(hold, method, options)
    before = model(X)
    made = getattr(composed(model), verb)()
    assert torch.allclose((model if verb == "merge" else made)(X), before, atol=1e-5)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("method", [IA3Model, BitFitModel, LNTuningModel])
def test_a_change_of_the_bias_is_refused_by_name(hold, method, verb):
    make, sizes = (nn.LayerNorm, (6,)) if method is LNTuningModel else (nn.Linear, (6, 6))
    model, _ = with_delta(hold, method, {}, make, sizes)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'fc' \(\w+\): its bias is no parameter of its own"):
        getattr(composed(model), verb)()
    assert opendelta.snapshot(model) == before


def test_dora_does_not_scale_it(hold):
    model, dora = with_delta(hold, LoraModel, {"use_dora": True})
    bias, layer = model.fc.bias, dora.layers["fc"]
    weight = model.fc.weight + layer.delta_weight()
    weight = layer.lora_magnitude_vector[:, None] * weight / weight.norm(dim=1, keepdim=True)
    assert torch.allclose(model(X), X @ weight.T + bias, atol=1e-5)


def test_a_weight_that_is_read_brings_it_along(hold):
    model, _ = with_delta(hold, LoraModel, {"reads": True})
    shown = nn.functional.linear(X, model.fc.weight, model.fc.bias)
    assert torch.allclose(shown, model(X), atol=1e-5)


def test_a_sum_of_changes_of_it_is_refused(hold):
    model, ia3 = with_delta(hold, IA3Model, {})
    with pytest.raises(SiteError, match="changes the bias too"):
        opendelta.combine(model, {ia3: 1.0})
