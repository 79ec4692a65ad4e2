"""`watching`: how blocks weigh their deltas, with the graph; losses and pictures of it."""

import contextlib
import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from support.nets import filled
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendelta
import opendelta.plot
from opendelta import (
    AdapterModel,
    AddressError,
    AverageModel,
    DeltaError,
    FuseModel,
    GateModel,
    LoraModel,
    LostGradientWarning,
    OptionError,
    balance_loss,
    check,
    composition,
    route,
    watching,
    z_loss,
)

IDS = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(0))
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def llama():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        num_hidden_layers=2, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def moe(llama):
    experts = [
        LoraModel(llama, modified_modules=["q_proj", "v_proj"], name=f"e{i}") for i in range(4)
    ]
    gate = GateModel(llama, deltas=experts, top_k=2, name="moe")
    filled(*experts, gate)
    return gate


@pytest.mark.covers("watching")
def test_it_shows_the_softmax_over_the_best_with_its_graph(llama, moe):
    inputs = []
    llama.get_submodule(Q).register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    with watching(llama) as seen:
        llama(IDS)
    layer, x = moe.layers[Q], inputs[0]
    logits = x @ layer.weight.T + layer.bias
    best = logits.topk(2, -1).indices
    wanted = torch.zeros_like(logits).scatter(-1, best, logits.gather(-1, best).softmax(-1))
    assert list(seen) == ["moe"]
    assert len(seen) == 1
    assert set(seen["moe"]) == set(moe.layers)
    torch.testing.assert_close(seen["moe"][Q], wanted)
    torch.testing.assert_close(seen.logits("moe")[Q], logits)
    assert seen.names("moe") == ["e0", "e1", "e2", "e3"]
    seen["moe"][Q].square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert "moe" in repr(seen)


def test_a_delta_that_does_not_act_has_no_weight(llama, moe):
    with composition(llama).only("moe", "e1", "e3"), watching(llama) as seen:
        llama(IDS)
    weights, logits = seen["moe"][Q], seen.logits("moe")[Q]
    assert weights.shape == (3, 7, 4)
    assert not weights[..., [0, 2]].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))
    assert (logits[..., [0, 2]] == -torch.inf).all()


def test_each_rule_shows_what_it_multiplies_by():
    net = nn.Sequential(nn.Linear(8, 8))
    a = LoraModel(net, modified_modules=["0"], name="a")
    b = AdapterModel(net, modified_modules=["0"], name="b")
    fuse = FuseModel(net, deltas=[a, b], name="fuse")
    c = LoraModel(net, modified_modules=["0"], name="c")
    average = AverageModel(net, deltas=["fuse", "c"], weights=[0.3, -2.0], name="average")
    filled(a, b, c, fuse)
    x = torch.randn(5, 8)
    with watching(net) as seen:
        net(x)
    assert seen["average"]["0"].tolist() == pytest.approx([0.3, -2.0])
    layer, h = fuse.layers["0"], nn.functional.linear(x, net[0].weight, net[0].bias)
    z = torch.stack([a.layers["0"].product(x), b.layers["0"].bottleneck(h)], -2)
    scores = (layer.key(z) * layer.query(h)[:, None]).sum(-1)
    torch.testing.assert_close(seen["fuse"]["0"], scores.softmax(-1))
    with pytest.raises(DeltaError, match="no softmax"):
        seen.logits("average")
    average.detach()
    assert list(seen) == ["fuse"]


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("other", [LoraModel, AdapterModel], ids=["product", "groups"])
def test_rows_of_route_have_their_own_weights_of_an_average(learn, other):
    net = nn.Sequential(nn.Linear(8, 8)).double()
    LoraModel(net, modified_modules=["0"], name="a")
    other(net, modified_modules=["0"], name="b")
    mean = AverageModel(net, deltas=["a", "b"], weights=[1 / 3, 0.2], learn=learn, name="mean")
    with route(net, [["mean", "a"], "mean", None]), watching(net) as seen:
        net(torch.randn(3, 5, 8, dtype=torch.float64))
    shown = seen["mean"]["0"]
    wanted = torch.tensor([[1 / 3, 0], [1 / 3, 0.2], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(shown, wanted[:, None], rtol=1e-12, atol=0)
    assert shown.requires_grad == learn
    if learn:
        shown.sum().backward()
        assert mean.layers["0"].weight.grad.tolist() == [2, 1]


def test_weights_that_are_numbers_have_the_dtype_of_the_hidden_states():
    net = nn.Sequential(nn.Linear(8, 8)).double()
    LoraModel(net, modified_modules=["0"], name="a")
    AverageModel(net, deltas=["a"], weights=[1 / 3], name="mean")
    with watching(net) as seen:
        net(torch.randn(5, 8, dtype=torch.float64))
    assert seen["mean"]["0"].tolist() == [1 / 3]


def test_rows_of_route_have_their_own_weights(llama, moe):
    rows = ["moe", None, ["moe", "e0", "e2"]]
    alone = []
    for i, row in enumerate(rows):
        names = [] if row is None else [row] if isinstance(row, str) else row
        with composition(llama).only(*names), watching(llama) as seen:
            llama(IDS[i : i + 1])
        alone.append(seen["moe"][Q] if "moe" in seen else torch.zeros(1, 7, 4))
    with route(llama, rows), watching(llama) as seen:
        llama(IDS)
    torch.testing.assert_close(seen["moe"][Q], torch.cat(alone))
    adapter = AdapterModel(llama, modified_modules=["q_proj"], name="adapter")
    filled(adapter)
    with route(llama, [["moe", "adapter"], None, ["moe", "e0", "e2"]]), watching(llama) as seen:
        llama(IDS)
    torch.testing.assert_close(seen["moe"][Q], torch.cat(alone))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "rows", [None, ["moe", None, ["moe", "e0", "adapter"]]], ids=["all", "rows"]
)
@pytest.mark.parametrize("all_act", [True, False])
def test_checkpointing_shows_nothing_a_second_time(llama, moe, reentrant, rows, all_act):
    AdapterModel(llama, modified_modules=["q_proj"], name="adapter")
    moe.freeze_module(exclude=["deltas"])
    if not all_act:
        composition(llama)["e1"].disable()
    llama.train()
    around = route(llama, rows) if rows else contextlib.nullcontext()
    with around, watching(llama) as seen:
        llama(IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in moe.named_parameters()}
    llama.zero_grad()
    llama.activation_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    around = route(llama, rows) if rows else contextlib.nullcontext()
    with around, watching(llama) as seen:
        loss = llama(IDS, labels=IDS).loss
        before = dict(seen["moe"])
        loss.backward()
        assert all(seen["moe"][where] is weights for where, weights in before.items())
    for name, p in moe.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name])


def test_a_block_inside_what_runs_again_shows_nothing_a_second_time(llama, moe):
    def run():
        with composition(llama).only("moe", "e0", "e1"):
            return llama(IDS, labels=IDS).loss

    with watching(llama) as seen:
        loss = checkpoint(run, use_reentrant=False)
        before = dict(seen["moe"])
        loss.backward()
        assert all(seen["moe"][where] is weights for where, weights in before.items())


@pytest.mark.covers("LostGradientWarning")
def test_losses_warn_if_checkpointing_left_the_weights_without_a_graph(llama, moe):
    moe.freeze_module()
    llama.train()
    llama.activation_checkpointing_enable({"use_reentrant": True})
    llama.enable_input_require_grads()
    with watching(llama) as seen:
        llama(IDS)
    for loss in (balance_loss, z_loss):
        with pytest.warns(LostGradientWarning, match="'moe'.*\"use_reentrant\": False"):
            assert not loss(seen, "moe").requires_grad
        with torch.no_grad():
            loss(seen, "moe")
    moe.freeze_module(exclude=["e0"])
    balance_loss(seen, "moe")
    moe.freeze_module()
    with torch.no_grad(), watching(llama.eval()) as seen:
        llama(IDS)
    balance_loss(seen, "moe")


def test_each_thread_sees_its_own(llama, moe):
    def run(found, batch):
        with watching(llama) as seen:
            barrier.wait()
            llama(IDS[:batch])
            barrier.wait()
        found.append(seen["moe"][Q].size(0))

    found, barrier = [[], []], threading.Barrier(2)
    threads = [
        threading.Thread(target=run, args=(own, n)) for own, n in zip(found, (1, 3), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1], [3]]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_code_is_refused_only_where_a_block_is_watched(whole):
    net = nn.Sequential(nn.Linear(8, 8))
    loras = [LoraModel(net, modified_modules=["0"], name=name) for name in "ab"]
    GateModel(net, deltas=loras)
    compiled, x = torch.compile(net, backend="eager", fullgraph=whole), torch.randn(2, 8)
    plain = compiled(x)
    refused = pytest.raises(Exception, match=r"watching\(\) cannot look into compiled code")
    with refused, watching(net):
        compiled(x)
    torch.testing.assert_close(compiled(x), plain)


def test_what_did_not_run_is_named(llama, moe):
    with watching(llama) as seen:
        pass
    with pytest.raises(DeltaError, match="has seen no weights of a block 'moe', but of"):
        seen["moe"]
    with pytest.raises(DeltaError, match="nothing to watch"), watching(nn.Linear(2, 2)):
        pass
    with pytest.raises(DeltaError, match="no delta 'x'"):
        seen.names("x")
    with watching(llama) as seen:
        llama(IDS)
    with pytest.raises(AddressError, match=r"'qproj'.*nearest: 'q_proj'"):
        seen["moe"]["qproj"]
    with pytest.raises(AddressError, match="'q_proj' selects 2 modules"):
        seen["moe"]["q_proj"]


def test_handles_and_ends_of_names_find_weights(llama, moe):
    with watching(llama) as seen:
        llama(IDS)
    for part in (seen.__getitem__, seen.logits, seen.chosen):
        assert part(moe)["layers.0.self_attn.q_proj"] is part("moe")[Q]
    assert moe in seen
    assert seen.names(moe) == seen.names("moe")
    assert copy.deepcopy(dict.fromkeys("a", seen.chosen("moe")))["a"].keys() == moe.layers.keys()
    for loss in (balance_loss, z_loss):
        assert torch.equal(loss(seen, moe), loss(seen, "moe"))
    opendelta.plot.weights(seen, moe)
    with pytest.raises(DeltaError, match="a delta of another model"):
        seen[composition(copy.deepcopy(llama))["moe"]]


def losses_by_hand(logits, top_k):
    """Return both losses of `logits` [tokens, n], which are -inf for deltas that do not act."""
    logits = logits.detach().double().numpy()
    acts = np.isfinite(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts = np.zeros(p.shape[1])
    for row, acting in zip(p, acts.sum(-1), strict=True):
        counts[np.argsort(-row)[: top_k if top_k and top_k < acting else 1]] += 1
    balance = acts.any(0).sum() * (counts / counts.sum() * p.mean(0)).sum()
    return balance, (np.log(np.exp(logits).sum(-1)) ** 2).mean()


@pytest.fixture
def gate_of():
    def make(top_k):
        net = nn.Sequential(nn.Linear(8, 8)).double()
        loras = [LoraModel(net, modified_modules=["0"], name=f"e{i}") for i in range(3)]
        gate = GateModel(net, deltas=loras, top_k=top_k, name="gate")
        filled(*loras, gate, scale=1.0)
        return net, gate.layers["0"], torch.randn(4, 5, 8, dtype=torch.float64)

    torch.manual_seed(3)
    return make


def check_losses(seen, layer, logits, top_k, mask=None):
    balance, z = losses_by_hand(logits, top_k)
    assert z_loss(seen, "gate", mask).item() == pytest.approx(z)
    loss = balance_loss(seen, "gate", mask)
    assert loss.item() == pytest.approx(balance)
    loss.backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.covers("balance_loss", "z_loss")
@pytest.mark.parametrize("top_k", [1, 2, None])
def test_the_losses_by_hand(gate_of, top_k):
    net, layer, x = gate_of(top_k)
    mask = torch.ones(4, 5)
    mask[1, 3:] = 0
    with watching(net) as seen:
        net(x)
    logits = x @ layer.weight.T + layer.bias
    check_losses(seen, layer, logits[mask.bool()], top_k, mask)
    with pytest.raises(OptionError, match=r"mask \[4\] must be for the positions of '0', \[4, 5\]"):
        balance_loss(seen, "gate", torch.ones(4))


@pytest.mark.parametrize("top_k", [2, 3, None])
def test_the_losses_of_a_gate_in_which_not_all_act(gate_of, top_k):
    net, layer, x = gate_of(top_k)
    with composition(net).only("gate", "e0", "e2"), watching(net) as seen:
        net(x)
    logits = x @ layer.weight.T + layer.bias
    logits[..., 1] = -torch.inf
    check_losses(seen, layer, logits.flatten(0, 1), top_k)


class Twice(nn.Module):
    """Its linear module runs on each half of the positions, or twice on all of them."""

    def __init__(self, inner, halves):
        super().__init__()
        self.inner, self.halves = inner, halves

    def forward(self, x):
        if self.halves:
            return torch.cat([self.inner(part) for part in x.split([2, 3], 1)], 1)
        return self.inner(self.inner(x))


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("top_k", [1, None])
def test_all_runs_of_a_module_in_a_forward_count(gate_of, top_k, halves):
    net, layer, x = gate_of(top_k)
    model = Twice(net, halves)
    composition(net)["gate"].freeze_module()
    given = []
    hook = net[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    mask = torch.ones(4, 5)
    mask[1, 3:] = 0
    with watching(model) as seen:
        for _ in range(2):  # the second forward replaces the first
            given.clear()
            model(x)
    hook.remove()
    masks = mask.bool().split([2, 3], 1) if halves else [mask.bool()] * 2
    logits = torch.cat(
        [(g @ layer.weight.T + layer.bias)[m] for g, m in zip(given, masks, strict=True)]
    )
    check_losses(seen, layer, logits, top_k, mask)
    assert seen["gate"]["0"].shape == ((20, 3) if halves else (2, 4, 5, 3))
    assert seen.chosen("gate")["0"].shape == seen.logits("gate")["0"].shape

    def flip(*_):
        layer.bias.data = layer.bias.data.flip(0)

    layer.weight.data.zero_()
    layer.bias.data = torch.tensor([1e4, -1e4, 0], dtype=torch.float64)
    layer.register_forward_hook(flip)
    assert check(model, (x,)).unchosen == ["e1 in gate"]


def test_a_forward_in_which_a_block_rests_forgets_the_one_before(gate_of):
    net, _, x = gate_of(2)
    gate = composition(net)["gate"]

    def detached():
        gate.detach()
        net(x)
        gate.attach()

    with watching(net) as seen:
        net(x)
        assert len(seen) == 1
        for block in (gate.disabled(), composition(net).only("e0"), route(net, [["e0"]] * 4)):
            with block:
                net(x)
            assert len(seen) == 0
            with pytest.raises(DeltaError, match="has seen no weights of a block 'gate'"):
                balance_loss(seen, gate)
            net(x)
            assert len(seen) == 1
        detached()
        assert len(seen) == 0


def test_a_forward_that_ends_in_an_error_and_copies_of_the_model_change_nothing(gate_of):
    net, _, x = gate_of(2)
    net(x)
    hooks = len(net._forward_hooks), len(net._forward_pre_hooks)
    with watching(net) as seen:
        with pytest.raises(RuntimeError, match="shapes"):
            net(x[..., 1:])
        net(x)
        first = seen["gate"]["0"]
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            copied(x[:2])
        assert torch.equal(seen["gate"]["0"], first)
        net[0](x[:1])  # of a part of the model, the run of each module alone replaces
        assert seen["gate"]["0"].shape == (1, 5, 3)
    assert hooks == (len(net._forward_hooks), len(net._forward_pre_hooks))


def test_rows_of_route_that_run_a_module_twice_have_the_weights_of_both_runs(gate_of):
    net, layer, x = gate_of(2)
    model = Twice(net, halves=False)
    given = []
    net[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with watching(model) as seen, route(model, [["gate"], [], ["gate"], ["gate"]]):
        model(x)
    assert seen["gate"]["0"].shape == (2, 4, 5, 3)
    logits = torch.cat([(g @ layer.weight.T + layer.bias)[[0, 2, 3]].flatten(0, 1) for g in given])
    check_losses(seen, layer, logits, 2)


@pytest.mark.parametrize("off", range(6))
def test_of_equal_logits_the_choice_is_that_of_the_forward(off):
    net = nn.Sequential(nn.Linear(8, 8))
    loras = [LoraModel(net, modified_modules=["0"], name=f"e{i}") for i in range(6)]
    gate = GateModel(net, deltas=loras, top_k=2, name="gate")
    for p in gate.parameters():
        nn.init.zeros_(p)
    loras[off].disable()
    with watching(net) as seen:
        net(torch.randn(5, 8))
    assert torch.equal(seen.chosen("gate")["0"], seen["gate"]["0"] > 0)


def test_a_weight_that_underflows_is_no_choice_of_others(gate_of):
    net, layer, x = gate_of(None)
    net.half()
    with torch.no_grad():
        layer.bias[1] = -60
    with watching(net) as seen:
        net(x.half())
    assert not seen["gate"]["0"][..., 1].any()
    check_losses(seen, layer, seen.logits("gate")["0"].flatten(0, 1), None)


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.parametrize("others", [None, "adapter"], ids=["product", "groups"])
def test_rows_that_do_not_take_a_gate_count_in_no_loss(gate_of, top_k, others):
    net, layer, x = gate_of(top_k)
    AdapterModel(net, modified_modules=["0"], name="adapter")
    with route(net, ["gate", others, ["gate", "e0", "e2"], None]), watching(net) as seen:
        net(x)
    logits = (x @ layer.weight.T + layer.bias)[[0, 2]]
    logits[1, :, 1] = -torch.inf
    check_losses(seen, layer, logits.flatten(0, 1), top_k)
    chosen = seen.chosen("gate")["0"]
    assert not chosen[[1, 3]].any()
    assert chosen[[0, 2]].any(-1).all()


def test_a_batch_without_a_token_that_counts_has_no_loss(gate_of):
    net, _, x = gate_of(2)
    with watching(net) as seen:
        net(x)
    for loss in (balance_loss, z_loss):
        assert loss(seen, "gate", torch.zeros(4, 5)).item() == 0


def test_a_picture_shows_each_delta_on_each_module(llama, moe, tmp_path):
    with watching(llama) as seen:
        llama(IDS)
    axes = opendelta.plot.weights(seen, mask=torch.ones(3, 7))
    shown = np.array(axes.images[0].get_array())
    assert [label.get_text() for label in axes.get_xticklabels()] == seen.names("moe")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(moe.layers)
    wanted = [w.detach().flatten(0, 1).mean(0).numpy() for w in seen["moe"].values()]
    np.testing.assert_allclose(shown, wanted, rtol=1e-6)
    axes.figure.savefig(tmp_path / "weights.png")
    moe.disable()
    AverageModel(llama, deltas=["e0"], name="other").enable()
    with watching(llama) as seen:
        llama(IDS)
    opendelta.plot.weights(seen, "other")


def drawn(seen, *args, **options):
    axes = opendelta.plot.weights(seen, *args, **options, ax=Figure().subplots())
    return np.array(axes.images[0].get_array())


@pytest.mark.parametrize("learn", [True, False])
def test_a_picture_counts_what_the_losses_count(gate_of, learn):
    net, _, x = gate_of(None)
    other = LoraModel(net, modified_modules=["0"], name="other")
    AverageModel(net, deltas=[other], weights=[0.25], learn=learn, name="mean")
    mask = torch.ones(4, 5)
    mask[0, 2:] = 0
    mask[1] = 0
    with composition(net).only("gate"), watching(net) as seen:
        net(x)
    wanted = seen["gate"]["0"][mask.bool()].mean(0)
    np.testing.assert_allclose(drawn(seen, mask=mask)[0], wanted.tolist())
    with pytest.raises(OptionError, match=r"mask \[5, 4\] must be for the positions of '0'"):
        drawn(seen, mask=mask.T)
    for rows in (["gate", None, "e0", ["gate", "e1"]], ["gate", None, None, ["gate", "e1"]]):
        with route(net, rows), watching(net) as seen:
            net(x)
        wanted = seen["gate"]["0"][[0, 3]].flatten(0, 1).mean(0)
        np.testing.assert_allclose(drawn(seen)[0], wanted.tolist())
        assert drawn(seen).sum() == pytest.approx(1)
    with route(net, ["mean", "mean", None, None]), watching(net) as seen:
        net(x)
    for given in (None, mask, torch.ones(4, 5)):
        assert drawn(seen, mask=given)[0].tolist() == [0.25]
    assert np.isnan(drawn(seen, mask=torch.tensor([[0], [0], [1], [1]]).expand(4, 5))).all()


def test_watching_a_model_without_an_acting_block_costs_nothing_and_shows_nothing(llama):
    LoraModel(llama)
    with watching(llama) as seen:
        llama(IDS)
    assert dict(seen) == {}
    with pytest.raises(OptionError, match="name one of"):
        opendelta.plot.weights(seen)


def test_check_names_a_delta_that_no_token_chose(llama, moe):
    batch = {"input_ids": IDS, "labels": IDS}
    moe.freeze_module()
    assert check(llama, batch).unchosen == []
    with torch.no_grad():
        for layer in moe.layers.values():
            layer.bias[2] = -1e4
    report = check(llama, batch)
    assert report.unchosen == ["e2 in moe"]
    assert "1 deltas are in a block whose tokens all chose others: e2 in moe" in str(report)
    composition(llama)["e2"].disable()
    assert check(llama, batch).unchosen == []
