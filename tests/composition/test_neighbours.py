"""Low-rank layers that are neighbours on a module run as one pair of matrix products."""

import pytest
import torch
from support.counting import Counted, each_by_itself, loras, one_linear
from support.models import vectors
from support.nets import shake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opendelta import AdapterModel, LohaModel, LoraModel, composition

pytestmark = pytest.mark.covers("LoraModel", "LohaModel")


def results(model, x):
    """The output, the gradient of the input, and those of all parameters that have one."""
    torch.manual_seed(5)
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(16,), (5, 16), (2, 3, 16), (2, 2, 3, 16), (8, 9, 16), (2, 0, 16)]
)
@pytest.mark.parametrize("scales", ["equal", "unequal"])
def test_neighbours_compute_what_each_by_itself_does(bias, shape, scales):
    model, x = one_linear(bias), vectors(*shape).double()
    for i in range(3):
        alpha = 16.0 if scales == "equal" else 3.0 + i
        shake(LoraModel(model, modified_modules=["0"], lora_r=2, lora_alpha=alpha, name=f"l{i}"))
    shake(AdapterModel(model, modified_modules=["0"], bottleneck_dim=3))
    shake(LohaModel(model, modified_modules=["0"], r=1))
    shake(LoraModel(model, modified_modules=["0"], lora_r=3, name="top"))
    found = results(model, x)
    with torch.no_grad():
        without_gradient = model(x)
    with each_by_itself():
        expected = results(model, x)
    assert len(found) == len(expected) == 2 + 4 * 2 + 4 + 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(without_gradient, expected[0], rtol=1e-6, atol=1e-10)


def test_neighbours_are_beside_a_weight_of_a_tensor_s_subclass_too():
    class Weight(torch.Tensor):
        """Makes what is computed from it a tensor of this class."""

    model, x = one_linear(), vectors(2, 3, 16).double()
    loras(model, 2, lora_r=2)
    expected = model(x)
    model[0].weight = nn.Parameter(model[0].weight.as_subclass(Weight), requires_grad=False)
    torch.testing.assert_close(model(x).as_subclass(torch.Tensor), expected)


def test_second_derivatives_are_those_of_each_by_itself():
    model, x = one_linear(), vectors(3, 16).double()
    loras(model, 2, lora_r=2)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def second():
        first = torch.autograd.grad(model(x).pow(3).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), parameters)

    found = second()
    with each_by_itself():
        expected = second()
    torch.testing.assert_close(found, expected)


def test_eight_loras_are_one_pair_of_products():
    model, x = one_linear(), vectors(2, 3, 16).double()
    loras(model, 8, lora_r=2)
    model(x)
    with torch.no_grad(), Counted() as ops:
        model(x)
    products = ops.of("mm", "addmm", "addmm_", "bmm")
    assert (products, ops.of("addmm_")) == (3, 1)  # the module's own, A x, and B in place
    assert ops.of("mul", "mul_", "add", "add_") == 0
    with Counted() as ops:
        model(x)
    assert (ops.of("mm", "addmm", "addmm_", "bmm"), ops.of("addmm_")) == (3, 1)


def test_values_that_change_unseen_are_seen_by_the_next_forward():
    model, x = one_linear(dtype=torch.float32), vectors(3, 16)
    deltas = loras(model, 2, lora_r=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def is_current():
        found = model(x)
        with each_by_itself():
            torch.testing.assert_close(found, model(x))
        return found.detach()

    before = is_current()
    model(x).sum().backward()
    optimizer.step()
    stepped = is_current()
    deltas[0].layers["0"].lora_B.data += 1
    written = is_current()
    assert not torch.allclose(before, stepped)
    assert not torch.allclose(stepped, written)


class Products(TorchDispatchMode):
    """Keeps the shape of what each matrix product gives."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() == "aten::mm":
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("rank", [2, 8, 15])
def test_no_product_of_many_tokens_has_few_columns(rank):
    model, x = one_linear(width=64), vectors(64, 64).double().requires_grad_()
    loras(model, 1, lora_r=rank)
    model(x)
    with torch.no_grad(), Products() as run:
        model(x)
    with Products() as trained:
        model(x).sum().backward()
    assert run.shapes == [(rank, 64)]
    assert [shape for shape in trained.shapes if shape[1] == rank] == []


def test_a_layer_in_between_parts_the_neighbours():
    model, x = one_linear(), vectors(2, 3, 16).double()
    first, second = loras(model, 2, lora_r=2)
    adapter = shake(AdapterModel(model, modified_modules=["0"], bottleneck_dim=3))
    model(x)

    def products():
        with torch.no_grad(), Counted() as ops:
            model(x)
        return ops.of("mm", "addmm", "addmm_")

    assert products() == 1 + 2 + 2
    composition(model).reorder([first, adapter, second])
    assert products() == 1 + 2 + 2 + 2


def test_a_watched_layer_runs_by_itself():
    model, x = one_linear(), vectors(3, 16).double()
    loras_on_it = loras(model, 2, lora_r=2)
    expected, calls = model(x), []
    loras_on_it[1].layers["0"].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]


# torch scripts its own formulas for forward mode when they are first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_functional_transforms_and_forward_mode_see_neighbours():
    model, x = one_linear(), vectors(4, 16).double()
    loras(model, 2, lora_r=2)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    jacobian = torch.func.jacfwd(model)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x[0]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(tangent, jacobian.sum(1))
