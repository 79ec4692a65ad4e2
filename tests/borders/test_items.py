"""The items of a Sequential, ModuleList or ModuleDict with deltas are its own, not its deltas."""

import copy
import operator

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import AdapterModel, LoraModel, SiteError, composition

pytestmark = pytest.mark.covers("DeltaConfig.modules_to_save")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class AList(nn.ModuleList):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class ADict(nn.ModuleDict):
    def forward(self, x):
        return torch.stack([module(x) for module in self.values()]).sum(0)


class Classes(nn.Sequential):
    """A Sequential of one's own, that gives its items by their classes, too."""

    def __getitem__(self, key):
        if isinstance(key, type):
            return [module for module in self if isinstance(module, key)]
        return super().__getitem__(key)


def layers():
    return [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]


MADE = {
    "Sequential": lambda: nn.Sequential(*layers()),
    "Classes": lambda: Classes(*layers()),
    "ModuleList": lambda: AList(layers()),
    "ModuleDict": lambda: ADict(dict(zip("abc", layers(), strict=True))),
}
LISTS = [name for name in MADE if name != "ModuleDict"]


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), MADE[name]()

    def forward(self, x):
        return self.head(self.body(x))


def by_adapter(model):
    return shake(AdapterModel(model, modified_modules=["head"], sample_inputs=(X,)))


def by_copy(model):
    return shake(LoraModel(model, modified_modules=["body"], modules_to_save=["head"]))


def both(name):
    model = Net(name)
    return model, copy.deepcopy(model)


GETS = {
    "without the last": lambda head: [*head[:-1]],
    "the last two": lambda head: [*head[-2:]],
    "the last": lambda head: [head[-1]],
    "from the second": lambda head: [*head[1:]],
    "all": list,
    "backwards": lambda head: [head[i] for i in range(len(head) - 1, -1, -1)],
    "a sum": lambda head: [*(head + head)],
}


@pytest.mark.parametrize("attach", [by_adapter, by_copy])
@pytest.mark.parametrize("name", LISTS)
def test_slices_and_places_are_those_of_the_plain_list(name, attach):
    model, plain = both(name)
    delta = attach(model)
    for get in GETS.values():
        found, expected = get(model.head), get(plain.head)
        assert [*map(str, found)] == [*map(str, expected)]
        for mine, own in zip(found, expected, strict=True):
            assert torch.equal(mine(X), own(X))
    with pytest.raises(IndexError):
        model.head[3]
    if name == "Classes":
        assert len(model.head[nn.Linear]) == 2
    assert type(model.head[:1]) is type(plain.head)
    with delta.disabled():
        assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("attach", [by_adapter, by_copy])
def test_keys_and_values_are_those_of_the_plain_dict(attach):
    model, plain = both("ModuleDict")
    delta = attach(model)
    head = model.head
    assert [*head] == [*head.keys()] == [key for key, _ in head.items()] == [*"abc"]
    assert (len(head), "a" in head, "deltas" in head) == (3, True, False)
    assert all(torch.equal(head[key](X), plain.head[key](X)) for key in head)
    with delta.disabled():
        assert torch.equal(model(X), plain(X))


CHANGES = {
    "append": lambda head: head.append(nn.ReLU()),
    "insert": lambda head: head.insert(1, nn.ReLU()),
    "extend": lambda head: head.extend([nn.ReLU(), nn.Tanh()]),
    "pop": lambda head: head.pop(-1),
    "set": lambda head: operator.setitem(head, -1, nn.ReLU()),
    "delete": lambda head: operator.delitem(head, -1),
    "delete two": lambda head: operator.delitem(head, slice(-2, None)),
    "add": lambda head: operator.iadd(head, nn.Sequential(nn.ReLU())),
    "add by name": lambda head: head.add_module("3", module=nn.ReLU()),
    "register": lambda head: head.register_module("1", nn.ReLU()),
    "set by name": lambda head: setattr(head, "1", nn.ReLU()),
    "set anew": lambda head: setattr(head, "3", nn.ReLU()),
    "set to none": lambda head: setattr(head, "2", None) or head.pop(2),
    "delete by name": lambda head: delattr(head, "2"),
    "set inside": lambda head: head.set_submodule("1", nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", LISTS)
def test_a_list_with_deltas_is_changed_as_the_plain_one(name, change):
    model, plain = both(name)
    delta = by_adapter(model)
    change(model.head)
    change(plain.head)
    model.head.append(nn.Identity())
    plain.head.append(nn.Identity())
    kept = [key for key, _ in model.head.named_children() if key != "deltas"]
    assert kept == [key for key, _ in plain.head.named_children()]
    assert [*map(str, model.head)] == [*map(str, plain.head)]
    changed = model(X)
    delta.detach()
    assert torch.equal(model(X), plain(X))
    assert not torch.equal(changed, plain(X))


def test_a_dict_with_deltas_is_changed_as_the_plain_one():
    model, plain = both("ModuleDict")
    delta = by_adapter(model)
    for head in (model.head, plain.head):
        head["d"] = nn.Identity()
        head.update({"e": nn.Tanh()})
        del head["a"]
        head.pop("b")
    assert not torch.equal(model(X), plain(X))
    delta.detach()
    assert torch.equal(model(X), plain(X))
    assert [*model.head] == [*"cde"]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_list_of_which_a_delta_has_a_copy_is_not_changed(change):
    model, plain = both("Sequential")
    by_copy(model)
    with pytest.raises(SiteError, match=r"'lora' has a copy of this Sequential, whose items would"):
        change(model.head)
    assert [*map(str, model.head)] == [*map(str, plain.head)]


class Grows(nn.Sequential):
    """Its forward makes its last item; other attributes come and go."""

    def forward(self, x):
        if len(self) < 2:
            torch.manual_seed(1)
            self.add_module("1", nn.Linear(8, 8))
        self.seen = x.shape
        del self.seen
        return super().forward(x)


@pytest.mark.parametrize("reads", [False, True])
def test_a_forward_may_still_make_items_and_other_code_wrap_them(reads):
    model = Net("Sequential")
    model.head = Grows(nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    delta = LoraModel(model, modified_modules=[], modules_to_save=["head"], reads=reads)
    with delta.disabled():
        assert torch.equal(model(X), plain(X))
    assert torch.equal(model(X), plain(X))
    model.head.note, model.head.none = "a note", None
    del model.head.note
    setattr(model.head, "0", nn.Sequential(model.head._modules["0"]))
    with delta.disabled():
        assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("reads", [False, True])
def test_with_reads_the_items_are_the_copy_s(reads):
    model, plain = both("Sequential")
    delta = LoraModel(model, modified_modules=[], modules_to_save=["head"], reads=reads)
    shake(delta)
    shown = nn.Sequential(*[model.head[i] for i in range(3)])(X)
    assert torch.equal(shown, model.head[2](model.head[:2](X)))
    assert torch.equal(shown, model.head(X)) == reads
    with composition(model).only():
        assert torch.equal(model.head[2](model.head[:2](X)), plain.head(X))


@pytest.mark.parametrize("attach", [by_adapter, by_copy])
@pytest.mark.parametrize("name", LISTS)
def test_slices_are_compiled_into_one_graph(name, attach):
    model, _ = both(name)
    attach(model)

    def features(x):
        return model.head[2](model.head[1](model.head[0](x))) + model.head(x) * len(model.head)

    assert torch.allclose(torch.compile(features, backend="eager", fullgraph=True)(X), features(X))


def test_all_that_was_changed_is_pristine_after_the_deltas_left():
    model, plain = both("Sequential")
    delta = by_adapter(model)
    model.head[:2](X)
    delta.detach()
    opendelta.assert_pristine(model)
    assert [*map(str, model.head)] == [*map(str, plain.head)]


class Branches(nn.Module):
    """A module whose forward goes over its children, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls, self.last = 0, None

    def each(self):
        return [part for _, part in self.named_children()]

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return sum(part(x) for part in self.children()) + self.each()[-1](x)


class ByParts(Branches):
    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return torch.stack([part(x) for part in self._modules.values()]).prod(0)


class Inherits(Branches):
    def forward(self, x):
        return super().forward(x) * 2


class ByAFunction(Branches):
    @property
    def parts(self):
        return self.each()

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return summed(self, x) + self.parts[-1](x)


def summed(module, x):
    return sum(part(x) for part in module.children())


class Residual(nn.Sequential):
    calls, last = 0, None

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        for part in self._modules.values():
            x = x + part(x)
        return x


class Numbered(AList):
    calls, last = 0, None

    def __init__(self):
        super().__init__(layers())

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return sum(self._modules[str(n)](x) for n in range(len(self._modules)))


class Noted(Branches):
    """Hooks on the children write to the module, and a child reads what its forward has set."""

    def __init__(self):
        super().__init__()
        self.sum, self.own = 0, [self]
        self.a.register_forward_hook(self.note)
        self.b.register_forward_pre_hook(lambda _, args: (args[0] + self.last,))

    def note(self, module, args, output):
        self.sum = self.sum + output

    def forward(self, x):
        self.calls, self.last, self.sum = self.calls + 1, x * 2, 0
        self.b(self.a(x))
        return self.sum + sum(part(x) for part in self.children())


class BuiltLate(Branches):
    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        if not hasattr(self, "late"):
            torch.manual_seed(1)
            self.late = nn.Linear(8, 8)
            self.add_module("later", nn.Linear(8, 8))
        return sum(part(x) for part in self.children())


LOOPS = [Branches, ByParts, Inherits, ByAFunction, Residual, Numbered, Noted, BuiltLate]


@pytest.mark.parametrize("attach", [by_adapter, by_copy])
@pytest.mark.parametrize("kind", LOOPS)
def test_a_forward_that_goes_over_its_children_meets_no_deltas_there(kind, attach):
    model = Net("Sequential")
    model.head = kind()
    expected = model(X)
    delta = attach(model)
    calls = model.head.calls
    with delta.disabled():
        for _ in range(2):
            assert torch.equal(model(X), expected)
    assert model.head.calls == calls + 2
    assert model.head.last.shape == X.shape
    with torch.no_grad():
        changed = model(X)
        assert not torch.allclose(changed, expected)
        assert torch.equal(model(X), changed)
        # torch.compile takes no hook that writes to another module
        if kind is not Noted and attach is by_adapter:
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="eager")
            assert torch.allclose(compiled(X), changed)
    assert "deltas" in dict(model.head.named_children())
    delta.detach()
    assert torch.equal(model(X), expected)


class Again(Branches):
    """Its loop is run once more in the backward, outside of its forward."""

    reentrant = True

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attach", [by_adapter, by_copy])
def test_a_loop_that_checkpointing_runs_again_meets_no_deltas(attach, reentrant, monkeypatch):
    monkeypatch.setattr(Again, "reentrant", reentrant)
    model = Net("Sequential")
    model.head = Again()
    delta = attach(model)

    def gradients(x):
        model.zero_grad()
        model(x).pow(2).sum().backward()
        return [p.grad for p in model.parameters()]

    x = X.clone().requires_grad_()
    found, found_x = gradients(x), x.grad
    monkeypatch.setattr(Again, "forward", Branches.forward)
    plain_x = X.clone().requires_grad_()
    expected = gradients(plain_x)
    torch.testing.assert_close(found_x, plain_x.grad)
    torch.testing.assert_close(found, expected)
    assert any(g is not None and g.any() for g in [p.grad for p in delta.parameters()])


class Rebuilds(Branches):
    """It changes its table of children in its forward."""

    def forward(self, x):
        if "late" not in self._modules:
            torch.manual_seed(1)
            self._modules.update(late=nn.Linear(8, 8))
            self._modules.setdefault("later", nn.Linear(8, 8))
            self._modules.setdefault("late", nn.Identity())
            gone = self._modules.pop("a", None)
            self._modules["b2"] = gone
        return sum(part(x) for part in self.children())


def test_children_that_a_forward_changes_are_those_of_the_module():
    model = Net("Sequential")
    model.head = Rebuilds()
    plain = copy.deepcopy(model)
    delta = by_adapter(model)
    with delta.disabled():
        assert torch.equal(model(X), plain(X))
        assert torch.equal(model(X), plain(X))
    delta.detach()
    assert [*model.state_dict()] == [*plain.state_dict()]


# what hooks of `Noted` keep is of all rows, so that it is refused
@pytest.mark.parametrize("kind", [kind for kind in LOOPS if kind is not Noted])
@pytest.mark.parametrize("reads", [False, True])
def test_rows_without_the_copy_meet_no_deltas_either(kind, reads):
    model = Net("Sequential")
    model.head = kind()
    expected = model(X)
    shake(LoraModel(model, modified_modules=[], modules_to_save=["head"], reads=reads))
    with opendelta.route(model, ["lora", None, None]):
        out = model(X)
    assert torch.allclose(out[1:], expected[1:], atol=1e-6)
    assert not torch.allclose(out[:1], expected[:1])
