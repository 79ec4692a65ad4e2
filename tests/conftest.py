"""A network with a LoRA and an adapter on it."""

import pytest
from support.nets import net, shake

from opendelta import AdapterModel, LoraModel


@pytest.fixture
def model():
    return net()


@pytest.fixture
def lora(model):
    return shake(LoraModel(model, modified_modules=["linear"], lora_r=2))


@pytest.fixture
def adapter(model, lora):
    return shake(AdapterModel(model, modified_modules=["linear", "bare"]))
