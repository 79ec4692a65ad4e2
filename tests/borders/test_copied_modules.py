"""Copies of modules (`modules_to_save`) with weight hooks, or with tensors in no table."""

import copy

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.nn.utils import prune

import opendelta
from opendelta import LoraModel, SiteError, composition

pytestmark = [
    pytest.mark.covers("DeltaConfig.modules_to_save"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
}


def made(norm, inside=False):
    torch.manual_seed(0)
    head = NORMS[norm](nn.Linear(6, 3))
    model = nn.Sequential()
    model.body, model.head = nn.Linear(6, 6), nn.Sequential(head) if inside else head
    model.eval()(X)  # from now on its weight has a graph
    return model


def trained(model, parameters):
    """Three steps; spectral_norm changes its vectors in training alone."""
    optimizer = torch.optim.SGD(parameters, 0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_copy_of_a_module_with_a_weight_hook_trains_as_the_module(norm, inside, tmp_path):
    bare, model = made(norm, inside), made(norm, inside)
    delta = LoraModel(model, modified_modules=["body"], modules_to_save=["head"])
    (lora,) = [layer for name, layer in delta.layers.items() if name == "body"]
    delta.freeze_module()
    opendelta.check(model, X)
    copied = [p for n, p in model.named_parameters() if ".module." in n]
    trained(model, copied)
    trained(bare, bare.head.parameters())
    assert not lora.lora_B.any()
    torch.testing.assert_close(model(X), bare(X))
    for one, other in zip(copied, bare.head.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    shake(delta)
    expected = model(X)
    torch.testing.assert_close(composition(model).to_backbone()(X), expected)
    composition(model).save(tmp_path)
    fresh = made(norm, inside)
    opendelta.load(tmp_path, fresh)
    torch.testing.assert_close(fresh(X), expected)


def test_a_copy_of_a_module_with_a_weight_hook_of_its_own_is_refused():
    def compute(module, args):
        module.weight = module.base * 2

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].base = nn.Parameter(model[1].weight.detach() / 2)
    del model[1].weight
    model[1].register_forward_pre_hook(compute)
    model(X)
    with pytest.raises(SiteError, match=r"modules_to_save='1': .*compute its weight"):
        LoraModel(model, modified_modules=["0"], modules_to_save=["1"])
    opendelta.assert_pristine(model)


class Plain(nn.Module):
    """A head with tensors, and a module, that are in no table."""

    def __init__(self):
        super().__init__()
        self.fc, self.prior = nn.Linear(6, 3), torch.randn(3, 3)
        self.more = {"shift": [torch.randn(3)], "count": torch.tensor([2])}
        self.aside = [nn.Linear(3, 3)]

    def forward(self, x):
        y = self.fc(x) @ self.prior + self.more["shift"][0]
        return self.aside[0](y) * self.more["count"]

    def converted(self, dtype):
        self.prior = self.prior.to(dtype)
        self.more["shift"] = [self.more["shift"][0].to(dtype)]
        self.aside[0].to(dtype)
        return self.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_in_no_table_follow_the_copy_s_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6).to(dtype), Plain().converted(dtype)).eval()
    before = copy.deepcopy(model[1])
    LoraModel(model, modified_modules=["0"], modules_to_save=["1"])
    with torch.no_grad():
        out = model(X.to(dtype))
        expected = copy.deepcopy(before).converted(torch.float32)(model[0](X.to(dtype)).float())
        torch.testing.assert_close(out, expected.to(dtype))
        assert model[1].prior.dtype == model[1].aside[0].weight.dtype == dtype
        assert torch.equal(model[1].prior, before.prior)
        plain = composition(model).to_backbone()
        assert plain[1].prior.dtype == plain[1].aside[0].weight.dtype == dtype
        torch.testing.assert_close(plain(X.to(dtype)), before(model[0](X.to(dtype))))


def test_a_dtype_that_differs_elsewhere_is_told_with_the_way_out():
    outside = torch.randn(6, 3).bfloat16()

    class Closes(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return (x * self.scale) @ outside

    model = nn.Sequential(nn.Linear(6, 6), Closes()).bfloat16()
    delta = LoraModel(model, modified_modules=["0"], modules_to_save=["1"])
    with pytest.raises(RuntimeError) as caught:
        model(X.bfloat16())
    assert "dtype='backbone'" in caught.value.__notes__[0]
    delta.detach()
    LoraModel(model, modified_modules=["0"], modules_to_save=["1"], dtype="backbone")
    model(X.bfloat16())
