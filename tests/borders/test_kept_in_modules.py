"""What a forward changes in its modules, their parts and modes is after a trial as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opendelta

pytestmark = pytest.mark.covers("Delta.attach", "check")
WIDTH = 16
IDS = torch.tensor([[7, 3, 5], [1, 2, 4]])


class Last:
    """What code saw last, in a slot."""

    __slots__ = ("seen",)

    def __init__(self):
        self.seen = None


class Net(nn.Module):
    last = Last()

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        self.change(x)
        return self.head(x)

    def change(self, x):
        pass


class Growing(Net):
    def change(self, x):
        self.extra = nn.Linear(x.size(-1), WIDTH)


class Replacing(Net):
    def change(self, x):
        self.head = nn.Linear(WIDTH, 50)


class Hooking(Net):
    def change(self, x):
        self.head.register_forward_hook(lambda *_: None)


class Switching(Net):
    def change(self, x):
        self.head.eval()


class Freezing(Net):
    def change(self, x):
        self.embed.weight.requires_grad_(False)


class Normalising(Net):
    def change(self, x):
        self.head.weight.data = F.normalize(self.head.weight.data)


class Showing(Net):
    def change(self, x):
        self.last.seen = x


KINDS = [Growing, Replacing, Hooking, Switching, Freezing, Normalising, Showing]


def state(model):
    """All that a forward may change, by name; modules and hooks by their numbers."""
    parts = dict(model.named_modules())
    return {
        **{name: (id(m), m.training, len(m._forward_hooks)) for name, m in parts.items()},
        **{name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        **{f"{name} values": p.tolist() for name, p in model.named_parameters()},
        "last": id(Net.last.seen),
    }


@pytest.mark.parametrize("method", ["LoraModel", "ParallelAdapterModel", "LoReftModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_attaching_leaves_no_change_in_modules(kind, method):
    torch.manual_seed(0)
    model = kind()
    before = state(model)
    chosen = {"modified_modules": ["o"], "first": 1} if method == "LoReftModel" else {}
    chosen = {"modified_modules": ["q", "o"]} if method == "ParallelAdapterModel" else chosen
    getattr(opendelta, method)(model, **chosen).detach()
    assert state(model) == before


@pytest.mark.parametrize("batch", [None, {"ids": IDS}], ids=["shapes", "batch"])
@pytest.mark.parametrize("kind", [each for each in KINDS if each is not Normalising])
def test_a_check_leaves_no_change_in_modules(kind, batch):
    """Of weights it is told: a check with a batch lets what the forward writes there stay."""
    torch.manual_seed(0)
    model = kind()
    opendelta.LoraModel(model, modified_modules=["q"])
    before = state(model)
    opendelta.check(model, batch)
    assert state(model) == before
