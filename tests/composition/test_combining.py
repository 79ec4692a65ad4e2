"""Arithmetic between deltas: true sums of weight changes, and how near an approximation is."""

from collections import OrderedDict
from functools import partial

import peft
import pytest
import torch
from support.models import build, logits
from support.nets import IDS, net, put, shake
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.prune import random_unstructured

import opendelta
from opendelta import AdapterModel, BitFitModel, IA3Model, LokrModel, LoraModel, OFTModel, combine
from opendelta._deltas.registry import METHODS

pytestmark = pytest.mark.covers("combine", "Combination")

SUMMABLE = ["lora", "vera", "loha", "lokr", "fourierft", "oft"]


DoraModel = partial(LoraModel, use_dora=True)


def change(model, delta, where):
    """What a delta alone does to a weight, from outside: the weight after merging less before."""
    c = opendelta.composition(model)
    before = model.get_submodule(where).weight.detach().clone()
    with c.only(delta):
        alone = [d for d in c if d is not delta]
        for other in alone:
            other.detach()
        c.merge(delta)
        after = model.get_submodule(where).weight.detach().clone()
        c.unmerge()
        for other in alone:
            other.attach()
    return (after - before).double()


def several(model, names, where="bare"):
    """Shaken deltas of these methods on one module."""
    deltas = []
    for index, name in enumerate(names):
        torch.manual_seed(index)
        delta = put(METHODS[name], model, where, name=f"{name}_{index}")
        deltas.append(shake(delta, seed=index, scale=0.2))
    return deltas


def made(delta, where="bare"):
    """The change of a weight that a LoRA makes."""
    return delta.layers[where].delta_weight().double()


@pytest.mark.parametrize("others", [["lora"], ["lokr"], SUMMABLE[1:]])
def test_linear_is_the_true_sum_across_methods(others):
    model = net().double()
    deltas = several(model, ["lora", *others])
    weights = {d.name: w for d, w in zip(deltas, (0.7, -0.3, 2.0, -1.0, 0.5, 0.1), strict=False)}
    expected = sum(
        w * change(model, d, "bare") for d, w in zip(deltas, weights.values(), strict=True)
    )
    active = [d.active for d in deltas]
    new = combine(model, weights, name="sum")
    assert torch.allclose(made(new), expected, atol=1e-10)
    assert max(new.combination.errors.values()) < 1e-10
    assert "1 of 1 modules exact" in str(new.combination)
    assert not new.active
    assert [d.active for d in deltas] == active
    plain = net().double()
    with torch.no_grad():
        plain.bare.weight += expected
    new.enable()
    with opendelta.composition(model).only("sum"):
        assert torch.allclose(model(IDS), plain(IDS), atol=1e-8)


def test_loras_are_put_side_by_side_and_keep_their_ranks():
    model = net()
    a = shake(LoraModel(model, modified_modules=["linear", "bare"], lora_r=2, name="a"))
    b = shake(LoraModel(model, modified_modules=["linear"], lora_r=3, lora_alpha=1, name="b"))
    new = combine(model, {"a": 1.0, "b": -2.0}, how="cat")
    assert new.combination.ranks == {"linear": 5, "bare": 2}
    expected = a.layers["linear"].delta_weight() - 2 * b.layers["linear"].delta_weight()
    assert torch.allclose(made(new, "linear"), expected.double(), atol=1e-6)


def test_it_gives_the_logits_of_pefts_concatenation():
    model = build("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(build("llama"), config, adapter_name="one")
    theirs.add_adapter("two", config)
    options = {"modified_modules": ["q_proj", "v_proj"], "lora_r": 4, "lora_alpha": 8}
    ours = {
        name: shake(LoraModel(model, name=name, **options), seed=seed)
        for seed, name in enumerate(["one", "two"])
    }
    for name, delta in ours.items():
        for where, layer in delta.layers.items():
            module = theirs.base_model.model.get_submodule(where)
            module.lora_A[name].weight.data.copy_(layer.lora_A)
            module.lora_B[name].weight.data.copy_(layer.lora_B)
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    combine(model, {"one": 0.7, "two": 0.4}, how="cat", name="sum").enable()
    with opendelta.composition(model).only("sum"):
        assert torch.allclose(logits(model), logits(theirs.base_model.model), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_svd_is_the_best_of_its_rank_and_says_how_near_it_is(rank):
    model = net().double()
    deltas = several(model, ["lokr", "loha", "oft"])
    expected = sum(change(model, d, "bare") for d in deltas)
    new = combine(model, {d.name: 1.0 for d in deltas}, how="svd", rank=rank)
    values = torch.linalg.svdvals(expected)
    best = values[rank:].norm() / values.norm()
    assert torch.linalg.matrix_rank(made(new)) == rank
    assert new.combination.errors["bare"] == pytest.approx(float(best), rel=1e-6)
    assert torch.allclose((made(new) - expected).norm() / expected.norm(), best)


def test_ties_trims_elects_signs_and_averages_what_agrees():
    model = net().double()
    deltas = several(model, ["lora", "lokr", "loha"])
    weights = [1.0, 0.5, -1.0]
    changes = [change(model, d, "bare") for d in deltas]
    new = combine(
        model, {d.name: w for d, w in zip(deltas, weights, strict=True)}, how="ties", density=0.4
    )
    expected = torch.zeros(8, 8, dtype=torch.float64)
    kept = []
    for values, weight in zip(changes, weights, strict=True):
        limit = values.abs().flatten().sort().values[-round(0.4 * 64)]
        kept.append(
            [[weight * float(v) if abs(v) >= limit else 0.0 for v in row] for row in values]
        )
    for i in range(8):
        for j in range(8):
            column = [table[i][j] for table in kept]
            sign = (sum(column) > 0) - (sum(column) < 0)
            same = [v for v in column if v * sign > 0]
            expected[i, j] = sum(same) / len(same) if same else 0.0
    assert torch.allclose(made(new), expected, atol=1e-10)


def test_magnitude_prune_keeps_the_largest_values():
    model = net().double()
    (delta,) = several(model, ["lokr"])
    values = change(model, delta, "bare")
    new = combine(model, {delta.name: 2.0}, how="magnitude_prune", density=0.25)
    limit = values.abs().flatten().sort().values[-16]
    assert torch.allclose(made(new), 2 * values * (values.abs() >= limit), atol=1e-10)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_keeps_the_expectation(how):
    model = net().double()
    (delta,) = several(model, ["lokr"])
    values = change(model, delta, "bare")
    total = torch.zeros_like(values)
    for seed in range(60):
        new = combine(model, {delta.name: 1.0}, how=how, density=0.5, seed=seed)
        again = combine(model, {delta.name: 1.0}, how=how, density=0.5, seed=seed)
        assert torch.equal(made(new), made(again))
        share = (made(new).abs() > 1e-9).double().mean()
        assert 0.2 < share < 0.8
        total += made(new)
        new.detach(), again.detach()
    assert (total / 60 - values).norm() / values.norm() < 0.25


@pytest.mark.parametrize(("how", "rank"), [("linear", 8), ("cat", 16)])
def test_a_rank_above_the_size_of_the_weight_is_needed_by_cat_alone(how, rank):
    model = nn.Sequential(nn.Linear(8, 8))
    shake(LoraModel(model, modified_modules=["0"], lora_r=16, name="big"))
    combined = combine(model, {"big": 1.0}, how=how)
    assert combined.combination.ranks == {"0": rank}
    assert combined.combination.errors["0"] < 1e-5


def test_what_is_no_change_of_a_weight_alone_is_refused():
    model = net()
    LoraModel(model, modified_modules=["linear"])
    AdapterModel(model, modified_modules=["linear"])
    shake(BitFitModel(model, modified_modules=["linear"]))
    shake(IA3Model(model, modified_modules=["linear"], feedforward_modules=[]))
    OFTModel(model, modified_modules=["linear"])
    LokrModel(model, modified_modules=["linear"])
    before = opendelta.composition(model).names
    for name, message in {
        "adapter": r"'adapter' \(AdapterLayer\) does not change a weight matrix alone",
        "bitfit": r"'bitfit' \(BitFitLayer\) changes the bias too",
        "ia3": r"'ia3' \(IA3Layer\) changes the bias too",
    }.items():
        with pytest.raises(opendelta.SiteError, match=message):
            combine(model, {"lora": 1.0, name: 1.0})
    with pytest.raises(opendelta.SiteError, match=r"how='cat' .* 'lokr' \(LokrLayer\) has none"):
        combine(model, {"lora": 1.0, "lokr": 1.0}, how="cat")
    assert opendelta.composition(model).names == before


class Third(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 3


class ThirdOfAnImage(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 3


class Positive(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


SCALED = [
    *((Third(6, 6, bias=False), name) for name in (*SUMMABLE, "ia3", "hra")),
    *((ThirdOfAnImage(2, 3, 1, bias=False), name) for name in ("lora", "loha")),
    *((Positive(6, 6), name) for name in ("lora", "loha", "vera")),
]


@pytest.mark.parametrize(("module", "name"), SCALED)
def test_a_module_with_a_forward_of_its_own_computes_the_same_with_the_sum(module, name):
    model = nn.Sequential(module)
    one = shake(put(METHODS[name], model, "0"))
    x = torch.randn(2, 2, 5, 6)
    before = model(x)
    new = combine(model, {one: 1.0})
    new.enable()
    with opendelta.composition(model).only(new):
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        *((Positive, method) for method in (IA3Model, OFTModel, DoraModel)),
        *((cls, DoraModel) for cls in (Third, ThirdOfAnImage)),
    ],
)
def test_a_change_of_what_such_a_module_computes_is_refused_by_name(cls, method):
    model = nn.Sequential(cls(6, 6, 1, bias=False) if cls is ThirdOfAnImage else cls(6, 6, False))
    one = shake(method(model, modified_modules=["0"]))
    before = opendelta.snapshot(model)
    with pytest.raises(opendelta.SiteError, match=rf"'0' \({cls.__name__}\): {one.name} "):
        combine(model, {one: 1.0})
    assert opendelta.snapshot(model) == before


HOLDERS = [(hold, {}) for hold in (weight_norm, spectral_norm, orthogonal)]
HOLDERS.append((random_unstructured, {"name": "weight", "amount": 3}))
held = pytest.mark.parametrize(("hold", "further"), HOLDERS)


@pytest.mark.parametrize("name", [*SUMMABLE, "ia3", "hra"])
@held
def test_a_weight_that_is_no_parameter_is_refused_by_name(hold, further, name):
    model = nn.Sequential(OrderedDict(fc=hold(nn.Linear(6, 6, bias=False), **further)))
    one = shake(put(METHODS[name], model, "fc"))
    with pytest.raises(opendelta.SiteError, match=r"'fc' .*its weight is no parameter of its own"):
        combine(model, {one: 1.0})


@held
def test_a_bias_beside_a_weight_that_is_no_parameter_is_refused_as_elsewhere(hold, further):
    model = nn.Sequential(OrderedDict(fc=hold(nn.Linear(6, 6), **further)))
    one = shake(BitFitModel(model, modified_modules=["fc"]))
    with pytest.raises(opendelta.SiteError, match=r"'fc': 'bitfit' .*changes the bias too"):
        combine(model, {one: 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "tie"}, r"must be one of linear, .*; nearest: ties"),
        ({"how": "zzz"}, r"must be one of linear, .*, magnitude_prune$"),
        ({"how": "ties"}, r"how='ties'\) needs density="),
        ({"how": "ties", "density": 1.5}, r"density must be in"),
        ({"density": 0.5}, r"keeps all values"),
        ({"how": "svd"}, r"how='svd'\) needs rank="),
        ({"how": "svd", "rank": 0}, r"rank must be at least 1"),
        ({"weights": ["lora"], "how": [0.7]}, r"weights must be a mapping .*, not \['lora'\]"),
        ({"weights": {}}, r"finite weight"),
        ({"weights": {"lora": float("nan")}}, r"finite weight"),
        ({"weights": {"lora": "0.5"}}, r"finite weight"),
    ],
)
def test_wrong_options_say_what_is_right(arguments, message):
    model = net()
    lora = LoraModel(model, modified_modules=["linear"])
    with pytest.raises(opendelta.OptionError, match=r"names 'lora' twice"):
        combine(model, {"lora": 1.0, lora: 2.0})
    with pytest.raises(opendelta.OptionError, match=message):
        combine(model, **{"weights": {"lora": 1.0}, **arguments})
    with pytest.raises(opendelta.DeltaError, match=r"no delta 'lara' is attached"):
        combine(model, {"lara": 1.0})
