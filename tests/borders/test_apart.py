"""A run on shapes leaves no trace on the model and on what its modules hold."""

import threading

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel

pytestmark = pytest.mark.covers("AdapterModel", "check")


class Block(nn.Module):
    """A module whose width no table knows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class CopiesToItself(Block):
    def __deepcopy__(self, memo):
        return self


class File:
    closed = False


class Closes(Block):
    """It closes a file when it is deleted."""

    def __init__(self):
        super().__init__()
        self.file = File()

    def __del__(self):
        self.file.closed = True


class Locked(Block):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


class OwnFunction(Block):
    def __init__(self):
        super().__init__()
        self.inner = lambda x: torch.tanh(self.fc(x))

    def forward(self, x):
        return self.inner(x)


class Helper:
    def __init__(self, block):
        self.block = block

    def __call__(self, x):
        return torch.tanh(self.block.fc(x))


class WithHelper(Block):
    def __init__(self):
        super().__init__()
        self.helper = Helper(self)

    def forward(self, x):
        return self.helper(x)


class Remembers(Block):
    """A hook keeps the last output on the module."""

    last = None

    def __init__(self):
        super().__init__()

        def keep(module, given, output):
            self.last = output

        self.fc.register_forward_hook(keep)


class Caches(Block):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        self.cache["x"] = x
        return super().forward(x)


@pytest.mark.parametrize("verb", ["attach", "check"])
@pytest.mark.parametrize(
    "block",
    [Block, CopiesToItself, Closes, Locked, OwnFunction, WithHelper, Remembers, Caches],
)
def test_sizes_are_found_and_the_model_is_what_it_was(block, verb):
    model = nn.Sequential(nn.Linear(6, 6), block())
    x = torch.randn(3, 6)
    shake(LoraModel(model, modified_modules=["0"]))
    wanted, before = model(x), opendelta.snapshot(model)
    last, state = getattr(model[1], "last", None), model.state_dict()
    if verb == "attach":
        delta = AdapterModel(model, modified_modules=["1"], bottleneck_dim=2)
        assert delta.layers["1"].width == 6
        delta.detach()
    else:
        assert not opendelta.check(model).unreached
    assert getattr(model[1], "last", None) is last
    assert torch.equal(model(x), wanted)
    assert opendelta.snapshot(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not getattr(model[1], "file", File).closed
    cache = getattr(model[1], "cache", None)
    assert cache is None or torch.equal(cache["x"], model[0](x))
