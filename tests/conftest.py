"""A network with a LoRA and an adapter on it, and a collector that looks at new objects alone."""

import gc
from collections.abc import Iterator

import pytest
from support.nets import net, shake

from opendelta import AdapterModel, LoraModel


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
