"""Deltas on quantised backbones: bitsandbytes and torchao, for real."""

import copy
import warnings

import pytest
import torch
from nets import shake
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel

with warnings.catch_warnings():  # they warn of optional parts that are not there
    warnings.simplefilter("ignore")
    import bitsandbytes
    import torchao.quantization as torchao

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def with_bitsandbytes(bits):
    torch.manual_seed(0)
    model = Block()
    for name, plain in list(model.named_children()):
        sizes = plain.in_features, plain.out_features
        if bits == 8:
            new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.load_state_dict(plain.state_dict())
        else:
            new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(
                plain.weight.data, requires_grad=False, quant_type="nf4"
            )
            new.bias = plain.bias
        setattr(model, name, new)
    return model.to("cpu")


def with_torchao(config):
    torch.manual_seed(0)
    model = Block()
    torchao.quantize_(model, config)
    return model


BACKBONES = {
    "bitsandbytes 8 bit": lambda: with_bitsandbytes(8),
    "bitsandbytes nf4": lambda: with_bitsandbytes(4),
    "torchao int8": lambda: with_torchao(torchao.Int8WeightOnlyConfig()),
    "torchao int4": lambda: with_torchao(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_deltas_act_train_and_leave(kind):
    model = BACKBONES[kind]()
    plain, keys = model(X), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    deltas = [
        shake(method(model, modified_modules=["up", "down"]), scale=0.1)
        for method in (LoraModel, IA3Model, AdapterModel)
    ]
    assert {p.dtype for delta in deltas for p in delta.parameters()} == {torch.float32}
    acting = model(X)
    assert not torch.allclose(acting, plain)
    acting.sum().backward()
    assert all(p.grad.abs().sum() > 0 for delta in deltas for p in delta.parameters())
    assert torch.allclose(copy.deepcopy(model)(X), acting, atol=1e-5)
    assert set(keys) < set(model.state_dict())
    for delta in deltas:
        delta.detach()
    assert torch.equal(model(X), plain)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys


def test_a_kind_that_loses_gradients_is_warned_of():
    model = with_torchao(torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(
        opendelta.LostGradientWarning, match=r"'up' is quantised so that no gradient"
    ):
        LoraModel(model, modified_modules=["down"])


def test_trying_for_gradients_runs_no_delta():
    model = BACKBONES["torchao int8"]()
    LoraModel(model, modified_modules=["up"])
    AdapterModel(model, modified_modules=["down"])
    assert opendelta.unreached(model) == ["up.deltas.lora", "down.deltas.adapter"]
