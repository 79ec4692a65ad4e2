"""LoRA with a frozen A (LoRA-FA): B alone trains, on less memory, and all else is LoRA's."""

import copy

import pytest
import torch
from support.counting import saved_bytes
from support.nets import IDS, net, shake
from torch import nn

import opendelta
from opendelta import DeltaError, LoraModel, SiteError

pytestmark = pytest.mark.covers("LoraConfig.freeze_A")


def linear(width=64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    lora = LoraModel(model, modified_modules=["0", "1"], lora_r=4, **options)
    lora.freeze_module()
    return model, lora


def test_only_b_trains_whatever_is_switched():
    model, lora = linear(freeze_A=True)
    lora.requires_grad_(False), lora.requires_grad_(True)
    assert {name.rpartition(".")[2] for name, _ in lora.named_parameters()} == {"lora_B"}
    before = copy.deepcopy(lora.state_dict())
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.1)
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    for key, value in lora.state_dict().items():
        assert torch.equal(value, before[key]) == key.endswith("lora_A"), key


def test_its_gradients_are_those_of_b_in_a_whole_lora():
    grads = []
    for freeze in (True, False):
        model, lora = linear(freeze_A=freeze, dtype="float64")
        model.double()
        with torch.no_grad():
            for layer in lora.layers.values():
                layer.lora_A.copy_(torch.linspace(-1, 1, 256).view(4, 64))
                layer.lora_B.copy_(torch.linspace(1, -1, 256).view(64, 4))
        x = torch.linspace(-1, 1, 512, dtype=torch.float64).view(8, 64)
        model(x).square().sum().backward()
        grads.append([layer.lora_B.grad for layer in lora.layers.values()])
    for frozen, whole in zip(*grads, strict=True):
        assert torch.allclose(frozen, whole, rtol=1e-12)


def test_the_inputs_are_not_kept():
    x = torch.randn(512, 64)
    (model, _), (whole, _) = linear(freeze_A=True), linear()
    inputs = 2 * x.numel() * x.element_size()
    assert saved_bytes(whole.train(), x) - saved_bytes(model.train(), x) >= inputs / 2


def test_a_second_derivative_is_refused_by_name():
    model, _ = linear(freeze_A=True)
    x = torch.randn(4, 64, requires_grad=True)
    loss = model(x).square().sum()
    with pytest.raises(DeltaError, match=r"second derivative .*freeze_A"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_it_is_saved_loaded_merged_and_combined(init, tmp_path):
    model, plain = net(), net()
    lora = LoraModel(model, modified_modules=["linear", "conv2d"][: 1 + (init == "kaiming")],
                     freeze_A=True, init=init)  # fmt: skip
    shake(lora)
    lora.freeze_module()
    expected = model(IDS)
    lora.save_finetuned(tmp_path / "lora")
    (again,) = opendelta.load(tmp_path / "lora", plain)
    assert again.config.freeze_A
    assert torch.equal(plain(IDS), expected)
    opendelta.composition(model).merge()
    assert torch.allclose(model(IDS), expected, atol=1e-5)
    opendelta.composition(model).unmerge()
    mix = opendelta.combine(model, {"lora": 1.0})
    with opendelta.composition(model).only(mix.name):
        assert torch.allclose(model(IDS), expected, atol=1e-5)


def test_an_embedding_is_refused():
    with pytest.raises(SiteError, match=r"'embedding': freeze_A is not for embeddings"):
        LoraModel(net(), modified_modules=["embedding"], freeze_A=True)
