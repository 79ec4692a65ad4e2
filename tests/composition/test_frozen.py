"""`frozen()`: joined matrices are kept inside the block, and whatever changes there is noticed."""

import copy
import weakref

import pytest
import torch
from support.counting import Counted, each_by_itself, loras, one_linear
from support.models import vectors
from support.nets import shake
from torch import nn

import opendelta
from opendelta import LoraModel, composition

pytestmark = pytest.mark.covers("Composition.frozen")


def test_frozen_joins_once_and_switching_inside_is_safe():
    model, x = one_linear(), vectors(3, 16).double()
    plain = model(x)
    deltas = loras(model, 3, lora_r=2)
    model(x)
    composed = composition(model)
    with torch.no_grad():
        all_on = model(x)
        with composed.only("lora_1"):
            one = model(x)
        with composed.frozen():
            for _ in range(2):
                assert torch.equal(model(x), all_on)
                with composed.only("lora_1"):
                    torch.testing.assert_close(model(x), one)
            with Counted() as ops:
                model(x)
            assert ops.of("cat", "mm", "addmm", "addmm_") == 3
            deltas[1].scale = 0.5
            scaled = model(x)
            deltas[1].scale = 1
            assert torch.equal(model(x), all_on)
            deltas[0].detach()
            with_two = model(x)
            twin = copy.deepcopy(model)
        torch.testing.assert_close(model(x), with_two)
        torch.testing.assert_close(scaled, all_on - 0.5 * (one - plain))
        shake(composition(twin)["lora_1"])
        assert not torch.allclose(twin(x), with_two)
        shake(deltas[1])
        assert not torch.allclose(model(x), with_two)


def test_frozen_notices_that_dropout_acts_or_no_longer():
    model, x = one_linear(), vectors(3, 16).double()
    loras(model, 2, lora_r=2, lora_dropout=0.5)
    with torch.no_grad(), composition(model).frozen():
        expected = model.eval()(x)
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), expected)


def test_frozen_refuses_gradients_and_says_that_values_changed():
    model, x = one_linear(), vectors(3, 16).double()
    (delta,) = loras(model, 1, lora_r=2)
    with composition(model).frozen(), pytest.raises(opendelta.DeltaError, match="no_grad"):
        model(x)

    def change_inside():
        with torch.no_grad(), composition(model).frozen():
            model(x)
            shake(delta)

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        change_inside()
    assert model(x).requires_grad


def by_data(parameters):
    for parameter in parameters:
        parameter.data[0, 0] += 1


def by_a_fused_optimizer(parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, fused=True).step()


def by_another_tensor(parameters):
    for parameter in parameters:
        parameter.data = torch.zeros_like(parameter)


def by_another_dtype(parameters):
    for parameter in parameters:
        parameter.data = parameter.data.float()


def by_loading(layer):
    values = {name: p + 1 for name, p in layer.state_dict().items()}
    layer.load_state_dict(values, assign=True)


def by_another_parameter(layer):
    layer.lora_A = nn.Parameter(layer.lora_A + 1)


def by_the_table(layer):
    layer._parameters["lora_B"] = nn.Parameter(layer.lora_B + 1)


def by_none(layer):
    del layer.lora_A


@pytest.mark.parametrize("change", [by_loading, by_another_parameter, by_the_table, by_none])
def test_frozen_notices_parameters_that_take_the_place_of_others(change):
    model, x = one_linear(), vectors(3, 16).double()
    (delta,) = loras(model, 1, lora_r=2)

    def change_inside():
        with torch.no_grad(), composition(model).frozen():
            model(x)
            change(delta.layers["0"])

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        change_inside()


@pytest.mark.parametrize(
    "change", [by_data, by_a_fused_optimizer, by_another_tensor, by_another_dtype]
)
def test_frozen_notices_changes_that_torch_does_not_count(change):
    model, x = one_linear(), vectors(3, 16).double()
    (delta,) = loras(model, 1, lora_r=2)

    def change_inside():
        with torch.no_grad(), composition(model).frozen():
            model(x)
            change(list(delta.parameters()))

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        change_inside()


def test_deltas_that_come_and_go_inside_frozen_act_and_leave_nothing():
    model, x = one_linear(), vectors(3, 16).double()
    (stays,) = loras(model, 1, lora_r=2)
    gone = []
    with torch.no_grad(), composition(model).frozen():
        for seed in range(10):
            guest = shake(LoraModel(model, modified_modules=["0"], lora_r=2, name="guest"), seed)
            with each_by_itself():
                expected = guest.layers["0"].product(x) + stays.layers["0"].product(x)
            with composition(model).only():
                expected += model(x)
            torch.testing.assert_close(model(x), expected)
            gone.append(weakref.ref(guest.layers["0"].lora_A))
            guest.detach()
            del guest  # the next one's layers may lie where its own did
        assert not any(parameter() is not None for parameter in gone)


def test_values_of_a_delta_that_left_frozen_count_as_changed_inside():
    model, x = one_linear(), vectors(3, 16).double()
    (delta,) = loras(model, 1, lora_r=2)

    def change_inside():
        with torch.no_grad(), composition(model).frozen():
            model(x)
            shake(delta)
            model(x)
            delta.detach()

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        change_inside()


def test_values_that_were_others_in_between_count_as_changed_inside():
    model, x = one_linear(), vectors(3, 16).double()
    (delta,) = loras(model, 1, lora_r=2)
    kept = [p.detach().clone() for p in delta.parameters()]

    def change_inside():
        with torch.no_grad(), composition(model).frozen():
            model(x)
            shake(delta)
            model(x)
            for parameter, value in zip(delta.parameters(), kept, strict=True):
                parameter.copy_(value)

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        change_inside()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_frozen_notices_changes_of_a_start_that_is_no_parameter(init):
    model, x = one_linear(), vectors(3, 16).double()
    (delta,) = loras(model, 1, lora_r=2, init=init)

    def change_inside():
        with torch.no_grad(), composition(model).frozen():
            model(x)
            delta.layers["0"].start_B.data.mul_(2)

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        change_inside()
