"""In a model's own forward, torch's verbs take the deltas along; loops over modules do not."""

import copy

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.utils.checkpoint import checkpoint

from opendelta import AdapterModel, LoraModel, composition

pytestmark = pytest.mark.covers("DeltaConfig.modules_to_save")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
SITES = [["head"], ["head.a"], ["head", "head.b"]]


class Pair(nn.Module):
    """It runs `early` in its forward."""

    def __init__(self, early):
        super().__init__()
        self.a, self.b, self.early = nn.Linear(8, 8), nn.Linear(8, 8), early

    def forward(self, x):
        self.early(self, x)
        return self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))))


class Items(nn.Sequential):
    def __init__(self, early):
        super().__init__()
        self.a, self.b, self.early = nn.Linear(8, 8), nn.Linear(8, 8), early

    def forward(self, x):
        self.early(self, x)
        for part in self.children():
            x = part(x.to(part.weight.dtype))
        return x


class Linears(Pair):
    """It finds its layers among all modules, maybe in a run of checkpointing."""

    def layers(self):
        return (part for part in self.modules() if isinstance(part, nn.Linear))

    def run(self, x):
        for layer in self.layers():
            x = layer(x)
        return x / len([*self.named_modules()])

    def forward(self, x):
        return self.early(self.run, x)


class Net(nn.Module):
    def __init__(self, kind, early):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), kind(early)

    def forward(self, x):
        return self.head(self.body(x))


def adapted(model, where):
    return AdapterModel(model, modified_modules=where, sample_inputs=(X,))


def copied(model, where):
    return LoraModel(model, modified_modules=["body"], modules_to_save=where[:1])


def shown(model, where):
    return LoraModel(model, modified_modules=["body"], modules_to_save=where[:1], reads=True)


VERBS = {
    "to": lambda head, _: head.to(torch.float64),
    "double": lambda head, _: head.double(),
    "eval": lambda head, _: head.eval(),
    "train": lambda head, _: head.train(False),
    "zero_grad": lambda head, _: head.zero_grad(),
    "requires_grad_": lambda head, _: head.requires_grad_(False),
}


def look(tensors):
    return [(t.dtype, t.requires_grad, t.grad is None) for t in tensors]


def trained(kind, where, attach):
    model = Net(kind, lambda *_: None)
    attach(model, where)
    model(X).sum().backward()
    return model


@pytest.mark.parametrize("attach", [adapted, copied, shown])
@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("kind", [Pair, Items])
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_torch_s_verbs_take_the_deltas_along(verb, kind, where, attach):
    model, other = trained(kind, where, attach), trained(kind, where, attach)
    verb(other.head, X)
    model.head.early = verb
    with composition(model).only():  # so that the forward is not that of a copy
        model(X)
    assert look(model.head.parameters()) == look(other.head.parameters())
    modes = [part.training for part in model.head.modules()]
    assert modes == [part.training for part in other.head.modules()]
    assert len({*modes}) == 1


@pytest.mark.parametrize("where", SITES)
def test_parameters_and_states_in_a_forward_are_those_from_elsewhere(where):
    def note(head, _):
        head.noted = [n for n, _ in head.named_parameters()], [*head.state_dict()]
        head.load_state_dict(head.state_dict())

    model = Net(Pair, lambda *_: None)
    adapted(model, where)
    model.head.early = note
    model(X)
    head = model.head
    assert head.noted == ([n for n, _ in head.named_parameters()], [*head.state_dict()])
    assert any("deltas" in name for name in head.noted[0])


RUNS = {
    "at once": lambda run, x: run(x),
    "again, reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "again": lambda run, x: checkpoint(run, x, use_reentrant=False),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("where", SITES)
def test_a_loop_over_all_modules_meets_those_of_the_plain_model(where, run):
    model = Net(Linears, RUNS[run])
    plain = copy.deepcopy(model)
    delta = adapted(model, where)
    x = X.clone().requires_grad_()
    with delta.disabled():
        assert torch.equal(model(x), plain(x))
    shake(delta)
    model(x).sum().backward()
    found = [parameter.grad for parameter in delta.parameters()]
    model.zero_grad()
    model.head.early = RUNS["at once"]
    model(x).sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in delta.parameters()])
    assert "head.a.deltas" in dict(model.named_modules()) or where != ["head.a"]


class Counts(Pair):
    def forward(self, x):
        linears = [part for part in self.modules() if isinstance(part, nn.Linear)]
        self.train(False)
        return self.early(self.b, self.a(x) * len(linears) * len([*self.parameters()]))


@pytest.mark.parametrize("kind", [Linears, Counts])
@pytest.mark.parametrize("where", SITES)
def test_compiled_loops_and_verbs_are_the_same(where, kind):
    model = Net(kind, RUNS["at once"])
    shake(adapted(model, where))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    if kind is Counts:
        assert not any(part.training for part in model.head.modules())


def test_hooks_and_code_of_libraries_find_the_deltas():
    model = Net(Pair, lambda *_: None)
    adapted(model, ["head.a"])
    seen = []
    model.head.register_forward_hook(lambda head, *_: seen.append(len([*head.modules()])))
    model(X)
    assert seen == [len([*model.head.modules()])]
    replica = nn.DataParallel(model)
    assert torch.equal(replica(X), model(X))
