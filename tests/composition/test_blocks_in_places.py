"""Blocks on modules of all kinds, in all dtypes, and among all that models go through."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.models import build, token_ids
from support.nets import COPIES, IDS, copied, net, replica_of, shake
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    AverageModel,
    BitFitModel,
    CompacterModel,
    FuseModel,
    GateConfig,
    GateModel,
    HRAModel,
    IA3Model,
    LNTuningModel,
    LohaModel,
    LoraConfig,
    LoraModel,
    LoReftModel,
    LowRankAdapterModel,
    OFTModel,
    ParallelAdapterModel,
    SiteError,
    VeraModel,
    composition,
)

pytestmark = pytest.mark.covers("AverageModel", "GateModel", "FuseModel")

BLOCKS = [AverageModel, GateModel, FuseModel]
EVERY = ["linear", "bare", "conv1d", "norm", "pair", "head"]


def put(model, *places, **options):
    """A LoRA where it can be, an adapter, and the names of both."""
    linear = [p for p in places if p in ("linear", "bare", "conv1d", "head", "embedding")]
    shake(LoraModel(model, modified_modules=linear or ["linear"], lora_r=2, name="a", **options))
    adapter = AdapterModel(model, modified_modules=[*places], bottleneck_dim=3, name="b")
    return shake(adapter), ["a", "b"]


def block_on(model, method, *places, **options):
    _, names = put(model, *places)
    return shake(method(model, deltas=names, name="m", **options))


def deltas_of(model):
    composed = composition(model)
    return [composed[name] for name in composed.names]


# ------------------------------------------------------------------------------ kinds of modules
class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_an_average_acts_where_the_weight_of_a_module_is_read():
    torch.manual_seed(0)
    model = Heads().double().eval()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    where = ["attention.out_proj"]
    deltas = [
        shake(LoraModel(model, modified_modules=where, name=n), i) for i, n in enumerate("ab")
    ]
    outs = []
    for delta in deltas:
        with composition(model).only(delta):
            outs.append(model(x))
    for method in (GateModel, FuseModel):
        with pytest.raises(SiteError, match="out_proj"):
            method(model, deltas=["a", "b"])
    AverageModel(model, deltas=["a", "b"])
    torch.testing.assert_close(model(x), sum(outs) / 2)


def test_an_average_acts_on_convolutions_where_others_are_refused():
    model = net().double()
    deltas = [
        shake(LoraModel(model, modified_modules=["conv2d"], name="a")),
        shake(BitFitModel(model, modified_modules=["conv2d"], name="b")),
    ]
    x = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    outs = []
    for delta in deltas:
        with composition(model).only(delta):
            outs.append(model.conv2d(x))
    for method in (GateModel, FuseModel):
        with pytest.raises(SiteError, match="conv2d"):
            method(model, deltas=["a", "b"])
    AverageModel(model, deltas=["a", "b"])
    torch.testing.assert_close(model.conv2d(x), sum(outs) / 2)


class Permutes(nn.LayerNorm):
    """A normalisation of channels, as torchvision's LayerNorm2d."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_an_average_acts_on_norms_over_channels_where_others_are_refused():
    torch.manual_seed(0)
    model, x = nn.Sequential(Permutes(4)).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    deltas = [
        shake(BitFitModel(model, modified_modules=["0"], name="a")),
        shake(LNTuningModel(model, modified_modules=["0"], name="b")),
    ]
    outs = []
    for delta in deltas:
        with composition(model).only(delta):
            outs.append(model(x))
    for method in (GateModel, FuseModel):
        with pytest.raises(SiteError, match="'0'"):
            method(model, deltas=["a", "b"])
    AverageModel(model, deltas=["a", "b"])
    torch.testing.assert_close(model(x), sum(outs) / 2)
    composition(model).merge()
    torch.testing.assert_close(model(x), sum(outs) / 2)


class Several(nn.Module):
    """Returns hidden states of two widths, and a mapping."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return {"hidden": self.up(x), "second": x * 2}


@pytest.mark.parametrize("method", BLOCKS)
def test_only_the_hidden_states_of_several_tensors_change(method):
    torch.manual_seed(0)
    model = nn.Sequential(Several())
    x = torch.randn(2, 3, 8)
    plain = model(x)
    for index, name in enumerate("ab"):
        shake(
            AdapterModel(
                model, modified_modules=["0"], bottleneck_dim=3, name=name, sample_inputs=x
            ),
            index,
        )
    shake(method(model, deltas=["a", "b"], sample_inputs=x))
    out = model(x)
    assert type(out) is type(plain)
    assert torch.equal(out["second"], plain["second"])
    assert not torch.allclose(out["hidden"], plain["hidden"])


# ----------------------------------------------------------------------------------------- digits
SMALL = {
    "lora": (LoraModel, {}), "dora": (LoraModel, {"use_dora": True}), "vera": (VeraModel, {"r": 4}),
    "loha": (LohaModel, {}), "adapter": (AdapterModel, {}), "loreft": (LoReftModel, {}),
    "low_rank_adapter": (LowRankAdapterModel, {"reduction_factor": 2}),
    "compacter": (CompacterModel, {"reduction_factor": 2}), "ia3": (IA3Model, {}),
    "bitfit": (BitFitModel, {}), "parallel": (ParallelAdapterModel, {}), "oft": (OFTModel, {}),
    "hra": (HRAModel, {"r": 2}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_the_change_of_a_child_keeps_its_digits_in_half_precision(name, dtype, monkeypatch):
    method, options = SMALL[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    places = ["0", "0"] if method is ParallelAdapterModel else ["0"]
    with torch.no_grad():  # DoRA has its digits from W x, which is large then
        model[0].weight.mul_(30.0) if name == "dora" else model[0].bias.fill_(20.0)
    delta = shake(method(model, modified_modules=places, name="a", **options), scale=0.02)
    AverageModel(model, deltas=["a"])
    x = torch.randn(50, 64).to(dtype)
    seen = []
    monkeypatch.setattr(
        opendelta.blocks.average.AverageLayer, "weigh",
        lambda self, g, z, chosen: seen.append(z[0]) or z[0],
    )  # fmt: skip
    if name == "lora":  # runs as a product, without a z
        monkeypatch.setattr("opendelta._layers.block._factors", lambda _: None)
    model(x)
    model.double()
    exact = {}
    for key, names in (("with", [delta]), ("without", [])):
        with composition(model).only(*names):
            exact[key] = model(x.double())
    change = exact["with"] - exact["without"]
    error = (seen[0].double() - change).norm() / change.norm()
    assert error < 0.01


# ----------------------------------------------------------------------- all that models go through
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", BLOCKS)
def test_checkpointing_gives_the_same_gradients(method, reentrant):
    model = net()
    block = block_on(model, method, *EVERY)
    parameters = [p for d in deltas_of(model) for p in d.parameters()]
    x = torch.randn(2, 4, 8, requires_grad=True)
    plain = torch.autograd.grad(model(inputs_embeds=x).sum(), parameters, allow_unused=True)
    out = checkpoint(lambda x: model(inputs_embeds=x), x, use_reentrant=reentrant)
    out.sum().backward()
    for parameter, wanted in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    assert block.attached


@pytest.mark.covers("Composition.only")
def test_it_compiles_into_one_graph_for_each_set_that_acts():
    model = net()
    put(model, "linear", "norm")
    shake(FuseModel(model, deltas=["a", "b"], name="f"))
    shake(LoraModel(model, modified_modules=["linear"], name="e"))
    gate = shake(GateModel(model, deltas=["f", "e"], top_k=1, name="g"))
    average = AverageModel(model, deltas=["g"], weights=[0.5], name="m")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(fast(IDS), model(IDS))
    for names in (["f"], ["g"], ["a"], ["m", "g", "e"]):
        with composition(model).only(*names):
            torch.testing.assert_close(fast(IDS), model(IDS))
    count = len(graphs)
    gate.scale = 0.3
    torch.testing.assert_close(fast(IDS), model(IDS))
    average.scale = -2.0
    torch.testing.assert_close(fast(IDS), model(IDS))
    with composition(model).only("f"):
        torch.testing.assert_close(fast(IDS), model(IDS))
    assert len(graphs) == count


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("method", BLOCKS)
def test_copies_compute_the_same_and_are_apart(method, how):
    model = net()
    block_on(model, method, *EVERY)
    expected = model(IDS)
    other = copied(model, how)
    assert torch.equal(other(IDS), expected)
    composition(other)["a"].detach()
    assert not torch.equal(other(IDS), expected)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("method", BLOCKS)
def test_replicas_shared_copies_frozen_and_autocast(method):
    model = net()
    block_on(model, method, *EVERY)
    composed, expected = composition(model), model(IDS)
    assert torch.equal(replica_of(model)(IDS), expected)
    with torch.no_grad(), composed.frozen():
        torch.testing.assert_close(model(IDS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS).float(), expected, atol=0.1, rtol=0.1)
    with composed.only("b"), composed.only("m"):
        assert torch.equal(replica_of(model)(IDS), expected)
    assert composition(opendelta.shared_copy(model)).names == []
    assert opendelta.unreached(model) == []


def test_dora_in_above_and_beneath_a_block_sees_the_weights_beneath():
    model = net().double()
    w, b = model.linear.weight.detach(), model.linear.bias.detach()
    first, inside, above = (
        shake(LoraModel(model, modified_modules=["linear"], lora_r=2, name=n, use_dora=True), i)
        for i, n in enumerate("abc")
    )
    lora = shake(LoraModel(model, modified_modules=["linear"], lora_r=2, name="l"))
    AverageModel(model, deltas=["b", "l"], weights=[0.3, 0.9], name="m")
    composition(model).reorder(["a", "b", "l", "m", "c"])

    def dora(delta, weight):
        own = delta.layers["linear"]
        changed = weight + own.scaling * own.lora_B @ own.lora_A
        return own.lora_magnitude_vector[:, None] * changed / changed.norm(dim=1, keepdim=True)

    w = dora(first, w)
    change = lora.layers["linear"]
    change = change.scaling * change.lora_B @ change.lora_A
    w = w + 0.3 * (dora(inside, w) - w) + 0.9 * change
    w = dora(above, w)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(model.linear(x), F.linear(x, w, b))
    composition(model).merge()
    torch.testing.assert_close(model.linear.weight, w)


def test_heads_beside_a_block_act_as_ever():
    model = net()
    put(model, "linear", "norm", modules_to_save=["head"])
    GateModel(model, deltas=["a", "b"], name="m")
    assert composition(model).explain("head").formula == "y = a(x)"
    saved = composition(model)["a"].layers["head"]
    with torch.no_grad():
        saved.module.weight.zero_()
        saved.module.bias.fill_(7.0)
    assert torch.equal(model(IDS), torch.full((2, 4, 3), 7.0))


def test_hooks_of_children_and_of_blocks_in_blocks_run():
    model = net()
    seen = []
    block_on(model, AverageModel, "linear")
    FuseModel(model, deltas=["m"])
    for delta in deltas_of(model):
        delta.layers["linear"].register_forward_hook(lambda *_: seen.append(1))
    model(IDS)
    assert len(seen) == 4


# ---------------------------------------------------------------------------------- plans, commands
@pytest.mark.covers("plan")
def test_a_plan_counts_a_block_over_deltas_that_are_planned_too():
    model = net()
    put(model, "linear", "norm")
    planned = opendelta.plan(model, GateConfig(deltas=["a", "b"]))
    gate = GateModel(model, deltas=["a", "b"])
    assert planned.added_parameters == sum(p.numel() for p in gate.parameters())
    gate.detach()
    both = opendelta.plan(
        net(),
        [
            LoraConfig(modified_modules=["linear"], lora_r=2, name="a"),
            LoraConfig(modified_modules=["linear"], lora_r=3, name="b"),
            GateConfig(deltas=["a", "b"], name="g"),
        ],
    )
    assert both.added_parameters == 2 * 8 * 2 + 2 * 8 * 3 + 2 * 8 + 2


@pytest.mark.covers("check", "Delta.from_config", "AutoDeltaConfig", "AutoDeltaModel")
def test_check_and_configs_know_blocks():
    model = build("llama")
    for name in ("a", "b"):
        shake(LoraModel(model, name=name), scale=0.05)
    config = AutoDeltaConfig.from_dict({"delta_type": "fuse", "deltas": ["a", "b"]})
    fuse = AutoDeltaModel.from_config(config, backbone_model=model)
    assert type(fuse) is FuseModel
    fuse.freeze_module()
    trained = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    report = opendelta.check(model, batch, trained)
    assert report, str(report)


def test_the_command_shows_blocks(tmp_path):
    model = net()
    block_on(model, AverageModel, "linear").freeze_module()
    composition(model).save(tmp_path)
    command = [sys.executable, "-m", "opendelta", "show", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "deltas=['a'" in shown.replace("\n", "")
    assert "average" in shown
