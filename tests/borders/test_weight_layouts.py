"""Weights in sparse layouts, MKL-DNN's and torchao's: right, or refused by name."""

import warnings

import pytest
import torch
from support.nets import shake
from support.quantised import torchao
from torch import nn

import opendelta
from opendelta import BitFitModel, DeltaError, LoraModel, SiteError

pytestmark = [
    pytest.mark.covers("snapshot", "Composition.merge", "Delta.save_finetuned"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support is in beta"),
    pytest.mark.filterwarnings("ignore::opendelta.LostGradientWarning"),
]

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def net(row=None):
    """Return a plain model; `row` of its first weight is negated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    if row is not None:
        model[0].weight.data[row].neg_()
    return model


def in_layout(convert, *options):
    def made(row=None):
        model = net(row)
        weight = convert(model[0].weight.detach(), *options)
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        return model

    return made


def quantised(config):
    def made(row=None):
        model = net(row)
        torchao.quantize_(model, config)
        return model

    return made


LAYOUTS = {
    "csr": in_layout(torch.Tensor.to_sparse_csr),
    "csc": in_layout(torch.Tensor.to_sparse_csc),
    "bsr": in_layout(torch.Tensor.to_sparse_bsr, (2, 2)),
    "coo": in_layout(torch.Tensor.to_sparse),
    "mkldnn": in_layout(torch.Tensor.to_mkldnn),
}
TORCHAO = {
    "int8": quantised(torchao.Int8WeightOnlyConfig()),
    "int4": quantised(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "dynamic": quantised(torchao.Int8DynamicActivationInt8WeightConfig()),
    "float8": quantised(torchao.Float8WeightOnlyConfig()),
}
ALL = LAYOUTS | TORCHAO
RUNS = ["csr", *TORCHAO]  # torch's own Linear runs on these


@pytest.mark.parametrize("kind", ALL)
def test_a_snapshot_sees_what_changes_and_no_more(kind):
    model = ALL[kind]()
    before = opendelta.snapshot(model)
    assert opendelta.snapshot(ALL[kind]()) == before
    LoraModel(model, modified_modules=["2"]).detach()
    opendelta.assert_pristine(model, like=before)
    changed = opendelta.snapshot(ALL[kind](row=3))
    assert changed["0"]["values"]["weight"] != before["0"]["values"]["weight"]
    assert changed["0"]["values"]["bias"] == before["0"]["values"]["bias"]
    with pytest.raises(opendelta.PristineError, match=r"'0' \(Linear\): values changed: weight"):
        opendelta.assert_pristine(ALL[kind](row=3), like=before)


@pytest.mark.parametrize("kind", RUNS)
def test_deltas_act_are_saved_and_come_back(kind, tmp_path):
    model = ALL[kind]()
    model.requires_grad_(False)
    delta = shake(LoraModel(model, modified_modules=["0"]))
    expected = model(X)
    delta.save_finetuned(tmp_path)
    again = ALL[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", opendelta.UncheckedWarning)  # of the first weight
        opendelta.load(tmp_path, again)
    assert torch.equal(again(X), expected)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_merging_into_a_weight_that_holds_no_change_is_refused(kind, method, verb):
    model = ALL[kind]()
    shake(method(model, modified_modules=["0"]))
    before = opendelta.snapshot(model)
    layout = str(model[0].weight.layout)
    with pytest.raises(SiteError, match=rf"the weight of Linear has the layout {layout}"):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before


@pytest.mark.parametrize("kind", LAYOUTS)
def test_merging_beside_it_is_right(kind):
    model = ALL[kind]()
    shake(LoraModel(model, modified_modules=["2"]))
    x = torch.tanh(X)
    expected = model[2](x)
    plain = opendelta.composition(model).to_backbone()
    assert torch.allclose(plain[2](x), expected, atol=1e-5)
    opendelta.composition(model).merge()
    assert torch.allclose(model[2](x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_what_such_a_weight_cannot_have_is_refused_when_attaching(kind):
    model = ALL[kind]()
    before = opendelta.snapshot(model)
    for options in (
        {"modules_to_save": ["0"], "modified_modules": ["2"]},
        {"modified_modules": ["0"], "use_dora": True},
        {"modified_modules": ["0"], "init": "pissa"},
        {"modified_modules": ["0"], "reads": True},
    ):
        with pytest.raises(SiteError, match=r"'0'.* (quantised|sparse)"):
            LoraModel(model, **options)
    opendelta.assert_pristine(model, like=before)


@pytest.mark.parametrize("kind", ALL)
def test_it_is_not_saved_along(kind, tmp_path):
    model = ALL[kind]()
    delta = LoraModel(model, modified_modules=["2"], unfrozen_modules=["0"])
    delta.freeze_module()
    with pytest.raises(DeltaError, match=r"0\.weight is quantised or sparse"):
        delta.save_finetuned(tmp_path / "new")
    assert not (tmp_path / "new").exists()
