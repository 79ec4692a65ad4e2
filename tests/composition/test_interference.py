"""`interference` against computations by hand, its errors, and a model that is left as it was."""

import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from support.nets import IDS, Scaled, net, put, shake, small
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    AverageModel,
    BitFitModel,
    DeltaError,
    LNTuningModel,
    LoraModel,
    OFTModel,
    OptionError,
    SoftPromptModel,
    composition,
    interference,
)
from opendelta._deltas.registry import METHODS
from opendelta.studies import conditions

pytestmark = pytest.mark.covers("interference", "InterferenceReport")

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [X[:3], X[3:]]  # of 3 and 5 rows


def power(outputs, batch):
    return outputs.square().mean()


def array(tensor):
    return tensor.detach().numpy()


@pytest.fixture
def three():
    """A LoRA and an adapter on the first of two linear modules, and a LoRA on the second."""
    model = small().double()
    deltas = [
        LoraModel(model, modified_modules=["0"], lora_r=2, name="a"),
        AdapterModel(model, modified_modules=["0"], bottleneck_dim=3, name="b"),
        LoraModel(model, modified_modules=["2"], lora_r=2, name="c"),
    ]
    for seed, delta in enumerate(deltas):
        shake(delta, seed=seed)
    return model


def lora(layer, x):
    config = layer.record.config
    return config.lora_alpha / config.lora_r * x @ array(layer.lora_A).T @ array(layer.lora_B).T


def first(model, acting, x):
    """The output of the first module of `three`, with what acts on it in this order."""
    h = x @ array(model[0].weight).T + array(model[0].bias)
    for name in acting:
        layer = model[0].deltas[name]
        if name == "a":
            h = h + lora(layer, x)
        else:
            t = torch.tensor(h @ array(layer.down_proj.weight).T + array(layer.down_proj.bias))
            t = array(nn.functional.gelu(t, approximate="tanh"))
            h = h + t @ array(layer.up_proj.weight).T + array(layer.up_proj.bias)
    return h


def second(model, acting, h):
    out = np.tanh(h) @ array(model[2].weight).T + array(model[2].bias)
    return out + lora(model[2].deltas["c"], np.tanh(h)) if "c" in acting else out


def by_hand(model, acting, x):
    """The output of `three` as numpy computes it; `acting` is in the order of acting."""
    return second(model, acting, first(model, [name for name in acting if name != "c"], x))


def score(model, *acting):
    """The mean over batches, weighted by rows."""
    means = [(by_hand(model, acting, array(x)) ** 2).mean() for x in BATCHES]
    return (3 * means[0] + 5 * means[1]) / 8


# ------------------------------------------------------------------------------------- the scores
def test_scores_and_synergies_are_those_computed_by_hand(three):
    report = interference(three, BATCHES, power)
    s = {names: score(three, *names) for names in ("", "a", "b", "c", "ab", "ac", "bc", "abc")}
    assert report.deltas == ["a", "b", "c"]
    assert (report.batches, report.rows, report.runs) == (2, 8, 2 * (8 + 1))
    assert report.score == pytest.approx(s["abc"])
    assert report.none == pytest.approx(s[""])
    assert report.alone == pytest.approx({"a": s["a"], "b": s["b"], "c": s["c"]})
    assert report.without == pytest.approx({"a": s["bc"], "b": s["ac"], "c": s["ab"]})
    assert report.gains == pytest.approx({i: s[i] - s[""] for i in "abc"})
    assert report.costs["b"] == pytest.approx(s["abc"] - s["ac"])
    pairs = {("a", "b"): "ab", ("a", "c"): "ac", ("b", "c"): "bc"}
    assert report.pairs == pytest.approx({pair: s[both] for pair, both in pairs.items()})
    assert report.synergies == pytest.approx(
        {(i, j): s[both] - s[i] - s[j] + s[""] for (i, j), both in pairs.items()}
    )
    swapped = score(three, "b", "a", "c")
    assert report.order_changes == pytest.approx(
        {("a", "b"): swapped - s["abc"], ("b", "c"): 0.0}  # b and c share no module
    )
    assert abs(report.order_changes["a", "b"]) > 1e-3


def test_each_part_can_be_left_out_and_deltas_chosen(three):
    report = interference(three, BATCHES, power, pairs=False, orders=False, overlap=False)
    assert (report.pairs, report.swaps, report.overlaps, report.shifts) == ({}, {}, {}, {})
    assert report.runs == 2 * 8
    chosen = interference(three, BATCHES, power, deltas=["b", composition(three)["a"]])
    assert chosen.deltas == ["a", "b"]
    assert chosen.score == pytest.approx(score(three, "a", "b"))
    assert chosen.runs == 2 * (4 + 1)
    composition(three)["a"].disable()
    assert interference(three, BATCHES, power).deltas == ["b", "c"]
    assert interference(three, BATCHES, power, deltas="a").alone == pytest.approx(
        {"a": score(three, "a")}
    )
    with composition(three).only("b"):
        assert interference(three, BATCHES, power).deltas == ["b"]


def test_deltas_that_only_add_are_not_exchanged():
    model = small()
    for name in "ab":
        shake(LoraModel(model, modified_modules=["0"], name=name))
    report = interference(model, [X.float()], power)
    assert report.order_changes == {("a", "b"): 0.0}
    assert report.runs == 4


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_number_of_forwards_is_as_documented(count):
    model, calls = small(), []
    for index in range(count):
        AdapterModel(model, modified_modules=["0"], bottleneck_dim=2, name=f"d{index}")
    model.register_forward_hook(lambda *_: calls.append(1))
    report = interference(model, [X.float()], power)
    wanted = 2 if count == 1 else 1 + 3 * count + count * (count - 1) // 2
    assert len(calls) == report.runs == wanted


def test_a_block_combines_those_of_its_deltas_that_act(three):
    AverageModel(three, deltas=["a", "b"], weights=[0.25, 2.0], name="mean")

    def squares(x, *acting):
        h = first(three, [], x)
        parts = {"a": 0.25, "b": 2.0}
        h = h + sum(w * (first(three, [n], x) - h) for n, w in parts.items() if n in acting)
        return (second(three, acting, h) ** 2).mean()

    def s(*acting):
        return sum(len(x) * squares(array(x), *acting) for x in BATCHES) / 8

    report = interference(three, BATCHES, power)
    assert report.deltas == ["a", "b", "c"]
    assert report.alone == pytest.approx({"a": s("a"), "b": s("b"), "c": s("c")})
    assert report.pairs["a", "b"] == pytest.approx(s("a", "b"))
    assert report.without["a"] == pytest.approx(s("b", "c"))
    assert list(report.order_changes) == [("c", "mean")]  # c comes before the block
    whole = interference(three, BATCHES, power, deltas=["mean", "c"])
    assert whole.deltas == ["c", "mean"]
    assert whole.alone["mean"] == pytest.approx(s("a", "b"))
    with pytest.raises(DeltaError, match="'a' twice, by itself or in a block"):
        interference(three, BATCHES, power, deltas=["mean", "a"])


# ------------------------------------------------------------------------------------- the overlap
def planted(model, name, where, *parts):
    """A LoRA whose change of a weight is the sum of s u v^T over (s, u, v)."""
    delta = LoraModel(model, modified_modules=[where], lora_r=len(parts), lora_alpha=len(parts),
                      name=name)  # fmt: skip
    layer = delta.layers[where]
    with torch.no_grad():
        layer.lora_A.copy_(torch.stack([v for _, _, v in parts]))
        layer.lora_B.copy_(torch.stack([s * u for s, u, _ in parts], 1))
    return delta


def test_angles_are_those_that_were_planted_and_small_directions_do_not_count():
    model = nn.Sequential(nn.Linear(6, 6)).double()
    e = torch.eye(6, dtype=torch.float64)
    turn = math.radians(30)
    turned = math.cos(turn) * e[0] + math.sin(turn) * e[1]
    planted(model, "a", "0", (1.0, e[0], e[0]), (0.9, e[2], e[3]))
    planted(model, "b", "0", (2.0, turned, e[0]), (0.1, e[5], e[5]))  # 0.25% of |D|^2
    both = interference(model, [X], power).overlaps["a", "b"]["0"]
    assert both.columns.angles == pytest.approx([30.0])
    assert both.rows.angles == pytest.approx([0.0], abs=1e-6)
    assert both.columns.shared == pytest.approx(0.75)
    assert both.columns.chance == pytest.approx(2 / 6)
    wanted = 2 * math.cos(turn) / math.sqrt((1 + 0.81) * (4 + 0.01))
    assert both.cosine == pytest.approx(wanted)


@pytest.mark.parametrize(
    "names", [("lora", "lokr"), ("loha", "oft"), ("ia3", "hra"), ("vera", "fourierft")]
)
@pytest.mark.parametrize("where", ["linear", "conv1d"])
def test_overlap_is_that_of_the_changes_that_merging_makes(names, where):
    model, deltas, changes = net().double(), [], []
    for seed, name in enumerate(names):
        extra = {"feedforward_modules": [where]} if name == "ia3" else {}
        delta = shake(put(METHODS[name], model, where, name=f"d{seed}", **extra), seed=seed)
        module = model.get_submodule(where)
        before = module.weight.detach().clone()
        composition(model).merge(delta)
        D = array(module.weight - before)
        changes.append(D.T if where == "conv1d" else D)
        composition(model).unmerge()
        delta.detach()
        deltas.append(delta)
    for delta in deltas:
        delta.attach()
    report = interference(model, [IDS], power)
    assert report.deltas == ["d0", "d1"]
    one, two = changes
    both = report.overlaps["d0", "d1"][where]
    assert both.cosine == pytest.approx(
        (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    )
    for found, side in ((both.columns, lambda D: D), (both.rows, lambda D: D.T)):
        bases = [basis(side(D)) for D in changes]
        cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(0, 1)
        assert np.cos(np.radians(found.angles)) == pytest.approx(cosines, abs=1e-9)
        assert found.shared == pytest.approx((cosines**2).mean())


def basis(D):
    """The first left singular vectors, as many as hold 99% of the squares."""
    U, S, _ = np.linalg.svd(D)
    count = 1 + np.flatnonzero((S**2).cumsum() >= 0.99 * (S**2).sum())[0]
    return U[:, :count]


def test_over_several_modules_the_cosine_is_that_of_one_long_vector():
    model = small().double()
    deltas = [LoraModel(model, modified_modules=["0", "2"], lora_r=2, name=n) for n in "ab"]
    for seed, delta in enumerate(deltas):
        shake(delta, seed=seed)
    other = shake(LoraModel(model, modified_modules=["2"], lora_r=1, name="c"))
    report = interference(model, BATCHES, power, pairs=False)
    one, two = (
        np.concatenate([array(d.layers[w].delta_weight()).ravel() for w in ("0", "2")])
        for d in deltas
    )
    assert report.cosines["a", "b"] == pytest.approx(
        one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    )
    parts = report.overlaps["a", "b"]
    assert list(parts) == ["0", "2"]
    assert list(report.overlaps["b", "c"]) == ["2"]
    assert other.name == "c"
    means = [each.columns.shared for each in parts.values()]
    assert report.column_overlap["a", "b"] == pytest.approx(sum(means) / 2)


def test_a_block_of_constant_weights_that_is_named_changes_a_weight_as_one_delta():
    model = small().double()
    deltas = [LoraModel(model, modified_modules=["0"], lora_r=2, name=n) for n in "abc"]
    for seed, delta in enumerate(deltas):
        shake(delta, seed=seed)
    AverageModel(model, deltas=["a", "b"], weights=[0.25, 2.0], name="mean")
    a, b, c = (array(delta.layers["0"].delta_weight()) for delta in deltas)
    mean = 0.25 * a + 2.0 * b
    report = interference(model, BATCHES, power, deltas=["mean", "c"])
    wanted = (mean * c).sum() / np.linalg.norm(mean) / np.linalg.norm(c)
    assert report.cosines == pytest.approx({("c", "mean"): wanted})


def test_deltas_without_a_change_of_a_weight_have_shifts_alone():
    model = net()
    LoraModel(model, modified_modules=["linear"], name="new")  # changes nothing yet
    shake(LoraModel(model, modified_modules=["linear"], name="lora"))
    shake(LoraModel(model, modified_modules=["linear"], name="gated", gate=True))
    shake(AdapterModel(model, modified_modules=["linear"], name="adapter"))
    shake(BitFitModel(model, modified_modules=["linear"], name="bias"))
    shake(put(METHODS["prefix"], model, "attention", name="prefix"))
    for name in ("norm", "norm2"):
        shake(LNTuningModel(model, modified_modules=["norm"], name=name), seed=len(name))
    report = interference(model, [IDS], power, pairs=False, orders=False)
    assert list(report.overlaps) == [("norm", "norm2")]  # a vector, which spans no space
    both = report.overlaps["norm", "norm2"]["norm"]
    assert both.columns is None
    assert both.rows is None
    assert report.column_overlap == {}
    assert report.shifts["new"]["norm"] == 0
    assert all(report.shifts[name]["norm"] > 0 for name in report.deltas if name != "new")
    assert report.shifts["prefix"].keys() == {"linear", "attention", "norm"}
    assert report.shifts["prefix"]["linear"] == 0
    assert report.not_compared == []


def test_a_delta_of_a_bias_changes_no_weight_that_is_parametrized():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    shake(BitFitModel(model, modified_modules=["[r]^0$"]))
    shake(LoraModel(model, modified_modules=["[r]^0$"]))
    report = interference(model, [X.float()], power, pairs=False, orders=False)
    assert report.overlaps == {}
    assert report.not_compared == []


def test_a_weight_that_cannot_be_read_is_named_and_the_rest_compared():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    model = nn.Sequential(Odd(6, 6), Scaled(6, 6))
    for name in "ab":
        shake(OFTModel(model, modified_modules=["0"], oft_block_size=2, name=name))
        shake(LoraModel(model, modified_modules=["1"], name=f"{name}1"))
    report = interference(model, [X.float()], power, orders=False)
    assert list(report.overlaps) == [("a1", "b1")]
    assert "the weight change of a on '0'" in report.not_compared[0]
    assert "not compared: the weight change of a" in str(report)


# -------------------------------------------------------------------------------------- the shifts
def test_shifts_are_mean_lengths_of_changes_over_tokens_that_are_no_padding():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            h = self.first(x)
            h.add_(1.0)  # in place, after the hooks
            return self.second(h.relu_())

    torch.manual_seed(0)
    model = Tokens().double()
    lora = shake(LoraModel(model, modified_modules=["first"], lora_r=2, name="a"))
    shake(AdapterModel(model, modified_modules=["second"], name="b"))
    masks = [torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 1, 1]])]
    batches = [
        {"x": torch.randn(*mask.shape, 4).double(), "attention_mask": mask} for mask in masks
    ]
    report = interference(model, batches, power)
    D = array(lora.layers["first"].delta_weight())
    W, V = array(model.first.weight), array(model.second.weight)
    b, d = array(model.first.bias), array(model.second.bias)
    sums = {"first": [0.0, 0.0], "second": [0.0, 0.0]}
    for batch in batches:
        for token in array(batch["x"][batch["attention_mask"].bool()]):
            plain, moved = W @ token + b, (W + D) @ token + b
            outs = [V @ np.maximum(h + 1, 0) + d for h in (plain, moved)]
            for where, (old, new) in (("first", (plain, moved)), ("second", outs)):
                sums[where][0] += np.linalg.norm(new - old)
                sums[where][1] += np.linalg.norm(old)
    assert report.shifts["a"] == pytest.approx({w: moved / h for w, (moved, h) in sums.items()})
    assert report.shifts["b"]["first"] == 0


def test_the_width_of_an_image_is_that_of_its_channels():
    model = net().double()
    delta = shake(BitFitModel(model, modified_modules=["conv2d"]))
    seen = []
    model.conv2d.register_forward_hook(lambda *args: seen.append(args[-1]))
    report = interference(model, [IDS], power, pairs=False)
    plain = array(seen[0])
    change = np.linalg.norm(array(delta.layers["conv2d"].bias))
    wanted = change / np.linalg.norm(plain, axis=1).mean()
    assert report.shifts[delta.name]["conv2d"] == pytest.approx(wanted)


def test_a_prompt_makes_other_outputs_which_are_named():
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    SoftPromptModel(model, soft_token_num=3, name="prompt")
    shake(LoraModel(model, modified_modules=["query"], name="lora"))
    batch = {"input_ids": torch.randint(5, 99, (2, 7)), "labels": torch.tensor([0, 1])}
    report = interference(model, [batch])
    assert report.metric == "loss"
    assert report.score == pytest.approx(model.eval()(**batch).loss.item())
    (told,) = [line for line in report.not_compared if "query" in line]
    assert "with prompt: the output is [2, 10, 16] with the delta, [2, 7, 16] without" in told
    assert len(report.shifts["lora"]) > 0


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=99,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    shake(LoraModel(model, modified_modules=["wo"], name="lora"))
    batch = {
        "input_ids": torch.randint(5, 99, (2, 4)),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]),
        "labels": torch.randint(5, 99, (2, 4)),
    }
    found = interference(model, [batch]).shifts["lora"]
    outs = {where: [] for where in found}
    model.eval()
    for where in found:
        model.get_submodule(where).register_forward_hook(
            lambda _m, _a, out, where=where: outs[where].append(out.detach())
        )
    for names in ((), ("lora",)):
        with composition(model).only(*names):
            model(**batch)
    for where, (plain, moved) in outs.items():
        mask = torch.ones(2, 4) if "decoder" in where else batch["attention_mask"]
        change, size = ((t.norm(dim=-1) * mask).sum() for t in (moved - plain, plain))
        assert found[where] == pytest.approx(float(change / size), rel=1e-5)


# ------------------------------------------------------------------------------ batches and metrics
def test_batches_are_read_once_so_a_generator_is_fine(three):
    wanted = interference(three, BATCHES, power).to_dict()
    assert interference(three, iter(BATCHES), power).to_dict() == wanted
    used = iter(BATCHES)
    list(used)
    with pytest.raises(OptionError, match="batches is empty, as a generator is that was read"):
        interference(three, used, power)


def test_batches_may_hold_more_than_arguments(three):
    data = torch.utils.data.TensorDataset(X, torch.arange(8) % 2)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    state = torch.get_rng_state()
    report = interference(
        three,
        loader,
        lambda out, batch: (out.argmax(-1) == batch[1]).double().mean().numpy(),
        forward=lambda model, batch: model(batch[0]),
    )
    labels = np.arange(8) % 2
    right = by_hand(three, "abc", array(X)).argmax(-1) == labels
    assert report.score == pytest.approx(right.mean())
    assert torch.equal(torch.get_rng_state(), state)


def test_all_runs_of_a_batch_have_the_same_random_numbers(three):
    drawn = []
    interference(
        three,
        BATCHES,
        lambda out, x: (
            drawn.append((random.random(), torch.rand(1).item(), np.random.rand())) or 1.0
        ),
    )
    assert len(set(drawn)) == 1


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (math.nan, r"gave nan for batch 1 with \['a', 'b', 'c'\] acting"),
        (torch.tensor(math.inf), r"gave tensor\(inf\) for batch 1 with \['a', 'b', 'c'\] acting"),
        (torch.ones(3, 2), r"gave a Tensor \[3, 2\] for batch 1 .* must be one number"),
        (None, "gave None for batch 1"),
        ("0.5", "gave '0.5' for batch 1"),
        (1j, "gave 1j for batch 1"),
    ],
)
def test_a_metric_that_is_no_finite_number_is_named_with_its_batch(three, value, wrong):
    def metric(outputs, batch):
        acting = [delta for delta in composition(three) if delta.active]
        return value if len(batch) == 5 and len(acting) == 3 else 1.0

    with pytest.raises(OptionError, match=wrong):
        interference(three, BATCHES, metric)


def test_what_cannot_be_measured_is_refused_before_the_first_forward(three):
    def never(*_):
        raise AssertionError

    three.register_forward_pre_hook(never)
    for batches, wrong in (
        ({"x": X}, r"not one dict: pass a list, such as \[batch\]"),
        (X, r"not one Tensor: pass a list"),
        (3, "must be a list of batches"),
    ):
        with pytest.raises(OptionError, match=wrong):
            interference(three, batches, power)
    with pytest.raises(OptionError, match="metric='acc' must be a function"):
        interference(three, BATCHES, "acc")
    with pytest.raises(OptionError, match="batch=3 must be the arguments"):
        interference(three, [3], power)
    with pytest.raises(DeltaError, match="no delta 'd' is attached"):
        interference(three, BATCHES, power, deltas=["d"])
    with pytest.raises(DeltaError, match="must be a list of deltas"):
        interference(three, BATCHES, power, deltas=3)
    with (
        pytest.raises(DeltaError, match=r"inside opendelta.route\(\)"),
        opendelta.route(three, ["a", "b"]),
    ):
        interference(three, BATCHES, power)
    composition(three).merge("a")
    with pytest.raises(DeltaError, match=r"cannot switch 'a': it is merged .*unmerge\(\) first"):
        interference(three, BATCHES, power, deltas=["b"])
    composition(three).unmerge()
    for delta in composition(three):
        delta.disable()
    with pytest.raises(
        DeltaError, match=r"no delta acts on Sequential: attached are \['a', 'b', 'c"
    ):
        interference(three, BATCHES, power)
    with torch.device("meta"):
        empty = small()
    LoraModel(empty, modified_modules=["0"])
    with pytest.raises(DeltaError, match="meta device"):
        interference(empty, BATCHES, power)


def test_a_model_without_a_loss_is_told_what_to_do(three):
    with pytest.raises(
        OptionError, match=r"returned a Tensor without a loss for batch 0 with no d"
    ):
        interference(three, BATCHES)
    report = interference(three, BATCHES, forward=lambda model, x: model(x).square().mean())
    assert report.score == pytest.approx(score(three, "a", "b", "c"))


# ------------------------------------------------------------------------------ left as it was
def state(model):
    """All that a study may not change, outside of the library's own words."""
    modules = {}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not isinstance(v, dict | set)}
        sets = {k: sorted(v) for k, v in vars(module).items() if isinstance(v, set)}
        tables = {
            k: [(key, id(v)) for key, v in table.items()]
            for k, table in vars(module).items()
            if isinstance(table, dict)
        }
        modules[name] = type(module), {k: id(v) for k, v in own.items()}, tables, sets
    tensors = {k: (t.detach().clone(), t.requires_grad, t.grad) for k, t in
               [*model.named_parameters(), *model.named_buffers()]}  # fmt: skip
    records = [(d.name, d.active, d.scale, d.record.rank) for d in composition(model)]
    return modules, tensors, records, [m.training for m in model.modules()]


def same(one, other):
    tensors, others = one[1], other[1]
    assert tensors.keys() == others.keys()
    for key, (values, *flags) in tensors.items():
        assert torch.equal(values, others[key][0])
        assert flags == list(others[key][1:])
    assert (one[0], *one[2:]) == (other[0], *other[2:])


class Counting(nn.Module):
    """A net with statistics and a count of its runs that it keeps as an attribute."""

    def __init__(self):
        super().__init__()
        self.net, self.norm, self.runs = net(), nn.BatchNorm1d(3), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        self.runs += 1
        self.seen += 1
        self.cache = self.net(ids)
        return self.norm(self.cache.mean(1)) + torch.rand(())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore::opendelta.SharedDeltaWarning")
def test_a_model_is_left_as_it_was_wherever_a_study_stops(seed):
    chance = random.Random(seed)
    model = Counting()
    names = []
    for index, name in enumerate(
        chance.choices(["lora", "adapter", "oft", "prefix", "bitfit"], k=4)
    ):
        where = "net.attention" if name == "prefix" else chance.choice(["net.linear", "net.bare"])
        where = "net.linear" if name == "bitfit" else where
        delta = shake(put(METHODS[name], model, where, name=f"d{index}"), seed=index)
        names.append(delta.name)
    if chance.random() < 0.5:
        AverageModel(model, deltas=chance.sample(names, 2), name="mean")
    composition(model).reorder(chance.sample(composition(model).names, len(composition(model))))
    composition(model)[chance.choice(names)].disable()
    for delta in composition(model):
        if all(layer.scales for layer in delta.layers.values()):
            delta.scale = 0.5
    model.train(chance.random() < 0.5)
    model.net.head.train(chance.random() < 0.5)
    model.norm.requires_grad_(False)
    plain = interference(model, [IDS, IDS[:1]], power)
    before = state(model)
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    stop, count = chance.randrange(plain.runs), 0
    error = chance.choice([KeyboardInterrupt, RuntimeError])

    def metric(outputs, batch):
        nonlocal count
        count += 1
        if count > stop:
            raise error
        torch.rand(1), random.random(), np.random.rand()
        return power(outputs, batch)

    with pytest.raises(error):
        interference(model, [IDS, IDS[:1]], metric)
    same(before, state(model))
    count = -plain.runs
    assert interference(model, [IDS, IDS[:1]], metric).to_dict() == {
        **plain.to_dict(), "metric": "metric",
    }  # fmt: skip
    same(before, state(model))
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_an_interrupt_while_the_order_is_put_back_leaves_it_put_back(three, monkeypatch):
    real, calls = conditions.rerank, []

    def rerank(*args):
        calls.append(1)
        if len(calls) == 2:  # the first that puts back
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(conditions, "rerank", rerank)
    with pytest.raises(KeyboardInterrupt):
        interference(three, BATCHES, power)
    assert composition(three).names == ["a", "b", "c"]
    assert list(three[0].deltas) == ["a", "b"]


def test_warnings_of_the_first_forward_and_what_has_run_are_kept_for_the_users_own():
    model = small()
    LoraModel(model, modified_modules=["0"], name="a")
    LoraModel(model, modified_modules=["2"], name="b")
    before = opendelta.unreached(model)
    interference(model, [X.float()], power)
    assert opendelta.unreached(model) == before == ["0.deltas.a", "2.deltas.b"]


def test_a_compiled_model_runs_eagerly(three):
    wanted = interference(three, BATCHES, power).to_dict()
    compiled = torch.compile(three, backend="eager")
    found = interference(compiled, BATCHES, power).to_dict()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert found["alone"] == wanted["alone"]
    assert list(found["shifts"]["a"].values()) == list(wanted["shifts"]["a"].values())


# ------------------------------------------------------------------------------------- showing it
def test_the_report_is_a_table_json_and_html(three):
    report = interference(three, BATCHES, power)
    text = str(report)
    assert repr(report) == text
    lines = text.splitlines()
    assert lines[0] == "interference in Sequential: power, 8 rows"
    row = next(line for line in lines if line.startswith("b "))
    for value in (f"{report.alone['b']:.4g}", f"{report.gains['b']:+.3g}",
                  f"{report.without['b']:.4g}", f"{report.costs['b']:+.3g}"):  # fmt: skip
        assert value in row.split()
    pair = next(line for line in lines if line.startswith("a b "))
    assert f"{report.synergies['a', 'b']:+.3g}" in pair
    found = json.loads(report.to_json())
    assert found == report.to_dict()
    (pair,) = [each for each in found["pairs"] if each["deltas"] == ["a", "b"]]
    assert pair["synergy"] == report.synergies["a", "b"]
    assert pair["order"] == report.order_changes["a", "b"]
    assert "cosine" not in pair
    assert report._repr_html_().startswith("<pre")
    assert "power, 8 rows" in report._repr_html_()


def test_of_many_pairs_the_table_shows_the_strongest():
    model = small()
    for index in range(8):
        shake(LoraModel(model, modified_modules=["0"], name=f"d{index}"), seed=index)
    report = interference(model, [X.float()], power, overlap=False)
    synergies = report.synergies
    assert len(synergies) == 28
    text = str(report)
    assert "and 8 pairs more" in text
    strongest = max(synergies, key=lambda pair: abs(synergies[pair]))
    weakest = min(synergies, key=lambda pair: abs(synergies[pair]))
    assert " ".join(strongest) in text
    assert " ".join(weakest) not in text


def test_pictures_show_pairs_and_shifts(three, tmp_path):
    report = interference(three, BATCHES, power)
    axes = report.plot()
    shown = np.array(axes.images[0].get_array())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert shown[0, 1] == shown[1, 0] == pytest.approx(report.synergies["a", "b"])
    assert np.isnan(shown[1, 1])
    assert axes.images[0].get_clim() == pytest.approx(
        (-np.nanmax(abs(shown)), np.nanmax(abs(shown)))
    )
    axes.figure.savefig(tmp_path / "synergies.png")
    axes = report.plot("shift")
    shown = np.array(axes.images[0].get_array())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    assert shown[1, 0] == pytest.approx(report.shifts["a"]["2"])
    with pytest.raises(
        OptionError, match=r"plot\('cosine'\): this report has \['synergy', 'order'"
    ):
        report.plot("cosine")


def test_a_long_study_draws_a_bar_on_a_terminal(three, monkeypatch, capsys):
    monkeypatch.setattr(conditions, "PATIENCE", 0)
    interference(three, BATCHES, power)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    interference(three, BATCHES, power, progress=False)
    assert capsys.readouterr() == ("", "")
    interference(three, iter(BATCHES), power)
    out, err = capsys.readouterr()
    assert out == ""
    assert "interference" in err


def test_a_metric_that_writes_into_its_batch_is_refused(three):
    def metric(outputs, batch):
        batch.add_(1)
        return outputs.mean()

    with pytest.raises(OptionError, match=r"wrote into the tensors of batch 0 with no delta"):
        interference(three, [torch.randn(2, 6).double()], metric)
