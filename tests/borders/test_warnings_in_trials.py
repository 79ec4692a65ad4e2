"""What a model warns of in a trial is neither shown nor an error."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import AdapterModel, LoraModel, LoReftModel

pytestmark = pytest.mark.covers("Delta.attach", "check")
WIDTH = 8
IDS = torch.tensor([[7, 3, 5], [1, 2, 4]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 8)

    def forward(self, x):
        return x + self.fc(self.attn(x, x, x)[0])


class Recomputing(nn.Module):
    """Reentrant recomputation warns in each forward whose inputs are frozen."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, input_ids):
        warnings.warn("somebody's own", stacklevel=2)
        x = self.emb(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(x)


VERBS = {
    "width": lambda model: AdapterModel(model, modified_modules=["[r]blocks.\\d+$"]),
    "inputs": lambda model: AdapterModel(
        model, modified_modules=["[r]blocks.\\d+$"], sample_inputs={"input_ids": IDS}
    ),
    "tokens": lambda model: LoReftModel(model, modified_modules=["[r]blocks.\\d+$"], first=1),
    "roles": opendelta.roles,
    "merge": lambda model: (
        LoraModel(model, modified_modules=["fc"]),
        opendelta.composition(model).merge(),
    ),
    "check": lambda model: (LoraModel(model, modified_modules=["fc"]), opendelta.check(model)),
}


@pytest.mark.parametrize("action", ["error", "always"])
@pytest.mark.parametrize("verb", VERBS)
def test_warnings_of_a_forward_are_left_to_real_ones(verb, action):
    model, before = Recomputing().train(), list(warnings.filters)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(action)
        VERBS[verb](model)
    assert not shown
    assert warnings.filters == before
