"""Blocks: what they compute by hand, their switches, files, merging, rows and refusals."""

import gc
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import build, logits, token_ids
from support.nets import IDS, net, shake, untouched

import opendelta
import opendelta.interop.peft
from opendelta import (
    AdapterModel,
    AverageModel,
    DeltaError,
    DeltaLoadError,
    FuseModel,
    GateModel,
    IA3Model,
    LoraModel,
    OptionError,
    PrefixModel,
    SiteError,
    SoftPromptModel,
    composition,
)
from opendelta._checkpoint import saving

pytestmark = pytest.mark.covers(
    "AverageModel", "AverageConfig", "GateModel", "GateConfig", "FuseModel", "FuseConfig"
)

X = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return net().double().requires_grad_(False)


def loras(model, count, *places, **options):
    places = list(places) or ["linear"]
    return [
        shake(LoraModel(model, modified_modules=places, lora_r=2 + i, name=f"e{i}", **options), i)
        for i in range(count)
    ]


def adapter(model, name, *places):
    places = list(places) or ["linear"]
    return shake(AdapterModel(model, modified_modules=places, bottleneck_dim=3, name=name), 20)


def alone(model, *names):
    """What `linear` gives with these deltas only."""
    with composition(model).only(*names):
        return model.linear(X)


def changes(model, names):
    return [alone(model, name) - alone(model) for name in names]


def formula(model, where="linear"):
    return composition(model).explain(where).formula


# ---------------------------------------------------------------------------------- the equations
@pytest.mark.covers("AverageConfig.weights", "AverageConfig.learn")
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("weights", [None, [0.7, -0.4]])
def test_an_average_is_a_weighted_sum_of_changes_and_folds(model, weights, learn):
    loras(model, 2)
    z = changes(model, ["e0", "e1"])
    block = AverageModel(model, deltas=["e0", "e1"], weights=weights, learn=learn)
    w = weights or [0.5, 0.5]
    torch.testing.assert_close(model.linear(X), alone(model) + w[0] * z[0] + w[1] * z[1])
    assert len(list(block.parameters())) == learn
    expected = model(IDS)
    composed = composition(model)
    assert composed.merge().merged["linear"] == ["e0", "e1", "average"]
    torch.testing.assert_close(model(IDS), expected)
    composed.unmerge()
    assert torch.equal(model(IDS), expected)
    torch.testing.assert_close(composed.to_backbone()(IDS), expected)


def test_learned_weights_get_the_gradient_of_the_sum(model):
    loras(model, 3)
    z = changes(model, ["e0", "e1", "e2"])
    block = AverageModel(model, deltas=["e0", "e1", "e2"], learn=True)
    model.linear(X).sum().backward()
    (weight,) = block.parameters()
    torch.testing.assert_close(weight.grad, torch.stack([each.sum() for each in z]))


@pytest.mark.covers("GateConfig.top_k", "GateConfig.temperature")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_gate_is_a_softmax_over_the_best_with_the_gradients_of_a_loop(model, top_k, mixed):
    experts = loras(model, 3)
    if mixed:
        experts.append(adapter(model, "a"))
    gate = shake(GateModel(model, deltas=experts, top_k=top_k, temperature=0.7), scale=1.0)
    names = [expert.name for expert in experts]
    layer, x = gate.layers["linear"], X.clone().requires_grad_()

    def loop():
        plain = F.linear(x, model.linear.weight, model.linear.bias)
        scores = (x @ layer.weight.T + layer.bias) / 0.7
        rows = []
        flat = [each.flatten(0, 1) for each in (scores, plain, x)]
        for score, h, u in zip(*flat, strict=True):
            best = score.argsort(descending=True)[: top_k or len(names)]
            shares = torch.softmax(score[best], 0)
            pairs = zip(shares, best, strict=True)
            rows.append(h + sum(share * one(experts[i], u, h) for share, i in pairs))
        return torch.stack(rows).view_as(plain)

    def one(expert, u, h):
        own = expert.layers["linear"]
        if isinstance(expert, LoraModel):
            return own.scaling * own.lora_B @ (own.lora_A @ u)
        return own.bottleneck(h)

    seeds = torch.randn(X.shape, dtype=X.dtype)
    parameters = [x, *gate.parameters(), *(p for e in experts for p in e.parameters())]
    y, expected = model.linear(x), loop()
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y, parameters, seeds)
    wanted = torch.autograd.grad(expected, parameters, seeds)
    torch.testing.assert_close(got, wanted)


@pytest.mark.covers("GateConfig.top_k")
@pytest.mark.parametrize("rule", [AverageModel, GateModel, FuseModel])
@pytest.mark.parametrize("more", [adapter, lambda model, name, *_: loras(model, 1)[0]])
def test_a_vector_is_a_batch_of_one(model, rule, more):
    shake(rule(model, deltas=[adapter(model, "one", "linear"), more(model, "two", "linear")]))
    torch.testing.assert_close(model.linear(X[0, 0]), model.linear(X)[0, 0])


def test_experts_that_no_token_chose_get_zeros_as_gradients(model):
    experts = loras(model, 3)
    gate = GateModel(model, deltas=experts, top_k=1)
    with torch.no_grad():
        gate.layers["linear"].bias[1] = 9.0
    model(IDS).sum().backward()
    sizes = [sum(p.grad.abs().sum() for p in expert.parameters()) for expert in experts]
    assert sizes[0] == sizes[2] == 0 < sizes[1]


@pytest.mark.covers("GateConfig.noise")
def test_noise_is_added_in_training_only(model):
    gate = GateModel(model, deltas=loras(model, 2), noise=1.0)
    assert torch.equal(model(IDS), model(IDS))
    gate.train()
    assert not torch.equal(model(IDS), model(IDS))


@pytest.mark.covers("FuseConfig.value")
@pytest.mark.parametrize("value", [True, False])
def test_adapter_fusion_attends_from_h_to_the_changes(model, value):
    adapters = [adapter(model, "a"), shake(adapter(model, "b"), 9), *loras(model, 1)]
    z = changes(model, ["a", "b", "e0"])
    fuse = shake(FuseModel(model, deltas=adapters, value=value))
    layer, h = fuse.layers["linear"], alone(model)
    scores = torch.stack([(layer.query(h) * layer.key(each)).sum(-1) for each in z])
    mixed = (scores.softmax(0)[..., None] * torch.stack(z)).sum(0)
    mixed = mixed @ layer.value.T if value else mixed
    torch.testing.assert_close(model.linear(X), h + mixed)


def test_training_a_fusion_alone_leaves_its_children_as_they_are(model):
    adapters = [adapter(model, name) for name in "abc"]
    fuse = FuseModel(model, deltas=adapters)
    fuse.freeze_module(exclude=["fuse"])
    before = [{k: v.clone() for k, v in a.state_dict().items()} for a in adapters]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(IDS).flatten(0, 1), torch.arange(8) % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for each, state in zip(adapters, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in each.state_dict().items())


def test_a_block_holds_blocks_and_prints_their_formula(model):
    loras(model, 1), adapter(model, "a"), adapter(model, "style")
    AverageModel(model, deltas=["e0", "a"], name="avg")
    FuseModel(model, deltas=["avg", "style"], name="fuse")
    assert formula(model) == (
        "y = fuse(0.5 (linear(x) + e0(x)) + 0.5 (a(linear(x))), style(linear(x)))"
    )
    assert "combines avg, style" in str(opendelta.tree(model))
    composition(model).reorder(["avg", "fuse", "e0", "a", "style"])
    assert formula(model).count("style") == 1


def test_the_formula_names_prefixes_in_a_block_at_the_module(model):
    for name in ("p", "q"):
        PrefixModel(model, modified_modules=["attention"], prefix_token_num=2, name=name)
    adapter(model, "a", "attention")
    AverageModel(model, deltas=["p", "q"], weights=[2.0, 1.0])
    assert formula(model, "attention") == (
        "y = 2 (a(attention[p](x))) + 1 (a(attention[q](x))) + -2 (a(attention(x)))"
    )


# ----------------------------------------------------------------------------------- the switches
def test_off_is_as_if_never_there_in_all_states():
    model = net()
    deltas = [
        *loras(model, 1),
        adapter(model, "a", "linear", "pair"),
        IA3Model(model, modified_modules=["linear"], name="i"),
    ]
    shake(deltas[2])
    deltas.append(AverageModel(model, deltas=["e0", "a"], name="avg"))
    deltas.append(FuseModel(model, deltas=["avg", "i"], name="fuse"))
    for states in itertools.product([False, True], repeat=5):
        for delta, active in zip(deltas, states, strict=True):
            delta.record.switch(active)
        off = model(IDS)
        for delta, active in zip(deltas, states, strict=True):
            delta.record.switch(True)
            if not active:
                delta.detach()
        assert torch.equal(model(IDS), off)
        for delta in deltas:
            if not delta.attached:
                delta.attach()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3])
def test_blocks_and_children_leave_and_return_in_any_order(order):
    model = net()
    with untouched(model):
        deltas = [*loras(model, 1), adapter(model, "a")]
        deltas.append(AverageModel(model, deltas=["e0", "a"], name="avg"))
        deltas.append(shake(GateModel(model, deltas=["avg"], name="gate")))
        with_all = model(IDS)
        for index in order:
            deltas[index].detach()
        for index in reversed(order):
            deltas[index].attach()
        assert torch.equal(model(IDS), with_all)
        for index in order:
            deltas[index].detach()


@pytest.mark.covers("Block", "Delta.disable", "Delta.enable", "Delta.disabled")
def test_the_switches_of_a_block_take_its_children_along(model):
    e0, e1 = loras(model, 2)
    style = adapter(model, "style")
    block = AverageModel(model, deltas=["e0", "e1"], name="m")
    outer = GateModel(model, deltas=["m"], name="g")
    with outer.disabled():
        assert [d.active for d in (e0, e1, style, block, outer)] == [
            False,
            False,
            True,
            False,
            False,
        ]
        torch.testing.assert_close(model.linear(X), alone(model, "style"))
    block.disable()
    assert not e0.active
    assert not e1.active
    assert outer.active
    block.enable()
    assert e0.active
    assert e1.active


@pytest.mark.covers("Composition.only")
def test_only_brings_the_children_of_a_block_that_is_named_without_any(model):
    e0, e1 = loras(model, 2)
    AverageModel(model, deltas=["e0", "e1"], name="m")
    GateModel(model, deltas=["m"], name="g")
    composed = composition(model)
    with composed.only("g"):
        assert e0.active
        assert e1.active
    with composed.only("m", "e1"):
        assert formula(model) == "y = 0.5 (linear(x) + e1(x)) + 0.5 (linear(x))"
    with composed.only("e0"):
        assert formula(model) == "y = linear(x) + e0(x)"


def test_scales_of_a_block_and_of_its_children_multiply(model):
    z = [alone(model, e.name) - alone(model) for e in loras(model, 2)]
    block = AverageModel(model, deltas=["e0", "e1"])
    block.scale, composition(model)["e0"].scale = 2.0, 3.0
    torch.testing.assert_close(model.linear(X), alone(model) + 3 * z[0] + z[1])


def test_a_block_stands_where_a_child_stands_and_leaves_the_rest_alone(model):
    loras(model, 1, "linear"), adapter(model, "a", "linear", "pair")
    block = AverageModel(model, deltas=["e0", "a"], exclude_modules=["linear"])
    assert list(block.layers) == ["pair"]
    assert formula(model) == "y = a(linear(x) + e0(x))"
    assert formula(model, "pair") == "y = 0.5 (a(pair(x))) + 0.5 (pair(x))"


@pytest.mark.covers("SharedDeltaWarning")
def test_a_child_in_two_blocks_is_told_and_works_in_each(model):
    loras(model, 2)
    AverageModel(model, deltas=["e0", "e1"], name="m")
    with pytest.warns(opendelta.SharedDeltaWarning, match="'e0' is in two blocks that act"):
        FuseModel(model, deltas=["e0", "e1"], name="f")
    composed = composition(model)
    with composed.only("m"):
        assert formula(model).startswith("y = 0.5")
    with composed.only("f"):
        assert formula(model) == "y = f(linear(x) + e0(x), linear(x) + e1(x))"
    with pytest.raises(SiteError, match="shares a delta with a block that would not be merged"):
        composed.merge("m")


def test_a_new_delta_takes_the_place_of_an_old_child_by_its_name(model):
    _, e1 = loras(model, 2)
    AverageModel(model, deltas=["e0", "e1"])
    e1.detach()
    del e1
    gc.collect()
    adapter(model, "e1")
    assert formula(model) == "y = 0.5 (linear(x) + e0(x)) + 0.5 (e1(linear(x)))"


# -------------------------------------------------------------------------------------- the files
def test_saving_and_loading_keeps_every_bit_under_new_names_too(tmp_path):
    model = net()
    a, b = loras(model, 1)[0], adapter(model, "a", "linear", "pair")
    AverageModel(model, deltas=["e0", "a"], weights=[0.25, 0.75], learn=True, name="avg")
    fuse = shake(FuseModel(model, deltas=["avg"], name="fuse"))
    composed = composition(model)
    composed.reorder(["fuse", "e0", "avg", "a"])
    fuse.freeze_module()
    expected = model(IDS)
    composed.save(tmp_path / "all")
    fuse.save_finetuned(tmp_path / "fuse")
    for load in (
        lambda m: opendelta.load(tmp_path / "all", m),
        lambda m: FuseModel.from_finetuned(tmp_path / "fuse", m),
        lambda m: opendelta.AutoDeltaModel.from_finetuned(tmp_path / "fuse", m),
    ):
        other = net()
        handle = load(other)
        assert composition(other).names == composed.names
        assert torch.equal(other(IDS), expected)
    assert handle.name == "fuse"
    other = net()
    mine = LoraModel(other, modified_modules=["bare"], name="e0")
    loaded = opendelta.load(tmp_path / "all", other)
    assert loaded["avg"].config.deltas == ["e0_1", "a"]
    mine.disable()
    assert torch.equal(other(IDS), expected)
    b.detach()
    with pytest.raises(DeltaError, match="'a', which is not attached"):
        composed.save(tmp_path / "less")
    a.detach()


def test_a_folder_whose_child_is_missing_is_refused(model, tmp_path, monkeypatch):
    loras(model, 1)
    monkeypatch.setattr(saving, "_check_children", lambda _: None)
    saving.save([AverageModel(model, deltas=["e0"], name="m")], tmp_path)
    with pytest.raises(DeltaLoadError, match="'m' combines 'e0', which is neither"):
        opendelta.load(tmp_path, net().double())


# -------------------------------------------------------------------------------------- the weights
def test_what_is_merged_with_a_block_cannot_change(model):
    e0, e1 = loras(model, 2)
    block = AverageModel(model, deltas=["e0", "e1"], name="m")
    composed = composition(model)
    with pytest.raises(SiteError, match="'e0' is in the block 'm': merge that"):
        composed.merge("e0")
    e1.detach()
    composed.merge("m")
    for verb in (e0.disable, e0.detach, block.disable, block.detach, lambda: e1.attach()):
        with pytest.raises(DeltaError, match="merged"):
            verb()
    composed.unmerge()
    e1.attach()
    with pytest.raises(
        DeltaError, match=r"'m' is a block, .* combine those instead, .'e0': weight, "
    ):
        opendelta.combine(model, {"m": 1.0})


def test_a_child_that_cannot_fold_is_named(model):
    loras(model, 1), adapter(model, "a")
    AverageModel(model, deltas=["e0", "a"], name="m")
    with pytest.raises(SiteError, match="'a' in it does not"):
        composition(model).merge("m")


def test_a_merged_delta_cannot_join_a_block(model):
    loras(model, 2)
    composition(model).merge("e0")
    with pytest.raises(DeltaError, match="cannot let 'average' combine 'e0': it is merged"):
        AverageModel(model, deltas=["e0", "e1"])


def test_a_disabled_block_keeps_its_child_out_of_the_weights(model):
    loras(model, 2)
    AverageModel(model, deltas=["e0", "e1"]).record.switch(False)
    with pytest.raises(SiteError, match="shares a delta with a block"):
        composition(model).merge("e0")


# ----------------------------------------------------------------------------------- the refusals
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"deltas": ["e0", "zz"]}, "no delta 'zz' is attached"),
        ({"deltas": []}, "a block needs deltas="),
        ({"deltas": ["e0", "e0"]}, "names one delta twice"),
        ({"deltas": ["e0"], "weights": [1.0, 2.0]}, "must be one for each"),
        ({"deltas": "e0"}, "deltas='e0' must be a list of names"),
        ({"deltas": ["e0"], "weights": "1"}, r"weights='1' must be list\[float\]"),
        ({"deltas": ["e0"], "weights": ["x"]}, "weights"),
        ({"deltas": ["e0"], "exclude_modules": ["linear"]}, "none of"),
        ({"deltas": ["prompt"]}, "changes the length of the sequence"),
    ],
)
def test_what_no_block_combines_is_refused(model, options, match):
    loras(model, 1)
    SoftPromptModel(model, modified_modules=[""], soft_token_num=2, name="prompt")
    before = opendelta.snapshot(model)
    with pytest.raises(DeltaError, match=match):
        AverageModel(model, **options)
    assert opendelta.snapshot(model) == before


@pytest.mark.parametrize("cls", [AverageModel, FuseModel, GateModel])
def test_a_soft_prompt_is_refused_before_a_rule_looks_at_its_module(model, cls):
    loras(model, 1)
    SoftPromptModel(model, modified_modules=[""], soft_token_num=2, name="prompt")
    with pytest.raises(SiteError, match=r"'prompt' on .* changes the length of the sequence"):
        cls(model, deltas=["e0", "prompt"])


@pytest.mark.covers("AverageConfig.weights")
@pytest.mark.parametrize(
    "weights",
    [[np.float32(0.5), 2], np.array([0.5, 2]), torch.tensor([0.5, 2]), (torch.tensor(0.5), 2)],
)
def test_weights_may_be_numbers_of_numpy_and_torch(model, weights):
    loras(model, 2)
    config = AverageModel(model, deltas=["e0", "e1"], weights=weights).config
    assert config.weights == [0.5, 2.0]
    assert {*map(type, config.weights)} == {float}


def test_a_block_cannot_be_in_itself(model):
    loras(model, 1)
    inner = AverageModel(model, deltas=["e0"], name="n")
    AverageModel(model, deltas=["n"], name="o")
    inner.detach()
    del inner
    gc.collect()
    with pytest.raises(DeltaError, match="a block cannot be in itself: 'n' in 'o' in 'n'"):
        AverageModel(model, deltas=["o"], name="n")


def test_wrong_limits_are_refused(model):
    loras(model, 1)
    for options in ({"top_k": 0}, {"temperature": 0.0}, {"noise": -1.0}):
        with pytest.raises(OptionError):
            GateModel(model, deltas=["e0"], **options)


def test_peft_has_no_blocks(model, tmp_path):
    loras(model, 1)
    with pytest.raises(DeltaError, match="cannot be written for PEFT"):
        opendelta.interop.peft.save(AverageModel(model, deltas=["e0"]), tmp_path)


# -------------------------------------------------------------------------------- rows, generation
def test_rows_take_blocks_and_children_of_their_own():
    model = net()
    loras(model, 2), adapter(model, "a")
    shake(GateModel(model, deltas=["e0", "a"], name="g"))
    rows = ["g", ["g", "e0"], "e0", None, ["e1", "g"], ["a", "g"]]
    ids = IDS.repeat(3, 1)
    expected = []
    for index, row in enumerate(rows):
        names = [] if row is None else [row] if isinstance(row, str) else row
        with composition(model).only(*names):
            expected.append(model(ids[index, None]))
    with opendelta.route(model, rows):
        torch.testing.assert_close(model(ids), torch.cat(expected))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("block", [AverageModel, GateModel, FuseModel])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prefixes_in_a_block_act_with_the_cache(name, block, options):
    model = build(name)
    for index in range(2):
        shake(
            PrefixModel(model, prefix_token_num=2 + index, reparameterize=False, name=f"p{index}")
        )
    shake(
        AdapterModel(model, modified_modules=["attn" if name == "gpt2" else "self_attn"], name="a")
    )
    shake(block(model, deltas=["p0", "p1", "a"], name="m"))
    ids, usual = token_ids(), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 1}
    out = model.generate(ids, **usual, **options)
    options = {k: v for k, v in options.items() if k == "num_beams"}
    assert torch.equal(out, model.generate(ids, **usual, **options, use_cache=False))
    assert torch.isfinite(logits(model)).all()
