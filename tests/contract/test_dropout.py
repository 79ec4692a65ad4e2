"""Dropout inside a delta: when it acts, what it drops, its gradients, the bytes that it keeps."""

import pytest
import torch
import torch.utils.checkpoint
from support.counting import loras, one_linear, saved_bytes
from support.models import vectors
from support.nets import IDS, net, shake
from torch import nn

from opendelta import LoraModel, VeraModel
from opendelta._layers import low_rank as products

pytestmark = pytest.mark.covers("LoraConfig.lora_dropout")


@pytest.fixture
def model():
    return net()


def test_dropout_acts_in_training_mode_only(model):
    delta = shake(LoraModel(model, modified_modules=["linear"], lora_dropout=0.5))
    assert torch.equal(model(IDS), model(IDS))
    delta.train()
    assert not torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("count", [1, 3])
def test_dropout_has_the_gradients_of_what_it_computed(count):
    model, x = one_linear(), vectors(5, 16).double().requires_grad_()
    loras(model, count, lora_r=2, lora_dropout=0.4)
    model.train()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run(*_):
        torch.manual_seed(3)
        return model(x)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert torch.equal(run(), run())
    assert not torch.equal(run(), model(x))
    run().pow(2).sum().backward()
    expected = [p.grad for p in inputs]
    for reentrant in (True, False):
        for parameter in inputs:
            parameter.grad = None
        torch.manual_seed(3)
        again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        again.pow(2).sum().backward()
        torch.testing.assert_close([p.grad for p in inputs], expected)


def test_dropout_needs_nothing_of_the_default_device():
    model, x = one_linear(), vectors(5, 16).double()
    loras(model.train(), 2, lora_r=2, lora_dropout=0.4)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(model(x), expected)


def test_dropout_drops_each_layer_s_inputs_for_itself():
    model = one_linear(bias=False)
    loras(model, 2, lora_r=2, lora_dropout=0.5)
    model.train()
    x = torch.ones(4000, 16, dtype=torch.float64)
    out = model(x).detach()
    model.eval()
    expected = model(x[:1])[0]
    torch.testing.assert_close(out.mean(0), expected, rtol=0.2, atol=0.05)
    seeds = [part.seed for part in products._segments([0.5, 0.5, 0.0, 0.0, 0.5], True)]
    assert len(set(seeds)) == 4
    assert seeds[2] is None


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.99])
def test_dropout_drops_as_many_values_as_it_says_and_none_because_of_another(rate):
    x, count = torch.ones(1000, 1001), 1000 * 1001
    kept = products._mask(x, products.Segment(0, 1, rate, 7)).flatten()
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-3)
    assert torch.equal(kept, products._mask(x, products.Segment(0, 1, rate, 7)).flatten())
    slack = 5 * (rate * (1 - rate) / count) ** 0.5
    zero = (kept == 0).double()
    assert zero.mean().item() == pytest.approx(rate, abs=slack)
    for lane in range(4):
        assert zero[lane::4].mean().item() == pytest.approx(rate, abs=2 * slack)
    for step in (1, 2, 3, 4, 1001):
        both = (zero[step:] * zero[:-step]).mean().item()
        assert both == pytest.approx(rate**2, abs=2 * slack)


@pytest.mark.parametrize("shape", [(0, 16), (1, 3), (5, 7)])
def test_dropout_takes_any_number_of_values(shape):
    for rate in (1e-9, 0.5, 1 - 1e-9):
        mask = products._mask(torch.ones(shape), products.Segment(0, 1, rate, 7))
        assert mask.shape == shape
        assert mask.isfinite().all()


def test_dropout_keeps_no_copy_of_the_input():
    x = vectors(64, 16).requires_grad_()
    kept = {}
    for rate in (0.0, 0.1):
        model = one_linear(dtype=torch.float32)
        loras(model, 4, lora_r=2, lora_dropout=rate)
        kept[rate] = saved_bytes(model.train(), x)
    assert kept[0.1] == kept[0.0] == 4 * (64 * 16 + 64 * 4 * 2)  # x, and A x of rank 2, four times


@pytest.mark.covers("VeraConfig.vera_dropout")
def test_vera_drops_its_inputs_while_it_trains_alone():
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double().eval()
    delta = shake(VeraModel(model, modified_modules=["0"], r=8, vera_dropout=0.5))
    x = torch.ones(4000, 16, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(expected - expected[0], torch.zeros_like(expected))
    with delta.disabled():
        plain = model(x)[0]
    delta.train()
    torch.manual_seed(0)
    out = model(x)
    assert out.std(0).min() > 0
    torch.testing.assert_close((out.mean(0) - plain), expected[0] - plain, rtol=0.2, atol=0.02)
