"""A module with a size of 0 is refused by name, whatever the method."""

import pytest
import torch
from torch import nn

import opendelta
from opendelta import SiteError
from opendelta._deltas.registry import METHODS

pytestmark = [
    pytest.mark.covers("SiteError"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

EMPTY = {
    "no outputs": lambda: nn.Linear(6, 0),
    "no inputs": lambda: nn.Linear(0, 6),
    "neither": lambda: nn.Linear(0, 0),
    "no width": lambda: nn.Embedding(5, 0),
    "no rows": lambda: nn.Embedding(0, 5),
    "no channels": lambda: nn.Conv2d(3, 0, 3),
    "no input channels": lambda: nn.Conv2d(0, 3, 3),
    "norm": lambda: nn.LayerNorm(0),
    "two axes": lambda: nn.LayerNorm((0, 4)),
}


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("which", EMPTY)
def test_a_module_with_a_size_of_zero_is_refused(method, which):
    model = nn.Sequential(EMPTY[which]())
    wanted = ["0", "0"] if method is opendelta.ParallelAdapterModel else ["0"]
    with pytest.raises(SiteError, match=r"'0' \((Linear|Embedding|Conv2d|LayerNorm)\)"):
        method(model, modified_modules=wanted)
    opendelta.assert_pristine(model)


def test_a_module_of_unknown_kind_that_returns_nothing_is_refused():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(x)[..., :0]

    with pytest.raises(SiteError, match=r"'0' \(Nothing\) returns hidden states of width 0"):
        opendelta.AdapterModel(nn.Sequential(Nothing()), modified_modules=["0"])


def test_default_places_leave_it_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm, self.q, self.v = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 0)

        def forward(self, x):
            return self.q(self.layer_norm(x))

    model = nn.Sequential(Block())
    roles = {"0.q": "attn.q", "0.v": "attn.v"}
    wanted = ["attn.q", "attn.v"]
    delta = opendelta.LoraModel(model, common_structure=roles, modified_modules=wanted)
    assert list(delta.layers) == ["0.q"]
    model(torch.randn(2, 6))
