"""Forwards that write to their own input: layers see it as it was given, and no merge is fooled."""

import contextlib
import copy

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import (
    AverageModel,
    HRAModel,
    IA3Model,
    LohaModel,
    LoraModel,
    OFTModel,
    ParallelAdapterModel,
    SiteError,
    VeraModel,
    composition,
)

pytestmark = pytest.mark.covers("DeltaConfig.modified_modules", "Composition.merge")


class Rectifies(nn.Linear):
    def forward(self, x):
        return super().forward(torch.relu_(x))


class Centres(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.abs_())


class Net(nn.Module):
    """What the part writes to its input is seen after it, too."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        x = x * 1
        return self.part(x) + x


def given(contiguous):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    return x if contiguous else x.transpose(0, 1).contiguous().transpose(0, 1)


class KeepsStrides(Net):
    def forward(self, x):
        x = x.clone(memory_format=torch.preserve_format)
        return self.part(x) + x


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("method", [LoraModel, LohaModel, VeraModel])
def test_a_layer_beside_sees_the_input_as_it_was_given(method, mode, contiguous):
    torch.manual_seed(0)
    model = KeepsStrides(Rectifies(8, 8)).eval()
    bare = copy.deepcopy(model)
    delta = shake(
        method(model, modified_modules=["part"], r=2)
        if method is not LoraModel
        else method(model, modified_modules=["part"])
    )
    (layer,) = delta.layers.values()
    x = given(contiguous)
    modes = {
        "grad": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with modes[mode]():
        out = model(x)
    with torch.no_grad():
        scale = getattr(layer, "scaling", 1.0)
        product = (
            F.linear(x, scale * layer.lora_B @ layer.lora_A)
            if method is LoraModel
            else (F.linear(x, layer.delta_weight()))
        )
        expected = bare(x) + product
    tolerance = 5e-2 if mode == "autocast" else 1e-5
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "make", [lambda: Rectifies(8, 8), lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))]
)
def test_a_branch_around_it_trains(make):
    torch.manual_seed(0)
    model = Net(make())
    bare = copy.deepcopy(model)
    delta = shake(ParallelAdapterModel(model, modified_modules=["part", "part"], bottleneck_dim=4))
    (layer,) = delta.layers.values()
    x = given(True).requires_grad_()
    model(x).square().sum().backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in delta.parameters())]
    x.grad = None
    for p in delta.parameters():
        p.grad = None
    (bare(x) + layer.branch(x)).square().sum().backward()
    for one, other in zip(found, [x.grad, *(p.grad for p in delta.parameters())], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("inplace", [True, False])
def test_a_branch_around_a_script_trains(inplace):
    torch.manual_seed(0)
    inner = torch.jit.script(nn.ReLU(inplace))
    model = Net(nn.Sequential(inner, nn.Linear(8, 8)))
    delta = shake(ParallelAdapterModel(model, modified_modules=["part", "part"], bottleneck_dim=4))
    (layer,) = delta.layers.values()
    x = given(True)
    seen = x.relu() if inplace else x
    expected = F.linear(x.relu(), model.part[1].weight, model.part[1].bias) + seen
    out = model(x)
    torch.testing.assert_close(out, expected + layer.branch(x), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


def before(model):
    model[0].register_forward_pre_hook(lambda module, args: (args[0].relu_(),))


def after(model):
    model[0].register_forward_hook(lambda module, args, out: out.relu_())


def instead(model):
    model[0].forward = lambda x: x.relu_()


def called(model):
    def call(self, x):
        return nn.Module.__call__(self, x.relu_())

    model[0].__class__ = type("Calls", (nn.Identity,), {"__call__": call})


def impl(model):
    def call(self, x):
        return nn.Module._call_impl(self, x.relu_())

    model[0].__class__ = type("Calls", (nn.Identity,), {"_call_impl": call, "__call__": call})


@pytest.mark.parametrize("change", [before, after, instead, called, impl])
def test_a_branch_around_what_a_child_has_of_its_own_trains(change):
    torch.manual_seed(0)
    part = nn.Sequential(nn.Identity(), nn.Linear(8, 8))
    change(part)
    _check_branch(Net(part), lambda x: (x.relu(), part[1]))


def _check_branch(model, changed):
    """Compare with plain torch; `changed`: what a part's linear is given, and the linear."""
    delta = shake(ParallelAdapterModel(model, modified_modules=["part", "part"], bottleneck_dim=4))
    (layer,) = delta.layers.values()
    x = given(True)
    new, linear = changed(x)
    out = model(x)
    expected = F.linear(new, linear.weight, linear.bias) + new + layer.branch(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()


class Some(nn.Module):
    """Its code counts as a library's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.change(x))

    forward.__module__ = "transformers.models.some"


def item(self, x):
    x[x < 0] = 0
    return x


def part_of(self, x):
    x[:, :] = x.relu()
    return x


def product(self, x):
    x *= x > 0
    return x


def method(self, x):
    return x.masked_fill_(x < 0, 0)


@pytest.mark.parametrize("change", [item, part_of, product, method])
def test_a_branch_around_a_library_s_code_in_place_trains(change):
    torch.manual_seed(0)
    part = type("Writes", (Some,), {"change": change})()
    _check_branch(Net(part), lambda x: (x.relu(), part.linear))


class Collects(nn.Module):
    """Nothing that it writes to is a tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, **options):
        options["used"] = True
        kept, text = (), "a"
        kept += (x,)
        text += "b"
        text += f"{text}."
        return self.linear(kept[0])

    forward.__module__ = "transformers.models.some"


@pytest.mark.parametrize(
    "make",
    [
        Collects,
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Dropout(), nn.GELU(), nn.Linear(8, 8)),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8))),
    ],
)
def test_what_writes_to_no_input_pays_nothing(make):
    model = Net(make())
    ParallelAdapterModel(model, modified_modules=["part", "part"], bottleneck_dim=4)
    assert not model.part.deltas.__dict__["intact?"]


def test_in_a_block_each_layer_sees_it():
    torch.manual_seed(0)
    model = Net(Rectifies(8, 8)).eval()
    bare, x = copy.deepcopy(model), given(True)
    deltas = [shake(LoraModel(model, modified_modules=["part"], name=n)) for n in ("a", "b")]
    AverageModel(model, deltas=["a", "b"])
    products = [ly.scaling * ly.lora_B @ ly.lora_A for d in deltas for ly in d.layers.values()]
    with torch.no_grad():
        expected = bare(x) + F.linear(x, sum(products) / 2)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_in_rows_each_layer_sees_it():
    torch.manual_seed(0)
    model = Net(Rectifies(8, 8)).eval()
    x = given(True)
    for name in ("a", "b"):
        shake(LoraModel(model, modified_modules=["part"], name=name))
    c = composition(model)
    sets = [["a"], ["b", "a"]]
    with torch.no_grad():
        each = []
        for names, row in zip(sets, x, strict=True):
            with c.only(*names):
                each.append(model(row[None]))
        with opendelta.route(model, sets):
            out = model(x)
    torch.testing.assert_close(out, torch.cat(each), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
def test_a_copy_in_its_place_writes_as_it_did():
    torch.manual_seed(0)
    model = Net(Rectifies(8, 8)).eval()
    bare, x = copy.deepcopy(model), given(True)
    model.other = nn.Linear(2, 2)
    LoraModel(model, modules_to_save=["part"], name="copied", modified_modules=["other"])
    lora = shake(LoraModel(model, modified_modules=["part"]))
    (layer,) = lora.layers.values()
    with torch.no_grad():
        expected = bare(x) + F.linear(x, layer.scaling * layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (OFTModel, {"oft_block_size": 4}),
        (HRAModel, {"r": 2}),
        (IA3Model, {"feedforward_modules": ["part"]}),
        (LoraModel, {}),
    ],
)
def test_a_merge_there_is_refused(method, options, verb):
    model = Net(Rectifies(8, 8))
    shake(method(model, modified_modules=["part"], **options))
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'part' \(Rectifies\): .*cannot be merged"):
        getattr(composition(model), verb)()
    assert opendelta.snapshot(model) == before


def test_torch_s_own_classes_pay_nothing():
    model = nn.Sequential(nn.Linear(8, 8))
    LoraModel(model, modified_modules=["0"])
    assert not model[0].deltas.__dict__["intact?"]
