"""Deltas and accelerate: hooks, device maps and offloading, in any order with attaching."""

import copy
import functools
import itertools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from accelerate.utils.dataclasses import get_module_class_from_name
from support.models import FIVE, build, detach, logits, put_deltas, tower, vectors
from support.nets import shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, Delta, LoraModel, SiteError

five_models = pytest.mark.parametrize("name", FIVE)


# ------------------------------------------------------------------------- hooks on a single module
def small():
    """The same net of one linear module every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


def lora_on(model):
    """The same acting LoRA on `model` every time."""
    torch.manual_seed(1)
    return shake(LoraModel(model, modified_modules=["0"], lora_r=2))


def hook(module):
    add_hook_to_module(module, ModelHook(), append=True)


def wrap(module):
    """Replace the forward as transformers' tensor parallelism does: by a function around it."""
    original = module.forward

    def wrapped(*args, **kwargs):
        return original(*args, **kwargs)

    module.forward = wrapped


FOREIGN: dict[str, Callable[[nn.Module], Any]] = {
    "hook": hook,
    "unhook": remove_hook_from_module,
    "wrap": wrap,
}


def valid_orders():
    """Every order of the events that makes sense.

    Unhooking puts back the forward from before the hook, and with it drops what wrapped the hook.
    """
    for order in itertools.permutations(["hook", "unhook", "wrap", "attach", "detach"]):
        at = order.index
        dropped = at("hook") < at("wrap") < at("unhook")
        if at("hook") < at("unhook") and at("attach") < at("detach") and not dropped:
            yield order


def same_instance_attributes(one, other):
    """Whether both have the same names in `__dict__`, and the same functions behind methods."""
    for key, value in one.__dict__.items():
        counterpart = other.__dict__.get(key)
        if type(value) is not type(counterpart):
            return False
        if isinstance(value, MethodType) and value.__func__ is not counterpart.__func__:
            return False
    return list(one.__dict__) == list(other.__dict__)


@pytest.mark.parametrize("order", list(valid_orders()), ids=" ".join)
def test_foreign_forwards_and_deltas_come_and_go_in_any_order(order):
    x = vectors(2, 8)
    model, without_deltas = small(), small()
    plain = model(x)
    delta = lora_on(small())
    changed = delta.backbone_model(x)
    for event in order:
        if event == "attach":
            delta = lora_on(model)
        elif event == "detach":
            delta.detach()
        else:
            FOREIGN[event](model[0])
            FOREIGN[event](without_deltas[0])
        expected = changed if delta.backbone_model is model and delta.attached else plain
        assert torch.equal(model(x), expected), event
        assert torch.equal(copy.deepcopy(model)(x), expected), f"copied after {event}"
    opendelta.assert_pristine(model)
    assert type(model[0]) is nn.Linear
    assert same_instance_attributes(model[0], without_deltas[0])


def test_a_hook_goes_around_the_deltas():
    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    x = vectors(2, 8)
    for hooked_first in (True, False):
        model = small()
        if hooked_first:
            add_hook_to_module(model[0], Double())
        delta = lora_on(model)
        if not hooked_first:
            add_hook_to_module(model[0], Double())
        layer = delta.layers["0"]
        weight = layer.fold({"weight": model[0].weight})["weight"]
        expected = 2 * nn.functional.linear(x, weight, model[0].bias)
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_accelerate_hooks_blocks_with_and_without_deltas_alike():
    model = tower()
    AdapterModel(model, modified_modules=["blocks.0"])
    found = get_module_class_from_name(model, "Block")
    assert all(isinstance(block, found) for block in model.blocks)


class Holder:
    """A callable that keeps a forward where nobody looks."""

    def __init__(self, forward):
        self.inner = forward

    def __call__(self, *args):
        return self.inner(*args)


HIDING: dict[str, Callable[[nn.Module], Any]] = {
    "a function of its own": lambda module: lambda x: x,
    "an object": lambda module: Holder(module.forward),
    "a partial": lambda module: functools.partial(Holder(module.forward)),
    "another module's forward": lambda module: nn.Linear(8, 8).forward,
}


@pytest.mark.parametrize("hiding", HIDING)
def test_a_forward_that_hides_the_deltas_is_refused_and_the_model_stays_untouched(hiding):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].forward = replacement = HIDING[hiding](model[1])
    refused = pytest.raises(SiteError, match=r"'1' \(Linear\) had its forward replaced")
    with untouched(model), refused:
        LoraModel(model, modified_modules=["0", "1"])
    assert model[1].forward is replacement


# ------------------------------------------------------------------------- whole models, dispatched
# BART has a buffer of its own: a device map must name it, and is then warned of.
pytestmark = [
    pytest.mark.covers("Delta.attach", "Delta.detach"),
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match"),
]


def dispatch(model):
    """Put hooks on all children, as a device map over several devices does."""
    places = {name: "cpu" for name, _ in model.named_children()}
    places |= {name: "cpu" for name, _ in model.named_buffers() if "." not in name}
    dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.fixture
def expected(name):
    """What the model computes with the deltas where nothing is hooked."""
    model = build(name)
    put_deltas(model, name)
    return logits(model)


@five_models
@pytest.mark.parametrize("attached_first", [True, False], ids=["attach first", "dispatch first"])
def test_deltas_act_on_a_dispatched_model_and_stay_when_the_hooks_leave(
    name, attached_first, expected
):
    model, without_deltas = build(name), build(name)
    plain = logits(model)
    deltas: tuple[Delta, ...] = ()
    if attached_first:
        deltas = put_deltas(model, name)
    dispatch(model)
    dispatch(without_deltas)
    if not attached_first:
        deltas = put_deltas(model, name)

    assert torch.allclose(logits(model), expected, atol=1e-6)
    assert opendelta.unreached(model) == []
    assert torch.allclose(logits(copy.deepcopy(model)), expected, atol=1e-6)

    remove_hook_from_submodules(model)
    remove_hook_from_submodules(without_deltas)
    assert torch.allclose(logits(model), expected, atol=1e-6)
    detach(deltas)
    assert torch.equal(logits(model), plain)
    opendelta.assert_pristine(model, like=opendelta.snapshot(without_deltas))
    for where, module in model.named_modules():
        assert same_instance_attributes(module, without_deltas.get_submodule(where)), where


@five_models
def test_deltas_leave_a_dispatched_model_as_it_was(name):
    model = build(name)
    dispatch(model)
    plain, before = logits(model), opendelta.snapshot(model)
    detach(put_deltas(model, name))
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(logits(model), plain)


@five_models
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_deltas_go_on_a_model_whose_weights_are_offloaded(name, where, expected, tmp_path):
    model = build(name)
    plain = logits(model)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())

    deltas = put_deltas(model, name)
    assert not any(p.is_meta for delta in deltas for p in delta.parameters())
    assert torch.allclose(logits(model), expected, atol=1e-6)
    assert opendelta.unreached(model) == []
    assert all(p.is_meta for n, p in model.named_parameters() if "deltas" not in n)
    detach(deltas)
    assert torch.allclose(logits(model), plain, atol=1e-6)


def test_a_copy_of_an_offloaded_module_is_refused(tmp_path):
    def two():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    options = {"modified_modules": ["0"], "modules_to_save": ["1"]}
    made = LoraModel(two(), **options)
    made.freeze_module()
    made.save_finetuned(tmp_path)
    model = two()
    cpu_offload(model, execution_device=torch.device("cpu"))
    why = r"modules_to_save='1': accelerate offloads the module"
    with untouched(model):
        with pytest.raises(SiteError, match=why):
            LoraModel(model, **options)
        with pytest.raises(opendelta.DeltaLoadError, match=why):
            opendelta.load(tmp_path, model, check_backbone=False)


def test_deltas_on_an_offloaded_model_get_gradients(tmp_path):
    model = build("llama")
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    lora, ia3, adapter = put_deltas(model, "llama")
    lora.freeze_module()
    ids = torch.arange(5, 12)[None]
    model(ids).logits.pow(2).sum().backward()
    for delta in (lora, ia3, adapter):
        for parameter in delta.parameters():
            assert parameter.grad.abs().sum() > 0


@pytest.fixture
def offloaded_with_deltas(name):
    """A model and its deltas, offloaded together."""
    model = build(name)
    deltas = put_deltas(model, name)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model, deltas


@pytest.mark.parametrize("name", ["llama"])
def test_deltas_may_be_offloaded_with_the_model(name, expected, offloaded_with_deltas):
    model, deltas = offloaded_with_deltas
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.allclose(logits(model), expected, atol=1e-6)
    assert opendelta.unreached(model) == []
    detach(deltas)
    assert torch.allclose(logits(model), logits(build(name)), atol=1e-6)


@pytest.mark.parametrize("name", ["llama"])
def test_deltas_that_were_offloaded_with_the_model_come_back(name, expected, offloaded_with_deltas):
    model, deltas = offloaded_with_deltas
    detach(deltas)
    for delta in deltas:
        delta.attach()
    assert torch.allclose(logits(model), expected, atol=1e-6)


def test_a_module_whose_block_is_loaded_as_a_whole_is_refused_because_the_delta_would_be_missing():
    model = build("bert")
    cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=["BertSelfAttention"]
    )
    with untouched(model), pytest.raises(SiteError, match="attach before"):
        LoraModel(model, modified_modules=["query"])
