"""What "fast" means, where it is a count and not a time: walks over modules, copies, bytes."""

import copy
import functools
import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from support.counting import Counted, loras, one_linear, saved_bytes
from support.models import tower, vectors
from support.nets import COPIES, copied, shake
from torch.utils._python_dispatch import TorchDispatchMode

import opendelta
from opendelta import LoraModel, composition
from opendelta._backbone.backbone import Backbone
from opendelta._layers import low_rank as products
from opendelta._layers import record


# --------------------------------------------------------------------------------------- attaching
def walks(monkeypatch, model, action, what="_modules"):
    """How often `action` visits each module of the backbone to see its children, on average.

    Or to see its parameters, if `what` is "_parameters".
    """
    visits = []

    class Children(dict):
        def items(self):
            visits.append(1)
            return super().items()

        def values(self):
            visits.append(1)
            return super().values()

    for module in list(model.modules()):
        module.__dict__[what] = Children(module.__dict__[what])
    count = sum(1 for _ in model.modules())
    visits.clear()
    action()
    return len(visits) / count


@pytest.mark.parametrize("others", [0, 3])
def test_the_module_tree_is_walked_as_often_for_many_targets_as_for_few(monkeypatch, others):
    found = {}
    for depth in (4, 40):
        model = tower(depth)
        for index in range(others):
            LoraModel(model, modified_modules=["fc"], lora_r=1, name=f"other_{index}")
        found[depth] = walks(
            monkeypatch, model, lambda m=model: LoraModel(m, modified_modules=["fc", "out"])
        )
    assert found[40] <= found[4] + 0.2
    assert found[40] < 2.5


def test_a_model_on_the_meta_device_is_not_searched_for_another_one(monkeypatch):
    with torch.device("meta"):
        small, large = tower(4), tower(40)
    found = [
        walks(monkeypatch, m, lambda m=m: LoraModel(m, modified_modules=["fc"]))
        for m in (small, large)
    ]
    assert max(found) < 5


@pytest.fixture
def no_other_backbones(monkeypatch):
    monkeypatch.setattr(record, "BACKBONES", weakref.WeakSet())


@pytest.mark.covers("Composition.only", "Delta.enable", "Delta.disable", "Delta.scale")
def test_switching_looks_at_no_module(monkeypatch, no_other_backbones):
    model = tower(4)
    for index in range(4):
        LoraModel(model, modified_modules=["fc"], lora_r=1, name=f"lora_{index}")
    composed = composition(model)
    deltas = list(composed)

    def switch():
        with composed.only("lora_2", deltas[3]):
            assert [delta.active for delta in deltas] == [False, False, True, True]
        deltas[0].disable()
        deltas[0].enable()
        deltas[0].scale = 0.5

    assert walks(monkeypatch, model, switch) == 0
    composed.reorder(deltas[::-1])
    deltas[0].detach()
    with composed.only("lora_1"):
        assert [delta.active for delta in deltas] == [False, True, False, False]
    with (
        pytest.raises(opendelta.DeltaError, match=r"detached.*attach\(\)"),
        composed.only("lora_0"),
    ):
        pass
    with pytest.raises(opendelta.DeltaError, match=r"\['lora_3', 'lora_2', 'lora_1'\]"):
        composed.only("nothing").__enter__()


@pytest.mark.covers("Composition.only")
@pytest.mark.parametrize("how", COPIES)
def test_switching_a_copy_switches_its_own_deltas(no_other_backbones, how):
    model = tower(2)
    delta = shake(LoraModel(model, modified_modules=["fc"], lora_r=1))
    twin, x = copied(model, how), vectors(2, 8)
    changed = model(x)
    for one, other in ((model, twin), (twin, model)):
        with composition(one).only():
            assert torch.equal(other(x), changed)
            assert not torch.equal(one(x), changed)
    del model, delta, one, other
    gc.collect()
    assert len(record.BACKBONES) == 1
    with composition(twin).only():
        assert not torch.equal(twin(x), changed)


def test_switching_reaches_the_deltas_that_came_with_a_module(no_other_backbones):
    model, other, x = tower(2), tower(2), vectors(2, 8)
    plain = tower(2)
    plain.blocks[1] = copy.deepcopy(other.blocks[1])
    shake(LoraModel(model, modified_modules=["fc"], lora_r=1))
    shake(LoraModel(other.blocks[1], modified_modules=["fc"], lora_r=1, name="theirs"))
    model.blocks[1] = other.blocks[1]
    with pytest.warns(opendelta.UnreachedWarning, match="blocks.1.fc.deltas.lora"):
        model(x)
    with composition(model).only():
        assert torch.equal(model(x), plain(x))
    with composition(model).only("theirs"):
        assert not torch.equal(model(x), plain(x))


@pytest.mark.covers("Delta.save_finetuned", "load")
def test_saving_and_loading_walk_the_module_tree_as_often_for_many_modules(monkeypatch, tmp_path):
    found = {}
    for depth in (4, 40):
        model, fresh = tower(depth), tower(depth)
        delta = LoraModel(model, modified_modules=["fc", "out"], lora_r=1)
        delta.freeze_module()
        save = walks(monkeypatch, model, lambda d=delta: d.save_finetuned(tmp_path))
        load = walks(monkeypatch, fresh, lambda m=fresh: opendelta.load(tmp_path, m))
        found[depth] = save, load
    assert found[40][0] < 1.5
    assert found[40][1] < 3
    assert found[40][1] <= found[4][1] + 0.2


@pytest.mark.covers("Delta.save_finetuned", "load")
def test_values_are_copied_once_to_be_loaded_and_not_at_all_to_be_saved(tmp_path):
    model = tower(4)
    delta = shake(LoraModel(model, modified_modules=["fc", "out"], lora_r=1))
    delta.freeze_module()
    with Counted() as ops:
        delta.save_finetuned(tmp_path)
    assert ops.of("cat", "clone", "copy_", "_to_copy") == 0
    fresh, count = tower(4), len(delta.state_dict())
    with Counted() as ops:
        (loaded,) = opendelta.load(tmp_path, fresh)
    assert ops.of("clone", "copy_", "_to_copy") == count
    for one, other in zip(loaded.parameters(), delta.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_delta_is_loaded_beside_many_as_beside_few(monkeypatch, tmp_path):
    seen, layers = [], Backbone.delta_layers

    def counted(found):
        for layer in layers(found):
            seen.append(1)
            yield layer

    monkeypatch.setattr(Backbone, "delta_layers", counted)
    plain = tower(4).requires_grad_(False)
    LoraModel(plain, modified_modules=["fc"], lora_r=1).save_finetuned(tmp_path)
    found = {}
    for others in (2, 8):
        model = tower(4)
        for index in range(others):
            LoraModel(model, modified_modules=["fc"], lora_r=1, name=f"other_{index}")
        seen.clear()
        opendelta.load(tmp_path, model)
        found[others] = len(seen) / others
    assert found[8] <= found[2]


# ------------------------------------------------------------------------------- bytes in training


@pytest.mark.parametrize("use_dora", [True, False])
def test_selective_checkpointing_may_keep_the_products_beneath(use_dora):
    model, x = one_linear(), vectors(5, 16).double().requires_grad_()
    loras(model.train(), 1 if use_dora else 2, lora_r=2, use_dora=use_dora)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(model(x).pow(2).sum(), inputs)
    contexts = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts,
        [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    )
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    out.pow(2).sum().backward()
    torch.testing.assert_close([p.grad for p in inputs], list(expected))


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_deltas_that_do_not_train_keep_no_input_so_that_it_may_change_in_place(use_dora, rate):
    model, x = one_linear(), vectors(5, 16).double().requires_grad_()
    loras(model.train(), 1 if use_dora else 2, lora_r=2, use_dora=use_dora, lora_dropout=rate)
    model.requires_grad_(False)
    assert saved_bytes(model, x) == (8 * 20 if use_dora else 0)  # just n
    gradients = []
    for change in (False, True):
        h = x * 2
        torch.manual_seed(3)
        y = model(h)
        h = h.tanh_() if change else h.tanh()
        gradients += torch.autograd.grad(y.pow(2).sum() + h.sum(), x)
    torch.testing.assert_close(*gradients)


def test_mixed_dtypes_keep_no_copy_of_the_input():
    model, x = one_linear(dtype=torch.bfloat16), vectors(64, 16).bfloat16().requires_grad_()
    loras(model, 2, lora_r=2, dtype="float32")
    factors = 2 * (2 * 16 + 2 * 20)
    assert saved_bytes(model, x) <= 2 * (64 * 16 + 64 * 2 * 2 + factors)


# ----------------------------------------------------------------------------------------- merging
@pytest.mark.covers("Composition.merge")
def test_a_merge_visits_each_module_as_often_for_many_sites_as_for_few(monkeypatch):
    found = {}
    for depth in (4, 40):
        model = tower(depth)
        LoraModel(model, modified_modules=["fc", "out"], lora_r=1)
        found[depth] = walks(monkeypatch, model, composition(model).merge, "_parameters")
    assert found[40] <= found[4] + 0.2


@pytest.mark.covers("Composition.merge")
def test_a_merge_into_16_bits_needs_no_copy_of_a_weight_in_float32(monkeypatch):
    model = one_linear(dtype=torch.bfloat16, width=256)
    loras(model, 2, lora_r=2, dtype="float32")
    monkeypatch.setattr(products, "CHUNK", 16 * 256)
    sizes = {}

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes[out.dtype] = max(sizes.get(out.dtype, 0), out.numel())
            return out

    with Made():
        composition(model).merge()
    assert sizes[torch.bfloat16] == 256 * 260
    assert sizes[torch.float32] <= (8 + 16 * torch.get_num_threads()) * 256
