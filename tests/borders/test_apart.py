"""A run on shapes leaves no trace on the model and on what its modules hold."""

import collections
import functools
import threading
from typing import ClassVar

import pytest
import torch
import transformers
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


@functools.lru_cache
def positions(count, width):
    return torch.arange(count * width).view(count, width).float()


KEPT = {}


class FillsCaches(Block):
    """It keeps what it makes from numbers, and from what it is given, beside the module."""

    shared: ClassVar = {}

    def forward(self, x):
        if "ones" not in KEPT:
            KEPT["ones"] = x.new_ones(6).cumsum(0)
            KEPT["eye"] = torch.eye(6, dtype=x.dtype, device=x.device)
            KEPT["typed"] = torch.arange(6).to(x) + torch.tensor([1.0, 2.0]).sum()
            self.shared["line"] = torch.linspace(0, 1, 6)
        x = x + positions(*x.shape[-2:]) + KEPT["ones"] + KEPT["typed"] + self.shared["line"]
        return super().forward(x @ KEPT["eye"])


class Statistics:
    def __init__(self):
        self.mean, self.tensors, self.seen = torch.zeros(6), [torch.zeros(())], {}


class Counts(Block):
    """It counts its calls in tensors that are no buffers."""

    def __init__(self):
        super().__init__()
        self.count, self.own = torch.zeros(()), Statistics()

    def forward(self, x):
        self.count += 1
        self.own.tensors[0].add_(1)
        self.own.mean = 0.9 * self.own.mean + 0.1 * x.detach().mean((0, 1))
        self.own.seen["last"] = x
        return super().forward(x)


@pytest.mark.parametrize("verb", ["attach", "check"])
@pytest.mark.parametrize("block", [FillsCaches, Counts])
def test_no_tensor_without_values_stays_in_a_cache(block, verb):
    positions.cache_clear()
    KEPT.clear()
    FillsCaches.shared.clear()
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(6, 6), block()) for _ in range(2))
    x, state = torch.randn(2, 3, 6), torch.get_rng_state()
    delta = LoraModel(model, modified_modules=["0"])
    torch.set_rng_state(state)
    if verb == "attach":
        AdapterModel(model, modified_modules=["1"], sample_inputs=x).detach()
    else:
        opendelta.check(model, sample_inputs=x)
        assert torch.equal(torch.get_rng_state(), state)
    if block is Counts:
        assert model[1].count == 0
        assert model[1].own.tensors[0] == 0
        assert model[1].own.mean.sum() == 0
        assert not model[1].own.seen
    delta.detach()
    assert model(x).isfinite().all()
    assert other(x).isfinite().all()


def test_a_model_of_transformers_whose_positions_are_cached_computes_what_it_did():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.DINOv3ViTConfig(num_hidden_layers=1, image_size=32, **sizes)
    model, other = (transformers.DINOv3ViTModel(config).eval() for _ in range(2))
    opendelta.PrefixModel(model)
    for each in (model, other):
        assert each(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()


class Multiplies(Block):
    """It writes to its parameters, as masked, normalised and averaged ones do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 6).tril())
        self.average = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x):
        self.fc.weight.data *= self.mask
        self.average.data.mul_(0.9)
        self.average.detach().add_(0.1)
        self.fc.bias.data = 0.5 * self.fc.bias.data
        return super().forward(x) + self.average


class NeedsValues(Multiplies):
    def forward(self, x):
        return super().forward(x if float(x.detach().abs().sum()) >= 0 else 2 * x)


class Averages(Multiplies):
    """It has a buffer that the forward sets, and the average of another's weight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(6))
        self.key = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.center.data = 0.9 * self.center.data + 0.1 * x.detach().reshape(-1, 6).mean(0)
            for key, query in zip(self.key.parameters(), self.fc.parameters(), strict=True):
                key.data = 0.9 * key.data + 0.1 * query.data
        return super().forward(x) + self.key(x)


def attach(model):
    AdapterModel(model, modified_modules=["1"], bottleneck_dim=2)


def attach_with_samples(model):
    AdapterModel(model, modified_modules=["1"], sample_inputs=torch.randn(3, 6))


def check_on_shapes(model):
    opendelta.check(model)


def merge(model):
    opendelta.composition(model).merge()


def to_backbone(model):
    opendelta.composition(model).to_backbone()


@pytest.mark.covers("Composition.merge", "Composition.to_backbone")
@pytest.mark.parametrize("verb", [attach, attach_with_samples, check_on_shapes, merge, to_backbone])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", [Multiplies, NeedsValues, Averages])
def test_parameters_that_a_forward_writes_to_are_what_they_were(kind, mode, verb):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), kind()).train(mode)
    shake(LoraModel(model, modified_modules=["0"]))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (t, t.detach().clone(), t._version) for name, t in tensors.items()}
    merged = "0.weight" if verb is merge else ""
    if verb is check_on_shapes and kind is NeedsValues:
        with pytest.raises(opendelta.SiteError, match="does not run on shapes"):
            verb(model)
    else:
        verb(model)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, (tensor, values, version) in before.items():
        assert now[name] is tensor, name
        assert tensor.device.type == "cpu", name
        if name != merged:
            assert torch.equal(tensor, values), name
            assert tensor._version == version, name


class Average(nn.Linear):
    """It counts its calls, and averages its weight, in plain tensors, and keeps other things."""

    def __init__(self):
        super().__init__(6, 6)
        self.slow, self.steps = self.weight.detach().clone(), torch.zeros(())
        self.held = {"all": [torch.zeros(6)]}
        self.log, self.generator = collections.deque(maxlen=9), torch.Generator().manual_seed(0)

    def forward(self, x):
        self.steps += 1
        self.slow.mul_(0.9).add_(self.weight.detach(), alpha=0.1)
        self.held["all"][0] += 1
        self.log.append(1)
        torch.rand((), generator=self.generator)
        return super().forward(x)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (Average() for _ in range(4))
        self.own = Average().requires_grad_(False)

    def forward(self, x):
        Average.forward(self.own, x)
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return self.o(scores.softmax(-1) @ self.v(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attends() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def held(model):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Average):
            tensors = [module.steps, module.slow, module.held["all"][0]]
            found[name] = [*(t.tolist() for t in tensors), len(module.log)]
            found[name].append(module.generator.get_state().tolist())
    return found


@pytest.mark.covers("plan", "Composition.merge", "Composition.to_backbone")
@pytest.mark.parametrize("verb", ["plan", "attach", "named", "merge", "to_backbone", "check"])
def test_plain_tensors_and_objects_that_a_forward_changes_are_what_they_were(verb):
    torch.manual_seed(0)
    model = Tower()
    if verb in ("merge", "to_backbone", "check"):
        shake(LoraModel(model, modified_modules=["q"]))
    before = held(model)
    if verb == "plan":
        opendelta.plan(model, opendelta.LoraConfig(modified_modules=["q"]))
    elif verb == "attach":
        LoraModel(model)
    elif verb == "named":
        LoraModel(model, modified_modules=["q"])
    elif verb == "check":
        opendelta.check(model)
    else:
        getattr(opendelta.composition(model), verb)()
    assert held(model) == before
