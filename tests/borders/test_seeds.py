"""Runs that find out what a model computes draw numbers of their own, and keep the seeds."""

import random

import numpy as np
import pytest
import torch
from support.nets import net, places_of, put, shake
from torch import nn

import opendelta
from opendelta import LoraModel, SoftPromptModel
from opendelta._deltas.registry import METHODS

DEVICES = {"cuda": torch.cuda, "xpu": torch.xpu, "mtia": torch.mtia}


@pytest.fixture
def seeded(monkeypatch):
    """The seeds that devices get, be they in use or not."""
    seeds = []
    for name, device in DEVICES.items():
        for call in ("manual_seed", "manual_seed_all"):
            note = lambda seed, name=name: seeds.append((name, seed))  # noqa: E731
            monkeypatch.setattr(device, call, note)
    torch.manual_seed(7)
    assert seeds == [(name, 7) for name in ("cuda", "xpu", "mtia")]
    seeds.clear()
    random.seed(7)
    np.random.seed(7)
    return seeds


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


class Scaled(nn.Linear):
    """A linear layer of somebody's own, whose factor is found out before a merge."""

    def forward(self, x):
        return super().forward(x) / 2


class Reader(nn.Module):
    """A decoder of somebody's own, which is tried on a few tokens."""

    def __init__(self):
        super().__init__()
        self.tok, self.q, self.drop = nn.Embedding(60, 8), Scaled(8, 8, bias=False), nn.Dropout(0.1)
        self.norm = type("OwnNorm", (nn.LayerNorm,), {"forward": nn.LayerNorm.forward})(8)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.tok(input_ids) if inputs_embeds is None else inputs_embeds
        seen = torch.ones(h.size(1), h.size(1)).bool().tril()
        if attention_mask is not None:
            seen = seen & attention_mask[:, None].bool()
        weights = (self.q(h) @ h.mT).masked_fill(~seen, -1e9).softmax(-1)
        return self.norm(h + weights @ self.drop(h))


@pytest.mark.parametrize("method", METHODS)
def test_attaching_seeds_no_device(seeded, method):
    cls, model = METHODS[method], net()
    seeded.clear()
    put(cls, model, *places_of(cls))
    assert seeded == []


def test_a_trial_a_probe_and_a_merge_seed_no_device(seeded):
    model, ids = Reader(), torch.arange(5)[None]
    shake(LoraModel(model, modified_modules=["q"]))
    prompt = SoftPromptModel(model, soft_token_num=2)
    model(ids, attention_mask=torch.ones_like(ids))
    prompt.detach()
    before = states()
    opendelta.composition(model).merge()
    opendelta.composition(model).unmerge()
    assert states() == before
    assert seeded == []
