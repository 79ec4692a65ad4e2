"""modules_to_save: the delta owns a copy of a module, which acts in the module's place."""

import copy
from collections import OrderedDict

import pytest
import torch
from support.nets import IDS, net, shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, LoraModel

pytestmark = pytest.mark.covers("DeltaConfig.modules_to_save")


def with_head(model, name="lora", **options):
    return LoraModel(
        model, modified_modules=["linear"], modules_to_save=["head"], name=name, **options
    )


def head_of(delta):
    return delta.layers["head"].module


def test_the_copy_trains_and_the_backbones_own_is_untouched():
    model = net()
    plain = model(IDS)
    with untouched(model):
        delta = with_head(model)
        assert torch.equal(model(IDS), plain)
        delta.freeze_module()
        assert all(p.requires_grad for p in head_of(delta).parameters())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(IDS).pow(2).sum().backward()
        optimizer.step()
        assert not torch.allclose(model(IDS), plain)
        with delta.disabled():
            assert torch.equal(model(IDS), plain)
        delta.detach()
        assert torch.equal(model(IDS), plain)


def test_the_copy_is_trainable_though_the_backbones_own_is_frozen():
    model = net()
    model.requires_grad_(False)
    delta = with_head(model)
    assert all(p.requires_grad for p in head_of(delta).parameters())
    assert not model.head.weight.requires_grad


@pytest.mark.covers("statistics")
def test_the_copy_counts_and_is_saved_as_the_deltas_own(tmp_path):
    model = net()
    delta = shake(with_head(model))
    names = [name for name, _ in delta.named_parameters() if name.startswith("head.")]
    assert names == ["head.deltas.lora.module.weight", "head.deltas.lora.module.bias"]
    assert opendelta.statistics(model).delta_parameters == sum(
        p.numel() for p in delta.parameters()
    )
    delta.freeze_module()
    expected = model(IDS)
    delta.save_finetuned(tmp_path)
    fresh = net(seed=5)
    fresh.load_state_dict(net().state_dict())
    torch.nn.init.normal_(fresh.head.weight)  # a fresh classifier, as from_pretrained makes it
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.equal(fresh(IDS), expected)


def test_two_tasks_with_heads_of_their_own_live_side_by_side():
    model = net()
    plain = model(IDS)
    deltas = {task: with_head(model, task) for task in ("fr", "de")}
    for seed, delta in enumerate(deltas.values()):
        shake(delta, seed=seed)
    for task, delta in deltas.items():
        alone = net()
        with_head(alone, task).load_state_dict(delta.state_dict())
        with opendelta.composition(model).only(task):
            assert torch.equal(model(IDS), alone(IDS))
    with opendelta.composition(model).only():
        assert torch.equal(model(IDS), plain)


@pytest.mark.parametrize("owner_first", [True, False])
def test_deltas_on_the_module_act_on_the_copy_whichever_came_first(owner_first):
    model = net()
    if owner_first:
        with_head(model)
    lora = shake(LoraModel(model, modified_modules=["head"], name="on_head"))
    if not owner_first:
        with_head(model)
    explanation = opendelta.composition(model).explain("head")
    assert explanation.formula == "y = lora(x) + on_head(x)"
    changed = model(IDS)
    with lora.disabled():
        assert not torch.allclose(model(IDS), changed)


def test_a_copy_holds_no_deltas():
    model = net()
    LoraModel(model, modified_modules=["head"], name="on_head")
    owned = LoraModel(model, modified_modules=["linear"], modules_to_save=["head"], name="owner")
    assert type(head_of(owned)) is torch.nn.Linear
    assert list(owned.layers["head"].state_dict()) == ["module.weight", "module.bias"]


def test_a_target_inside_an_owned_module_is_refused():
    model = net()
    with (
        untouched(model),
        pytest.raises(opendelta.AddressError, match=r"exclude_modules=\['pair'\]"),
    ):
        AdapterModel(model, modified_modules=["inner"], modules_to_save=["pair"])
    AdapterModel(model, modified_modules=["linear"], modules_to_save=["pair"])
    with pytest.raises(
        opendelta.SiteError, match=r"'pair.inner' is inside 'pair'.*would never run"
    ):
        LoraModel(model, modified_modules=["inner"])


def test_owning_a_module_around_other_deltas_is_refused():
    model = net()
    LoraModel(model, modified_modules=["inner"])
    with pytest.raises(
        opendelta.SiteError, match=r"lora on 'pair.inner' inside it would stop acting"
    ):
        AdapterModel(model, modified_modules=["linear"], modules_to_save=["pair"])
    assert opendelta.composition(model).names == ["lora"]


def test_of_owned_modules_inside_each_other_the_outermost_is_owned():
    model = net()
    delta = LoraModel(model, modified_modules=["linear"], modules_to_save=["pair", "inner"])
    assert list(delta.layers) == ["linear", "pair"]


def test_a_misspelt_module_to_save_is_refused():
    model = net()
    with untouched(model), pytest.raises(opendelta.AddressError, match=r"'haed'.*nearest: 'head'"):
        LoraModel(model, modified_modules=["linear"], modules_to_save=["haed"])


def test_a_copied_model_has_a_head_of_its_own():
    model = net()
    delta = shake(with_head(model))
    twin = copy.deepcopy(model)
    expected = twin(IDS)
    with torch.no_grad():
        head_of(delta).weight.zero_()
    assert torch.equal(twin(IDS), expected)
    assert not torch.equal(model(IDS), expected)


def test_a_module_of_two_names_is_owned_once():
    model = net()
    model.same = model.head
    delta = LoraModel(model, modified_modules=["linear"], modules_to_save=["head", "same"])
    assert list(delta.layers) == ["linear", "head"]


class Twice(nn.Module):
    """A module under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Thrice(nn.Module):
    """A list that repeats a block."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU())] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Aside(nn.Module):
    """The module is called through a list of the author's own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.kept = [self.a]

    def forward(self, x):
        return self.kept[0](x)


@pytest.mark.covers("Composition.to_backbone")
@pytest.mark.parametrize(
    ("make", "name", "others"),
    [(Twice, "a", ["b"]), (Thrice, "layers.0", ["layers.1", "layers.2"]), (Aside, "a", [])],
)
def test_a_plain_model_has_the_copy_wherever_the_module_was(make, name, others):
    torch.manual_seed(0)
    model, x = nn.Sequential(OrderedDict(part=make(), out=nn.Linear(6, 6))), torch.randn(2, 6)
    shake(LoraModel(model, modified_modules=["out"], modules_to_save=[name]))
    plain = opendelta.composition(model).to_backbone()
    torch.testing.assert_close(plain(x), model(x))
    opendelta.assert_pristine(plain)
    part = plain.part
    assert all(part.get_submodule(other) is part.get_submodule(name) for other in others)


def test_a_returning_head_follows_its_module_to_another_dtype():
    model = net()
    delta = with_head(model)
    delta.detach()
    model.to(torch.float64)
    delta.attach()
    assert head_of(delta).weight.dtype == torch.float64
    assert model(IDS).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "backbone"])
def test_a_head_has_the_dtype_of_the_delta(dtype):
    model = net().to(torch.bfloat16)
    delta = with_head(model, dtype=dtype)
    expected = torch.bfloat16 if dtype == "backbone" else getattr(torch, dtype)
    assert {p.dtype for p in delta.parameters()} == {expected}
    assert model(IDS).dtype == torch.bfloat16
