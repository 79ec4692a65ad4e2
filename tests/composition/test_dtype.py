"""Dtype, device and mode of a delta: float32 or wider, or what `dtype` asks for."""

import pytest
import torch
from support.nets import IDS, net, shake
from torch import nn

from opendelta import LoraModel

pytestmark = pytest.mark.covers("DeltaConfig.dtype", "Delta.attach")


@pytest.mark.parametrize("mode", [True, False])
def test_a_new_delta_takes_the_training_flag_of_its_module(model, mode):
    model.train(mode)
    delta = LoraModel(model, modified_modules=["linear"])
    assert delta.layers["linear"].training is mode


@pytest.mark.parametrize(
    ("dtype", "to", "expected"),
    [
        (None, torch.bfloat16, torch.float32),
        (None, torch.float64, torch.float64),
        ("backbone", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float64, torch.bfloat16),
    ],
)
def test_the_dtype_of_a_delta_that_returns_to_a_converted_model(model, dtype, to, expected):
    lora = LoraModel(model, modified_modules=["linear"], dtype=dtype)
    lora.detach()
    model.to(to)
    lora.attach()
    assert {p.dtype for p in lora.parameters()} == {expected}
    assert model(IDS).dtype == to


def test_a_dtype_that_was_asked_for_stays(model):
    delta = LoraModel(model, modified_modules=["linear"], dtype=torch.float32)
    delta.detach()
    model.to(torch.bfloat16)
    delta.attach()
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    model(IDS)


def test_deltas_on_the_meta_device_take_no_memory():
    with torch.device("meta"):
        model = net()
    delta = LoraModel(model, modified_modules=["linear"])
    assert {p.device.type for p in delta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float32), ("backbone", torch.bfloat16)]
)
def test_a_quantised_module_follows_the_dtype_around_it(dtype, expected):
    class Int8Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 8
            packed = torch.randint(-8, 8, (4, 16), dtype=torch.int8)
            self.weight = nn.Parameter(packed, requires_grad=False)

        def forward(self, x):
            return x @ self.weight.view(8, 8).to(x.dtype) * 0.1

    model = net().to(torch.bfloat16)
    model.linear = Int8Linear()
    lora = shake(LoraModel(model, modified_modules=["linear"], dtype=dtype))
    assert {p.dtype for p in lora.parameters()} == {expected}
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in lora.parameters())
