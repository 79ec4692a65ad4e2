"""Random generators that somebody's own code holds draw on from where they were before a trial."""

import random

import numpy as np
import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel, LoReftModel

pytestmark = pytest.mark.covers("Delta.attach", "check", "roles")
WIDTH = 8
IDS = torch.tensor([[7, 3, 5], [1, 2, 4]])
HELD = {
    "random": lambda: random.Random(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy's old": lambda: np.random.RandomState(3),
    "torch": lambda: torch.Generator().manual_seed(3),
}
FILE = None


def state(generator):
    if isinstance(generator, random.Random):
        return repr(generator.getstate())
    if isinstance(generator, torch.Generator):
        return repr(generator.get_state().tolist())
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state())


def drawn(generator, x):
    if isinstance(generator, torch.Generator):
        return torch.rand(x.shape, generator=generator)
    draw = generator.normal if hasattr(generator, "normal") else generator.random
    return torch.full(x.shape, draw())


class Noisy(nn.Linear):
    """A layer of one's own, square, whose width no table knows."""

    def __init__(self, draw):
        super().__init__(WIDTH, WIDTH)
        self.draw = draw

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + 0.0 * self.draw(x)


class Own(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.emb, self.block, self.head = nn.Embedding(20, WIDTH), Noisy(draw), nn.Linear(WIDTH, 20)
        self.norm = OwnNorm(draw)
        self.plain = Around()

    def forward(self, input_ids):
        return self.head(self.plain(self.norm(self.block(self.emb(input_ids)))))


class OwnNorm(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.weight, self.draw = nn.Parameter(torch.ones(WIDTH)), draw

    def forward(self, x):
        return x / x.std(-1, keepdim=True) * self.weight + 0.0 * self.draw(x)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x)


def of_the_file(x):
    return drawn(FILE, x)


class Holder:
    def __init__(self, generator):
        self.generator = generator

    def __call__(self, x):
        return drawn(self.generator, x)


class Attribute(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return drawn(self.generator, x)


def hooked(generator):
    model = Own(torch.zeros_like)
    model.plain.register_forward_hook(lambda module, given, out: out + 0.0 * drawn(generator, out))
    return model


def in_file(generator):
    global FILE
    FILE = generator
    return Own(of_the_file)


PLACES = {
    "hook": hooked,
    "closure": lambda generator: Own(lambda x: drawn(generator, x)),
    "object": lambda generator: Own(Holder(generator)),
    "attribute": lambda generator: Own(Attribute(generator)),
    "file": in_file,
}


def attach(model):
    AdapterModel(model, modified_modules=["plain"])


def attach_with_inputs(model):
    AdapterModel(model, modified_modules=["plain", "block"], sample_inputs={"input_ids": IDS})


def attach_to_the_own(model):
    LoraModel(model, modified_modules=["block"])


def attach_to_the_norm(model):
    AdapterModel(model, modified_modules=["norm"])


def attach_to_tokens(model):
    LoReftModel(model, modified_modules=["plain"], first=1)


def merge(model):
    shake(LoraModel(model, modified_modules=["block"]))
    opendelta.composition(model).merge()


def check(model):
    LoraModel(model, modified_modules=["head"])
    opendelta.check(model, {"input_ids": IDS})


def check_without_inputs(model):
    LoraModel(model, modified_modules=["head"])
    opendelta.check(model)


def roles(model):
    opendelta.roles(model)


VERBS = [attach, attach_with_inputs, attach_to_the_own, attach_to_the_norm, attach_to_tokens, merge]
VERBS += [check, check_without_inputs, roles]


CASES = [(n, v) for n in HELD for v in VERBS if n == "random" or v in (attach_to_the_own, check)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("held", "verb"), CASES)
def test_a_trial_leaves_a_generator_where_it_was(held, place, verb):
    generator = HELD[held]()
    model = PLACES[place](generator)
    before = state(generator)
    verb(model)
    assert state(generator) == before


@pytest.mark.parametrize("verb", [attach_to_the_own, check])
def test_a_method_of_a_generator_is_enough(verb):
    generator = np.random.default_rng(3)
    draw, before = generator.random, state(generator)
    verb(Own(lambda x: torch.full(x.shape, draw())))
    assert state(generator) == before
