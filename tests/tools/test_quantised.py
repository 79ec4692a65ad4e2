"""Deltas on linear modules that HQQ, optimum-quanto, AutoAWQ and GPTQModel quantised, for real.

AutoAWQ and GPTQModel ask for other versions of torch: they are tested where they are installed.
"""

import copy

import pytest
import torch
from support.nets import shake
from support.quantised import Block, X

import opendelta
from opendelta import LoraModel, SiteError

pytestmark = pytest.mark.covers("Delta.attach", "Composition.merge", "plan", "load")
GROUP = 32


def by_hqq(plain):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=GROUP)
    made = quantize.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    return made, made.dequantize()


def by_quanto(plain, bits=8):
    quanto = pytest.importorskip("optimum.quanto")
    kind = {8: quanto.qint8, 4: quanto.qint4}[bits]
    made = quanto.QLinear.from_module(plain, weights=kind)
    made.freeze()
    return made, made.weight.dequantize()


def grouped(plain):
    """(smallest, largest) weight of each group of inputs: [groups, out]."""
    weight = plain.weight.T.reshape(-1, GROUP, plain.out_features)
    return weight.amin(1), weight.amax(1)


def by_awq(plain):
    gemm = pytest.importorskip("awq.modules.linear.gemm")
    low, high = grouped(plain)
    scales = (high - low) / 15
    zeros = (-low / scales).round().clamp(0, 15)
    made = gemm.WQLinear_GEMM.from_linear(plain, 4, GROUP, scales=scales, zeros=zeros)
    parts = made.qweight, made.qzeros, made.scales
    return made, gemm.dequantize_gemm(*parts, 4, GROUP).T.float()


def by_gptq(plain):
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    sizes = {"in_features": plain.in_features, "out_features": plain.out_features}
    made = linear(
        bits=4, group_size=GROUP, sym=True, desc_act=False, bias=True, pack_dtype=torch.int32,
        **sizes,
    )  # fmt: skip
    scales = torch.maximum(*map(torch.abs, grouped(plain))).T / 7
    groups = torch.arange(plain.in_features) // GROUP
    made.pack_original(plain, scales, torch.full_like(scales, 8), groups)
    made.post_init()
    return made, made.dequantize_weight().T.float()


QUANTISED = {
    "hqq": by_hqq,
    "quanto int8": by_quanto,
    "quanto int4": lambda plain: by_quanto(plain, 4),
    "awq": by_awq,
    "gptq": by_gptq,
}
FOLDS = ["quanto int8", "quanto int4"]
TOLERANCE = {"awq": 5e-3, "gptq": 5e-3}  # they compute in float16


@pytest.fixture(params=QUANTISED)
def kind(request):
    return request.param


@torch.no_grad()
def pair(kind):
    """A quantised model, and a plain one over the weights that it stands for."""
    torch.manual_seed(0)
    model, plain = Block(), Block()
    plain.load_state_dict(model.state_dict())
    for name, module in list(model.named_children()):
        made, values = QUANTISED[kind](copy.deepcopy(module))
        setattr(model, name, made)
        getattr(plain, name).weight.copy_(values)
    return model.eval(), plain


def lora_on(model):
    torch.manual_seed(3)
    delta = shake(LoraModel(model, modified_modules=["up", "down"]), scale=0.1)
    delta.freeze_module()
    return delta


@pytest.mark.filterwarnings("ignore::opendelta.LostGradientWarning")
def test_deltas_train_as_over_the_weights_that_it_stands_for(kind):
    model, plain = pair(kind)
    before = opendelta.snapshot(model)
    planned = opendelta.plan(model, opendelta.LoraConfig(modified_modules=["up", "down"]))
    assert "lora is quantised: " in str(planned)
    delta, other = lora_on(model), lora_on(plain)
    assert [tuple(p.shape) for p in delta.parameters()] == [
        tuple(p.shape) for p in other.parameters()
    ]
    close = {"atol": TOLERANCE.get(kind, 1e-5), "rtol": TOLERANCE.get(kind, 1e-4)}
    torch.testing.assert_close(model(X), plain(X), **close)
    if kind != "awq":  # its module has no gradient on CPU
        model(X).square().mean().backward()
        plain(X).square().mean().backward()
        for mine, expected in zip(delta.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, expected.grad, **close)
    delta.detach()
    opendelta.assert_pristine(model, like=before)


@pytest.mark.covers("LostGradientWarning")
def test_a_module_that_passes_no_gradient_on_is_warned_of():
    model, _ = pair("awq")
    with pytest.warns(opendelta.LostGradientWarning, match="'up' is quantised so that no gradient"):
        LoraModel(model, modified_modules=["down"])


@pytest.mark.filterwarnings("ignore::opendelta.LostGradientWarning")
@pytest.mark.covers("UncheckedWarning")
def test_deltas_are_saved_and_load_on_it_and_on_a_plain_model(kind, tmp_path):
    model, plain = pair(kind)
    delta = lora_on(model)
    delta.save_finetuned(tmp_path / "quantised")
    again, _ = pair(kind)
    lora_on(plain).save_finetuned(tmp_path / "plain")
    for folder, backbone in (
        ("quantised", again),
        ("quantised", Block()),
        ("plain", pair(kind)[0]),
    ):
        with pytest.warns(opendelta.UncheckedWarning, match=r"2 of 2 .*up\.weight, down\.weight"):
            opendelta.load(tmp_path / folder, backbone)
    assert torch.equal(again(X), model(X))
    other = Block()
    other.up, other.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)
    with pytest.raises(opendelta.DeltaLoadError):
        opendelta.load(tmp_path / "quantised", other)


@pytest.mark.filterwarnings("ignore::opendelta.LostGradientWarning")
def test_deltas_fold_with_their_error_or_are_refused_by_name(kind):
    model, _ = pair(kind)
    plain = model(X)
    before = opendelta.snapshot(model)
    delta = lora_on(model)
    expected, c = model(X), opendelta.composition(model)
    if kind in FOLDS:
        found = c.to_backbone()(X)
        assert (found - expected).norm() < 0.5 * (plain - expected).norm()
        report = c.merge()
        assert all(0 < report.errors[name] < 1 for name in ("up", "down"))
        assert torch.equal(model(X), found)
        c.unmerge()
    else:
        for verb in (c.merge, c.to_backbone):
            with pytest.raises(SiteError, match=r"'up' .*keeps its weight packed .*then quantise"):
                verb()
    assert torch.equal(model(X), expected)
    delta.detach()
    opendelta.assert_pristine(model, like=before)


def test_what_such_a_weight_cannot_have_is_refused_when_attaching(kind):
    model, _ = pair(kind)
    before = opendelta.snapshot(model)
    for options in (
        {"modules_to_save": ["up"], "modified_modules": ["down"]},
        {"modified_modules": ["up"], "use_dora": True},
        {"modified_modules": ["up"], "init": "pissa"},
    ):
        with pytest.raises(SiteError, match=r"'up'.* quantised"):
            LoraModel(model, **options)
    opendelta.assert_pristine(model, like=before)
