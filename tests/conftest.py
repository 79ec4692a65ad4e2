"""A network with a LoRA and an adapter on it, and a collector that looks at new objects alone."""

import gc
from collections.abc import Iterator

import pytest
import torch
from support.nets import net, shake

from opendelta import AdapterModel, LoraModel

# For each device that is not there, torch notes the stack of each seed, which takes longer than the
# rest of many tests.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> Iterator[None]:
    """Each full collection looks through all that torch and transformers hold, which takes long."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model():
    return net()


@pytest.fixture
def lora(model):
    return shake(LoraModel(model, modified_modules=["linear"], lora_r=2))


@pytest.fixture
def adapter(model, lora):
    return shake(AdapterModel(model, modified_modules=["linear", "bare"]))
