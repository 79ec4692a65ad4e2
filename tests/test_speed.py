"""What "fast" means, where it is a count and not a time: operations, bytes, walks, recompiles."""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from models import tower, vectors
from nets import COPIES, Conv1D, copied, shake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import opendelta
from opendelta import AdapterModel, LohaModel, LoraModel, composition
from opendelta._backbone.backbone import Backbone
from opendelta._layers import low_rank as products
from opendelta._layers import record


class Counted(TorchDispatchMode):
    """Counts the operations that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def of(self, *names):
        return sum(self.counts.get(name, 0) for name in names)


@contextlib.contextmanager
def each_by_itself():
    """The plain onion, with which the joined layers are compared."""
    products.ENABLED = False
    try:
        yield
    finally:
        products.ENABLED = True


def saved_bytes(model, x):
    """What autograd keeps of a forward beside the model's own tensors, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


def results(model, x):
    """The output, the gradient of the input, and those of all parameters that have one."""
    torch.manual_seed(5)
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def loras(model, count, **options):
    return [
        shake(LoraModel(model, modified_modules=["0"], name=f"lora_{i}", **options), seed=i)
        for i in range(count)
    ]


def one_linear(bias=True, width=16, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width + 4, bias=bias)).to(dtype)
    return model.requires_grad_(False)


# ------------------------------------------------------------------------------ neighbouring layers
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


# ------------------------------------------------------------------------------------------ frozen
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
        assert [delta.active for delta in deltas] == [True, True, False, False]
    with (
        pytest.raises(opendelta.DeltaError, match=r"detached.*attach\(\)"),
        composed.only("lora_0"),
    ):
        pass
    with pytest.raises(opendelta.DeltaError, match=r"\['lora_3', 'lora_2', 'lora_1'\]"):
        composed.only("nothing").__enter__()


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


def test_saving_and_loading_walk_the_module_tree_as_often_for_many_modules(monkeypatch, tmp_path):
    found = {}
    for depth in (4, 40):
        model, fresh = tower(depth), tower(depth)
        delta = LoraModel(model, modified_modules=["fc", "out"], lora_r=1)
        delta.freeze_module()
        save = walks(monkeypatch, model, lambda d=delta: d.save_finetuned(tmp_path))
        load = walks(monkeypatch, fresh, lambda m=fresh: opendelta.load(tmp_path, m))
        found[depth] = save, load
    assert found[40][0] <= 1
    assert found[40][1] < 3
    assert found[40][1] <= found[4][1] + 0.2


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


# ---------------------------------------------------------------------------- DoRA in training
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
def test_a_merge_visits_each_module_as_often_for_many_sites_as_for_few(monkeypatch):
    found = {}
    for depth in (4, 40):
        model = tower(depth)
        LoraModel(model, modified_modules=["fc", "out"], lora_r=1)
        found[depth] = walks(monkeypatch, model, composition(model).merge, "_parameters")
    assert found[40] <= found[4] + 0.2


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
    assert sizes[torch.float32] <= 24 * 256
