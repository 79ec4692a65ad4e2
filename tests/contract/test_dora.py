"""`use_dora`: DoRA's equation and its derivatives, alone and among other layers, and its bytes."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from support.counting import saved_bytes
from support.models import vectors
from support.nets import IDS, Conv1D, net, shake
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel

pytestmark = pytest.mark.covers("LoraConfig.use_dora")

MODULES = {
    "wider": lambda bias: nn.Linear(4, 7, bias=bias),
    "narrower": lambda bias: nn.Linear(7, 4, bias=bias),
    "Conv1D": lambda bias: Conv1D(7, 4),
}


def dora(module, **options):
    """A DoRA on `module`, in float64, that visibly acts."""
    model = nn.Sequential(module).double().train()
    delta = LoraModel(model, modified_modules=["0"], lora_r=2, use_dora=True, **options)
    return model, shake(delta).layers["0"]


def by_hand(layer, module, x):
    """DoRA's equation (arXiv:2402.09353): no gradient passes through the norm."""
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    direction = weight + layer.scaling * layer.lora_B @ layer.lora_A
    magnitude = layer.lora_magnitude_vector / direction.norm(dim=1).detach()
    out = x @ (magnitude[:, None] * direction).t()
    return out if module.bias is None else out + module.bias


def test_dora_starts_as_the_identity_on_rows_of_zeros_too_and_trains_them():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    with torch.no_grad():
        model[0].weight[1] = 0
    plain = model(x)
    delta = LoraModel(model, modified_modules=["0"], lora_r=2, use_dora=True)
    torch.testing.assert_close(model(x), plain)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[:, 1].pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in delta.parameters())
        optimizer.step()
    assert not torch.allclose(model(x)[:, 1], plain[:, 1], atol=1e-4)


@pytest.mark.parametrize(
    "sizes", [(16, 32), (32, 16)]
)  # a product that is computed again, and one kept
def test_dora_s_gradients_beside_a_bfloat16_weight_are_exact_but_for_its_rounding(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes)).bfloat16()
    options = {"modified_modules": ["0"], "use_dora": True, "dtype": "float32"}
    layer = shake(LoraModel(model, **options), scale=0.1).layers["0"]
    x = torch.randn(64, sizes[0]).bfloat16()
    model(x).float().pow(2).sum().backward()

    exact = {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}
    W, b = (p.detach().double() for p in (model[0].weight, model[0].bias))
    changed = W + layer.scaling * exact["lora_B"] @ exact["lora_A"]
    n = exact["lora_magnitude_vector"] / changed.norm(dim=1).detach()
    (n * (x.double() @ changed.T) + b).pow(2).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 2e-2, name


@pytest.mark.parametrize("kind", sorted(MODULES))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", ["all", "delta", "magnitude", "factors"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (), (2, 0)])
def test_dora_has_the_derivatives_of_its_equation(kind, bias, trained, shape):
    torch.manual_seed(0)
    model, layer = dora(MODULES[kind](bias))
    for name, parameter in model.named_parameters():
        part = "magnitude" if "magnitude" in name else "factors" if "lora" in name else "all"
        parameter.requires_grad_(trained in ("all", part) or (trained == "delta" and part != "all"))
    x = torch.randn(*shape, 7 if kind == "narrower" else 4).double().requires_grad_()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]

    def derivatives(out):
        first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)
        return [out.detach(), *(g.detach() for g in first), *second]

    expected = derivatives(by_hand(layer, model[0], x))
    torch.testing.assert_close(derivatives(model(x)), expected)
    plain = torch.autograd.grad(model(x).pow(3).sum(), inputs)
    torch.testing.assert_close(list(plain), expected[1 : 1 + len(inputs)])
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected[0])


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_dora_with_dropout_has_the_gradients_of_what_it_computed(monkeypatch, kind):
    torch.manual_seed(0)
    model, layer = dora(MODULES[kind](True), lora_dropout=0.4)
    norm = layer.norm(layer.kind.matrix(model[0].weight.detach()))
    monkeypatch.setattr(layer, "norm", lambda weight: norm)  # no gradient passes through it
    x = torch.randn(3, 7 if kind == "narrower" else 4).double().requires_grad_()
    inputs = [x, *model.parameters()]

    def run(*_):
        torch.manual_seed(3)
        return model(x)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert not torch.equal(run(), model(x))


@pytest.mark.parametrize("kind", ["wider", "narrower"])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_output_of_dora_may_be_changed_in_place(kind, checkpointed):
    torch.manual_seed(0)
    model, layer = dora(MODULES[kind](True))
    x = torch.randn(5, 7 if kind == "narrower" else 4).double().requires_grad_()
    parameters = [p for n, p in model.named_parameters() if "lora" in n]

    def run(x):
        return torch.relu_(model(x))

    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    expected = torch.relu(by_hand(layer, model[0], x))
    found = torch.autograd.grad(out.pow(2).sum(), [x, *parameters])
    torch.testing.assert_close(found, torch.autograd.grad(expected.pow(2).sum(), [x, *parameters]))


# torch scripts its own formulas for forward mode when they are first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_dora_is_transformed_cast_and_compiled_as_its_equation():
    torch.manual_seed(0)
    model, layer = dora(nn.Linear(4, 7))
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    jacobian = torch.func.jacfwd(model)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x[0]))
    given = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in given.items()}

    def total(parameters):
        return torch.func.functional_call(model, parameters, (x,)).sin().sum()

    _, forward = torch.func.jvp(total, (given,), (tangents,))
    back = torch.func.grad(total)(given)  # it takes |W + D| for a constant, and so must the other
    torch.testing.assert_close(forward, sum((back[n] * tangents[n]).sum() for n in given))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), by_hand(layer, model[0], x))
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), model(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("beneath", ["lora", "adapter"])
def test_dora_on_other_layers_calls_them(beneath):
    torch.manual_seed(0)
    plain = nn.Linear(4, 7).double()
    model = nn.Sequential(copy.deepcopy(plain))
    method = LoraModel if beneath == "lora" else AdapterModel
    first = shake(method(model, modified_modules=["0"]))
    layer = shake(LoraModel(model, modified_modules=["0"], use_dora=True, name="dora")).layers["0"]
    x = torch.randn(3, 4).double()
    if beneath == "lora":
        A, B = (p.detach() for p in first.parameters())
        plain.weight.data += 2 * B @ A
        torch.testing.assert_close(model(x), by_hand(layer, plain, x))
    else:
        only_adapter = nn.Sequential(copy.deepcopy(plain))
        AdapterModel(only_adapter, modified_modules=["0"]).load_state_dict(first.state_dict())
        n = by_hand(layer, plain, x)  # n (W x + D x) + b; the adapter changes W x + b before
        scale = layer.lora_magnitude_vector / (plain.weight + layer.delta_weight()).norm(dim=1)
        torch.testing.assert_close(model(x), n + scale * (only_adapter(x) - plain(x)))


def test_dora_keeps_its_product_only_where_that_is_not_wider_than_the_input():
    x, rank = vectors(64, 16).requires_grad_(), 2
    for width, product in ((20, 0), (16, 64 * 16), (12, 64 * 12)):
        for rate in (0.0, 0.1):
            model = nn.Sequential(nn.Linear(16, width)).requires_grad_(False)
            shake(
                LoraModel(
                    model, modified_modules=["0"], lora_r=rank, use_dora=True, lora_dropout=rate
                )
            )
            rows = 2 * width  # n, and |W + D| that it was divided by
            expected = 4 * (64 * 16 + 64 * rank + rows + product)
            assert saved_bytes(model.train(), x) == expected


@pytest.mark.covers("DeltaConfig.gate")
@pytest.mark.parametrize("place", ["linear", "conv1d", "conv2d"])
def test_a_gate_scales_dora_too(place):
    model = net()
    plain, options = model(IDS), {"modified_modules": [place], "use_dora": True}
    ungated = shake(opendelta.LoraModel(model, name="ungated", **options))
    full, values = model(IDS), ungated.state_dict("gated")
    ungated.detach()
    delta = opendelta.LoraModel(model, name="gated", gate=True, **options)
    delta.load_state_dict({**delta.state_dict(), **values})
    for bias, expected in ((-50.0, plain), (50.0, full)):
        nn.init.constant_(delta.layers[place].gate.bias, bias)
        assert torch.allclose(model(IDS), expected, atol=1e-5)
    assert not torch.allclose(full, plain, atol=1e-3)
