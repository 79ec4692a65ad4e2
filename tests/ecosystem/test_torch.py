"""Deltas on plain PyTorch modules: tracers, fused paths, weights read directly, replicas."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.models import (
    Tower,
    build,
    detach,
    put_deltas_on_tower,
    reader,
    token_ids,
    tower,
    vectors,
)
from support.nets import replica_of, shake, untouched
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval, parametrize

import opendelta
from opendelta import (
    AdapterModel,
    IA3Model,
    LoraModel,
    LowRankAdapterModel,
    SiteError,
)
from opendelta._backbone.backbone import Backbone
from opendelta._backbone.shapes import widths
from opendelta._layers.site import Widths
from opendelta._sites.stack import stack_of
from opendelta._sites.swap import plain_class

pytestmark = pytest.mark.covers("Delta.attach", "Delta.detach")


# ------------------------------------------------------------------------------ tracers, transforms
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_keeps_the_deltas_and_the_keys(strict):
    model, x = tower(), vectors(2, 8)
    put_deltas_on_tower(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    assert program.state_dict.keys() == model.state_dict().keys()


def of_rows(model, cls, **options):
    """The arguments, with position ids, of a model under a delta that asks for them."""
    if cls is opendelta.GateModel:
        deltas = [LoraModel(model, modified_modules=["query"], name=name) for name in "ab"]
        list(map(shake, deltas))
        options["deltas"] = ["a", "b"]
    shake(cls(model, **options))
    ids = token_ids()
    return {"input_ids": ids, "position_ids": torch.arange(ids.size(1)).expand_as(ids)}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (opendelta.GateModel, {"per": "sequence"}),
        (opendelta.LoReftModel, {"first": 1, "last": 1}),
        (opendelta.PrefixModel, {"prefix_token_num": 2}),
    ],
)
def test_export_takes_position_ids(cls, options):
    model = build("bert")
    given = of_rows(model, cls, **options)
    program = torch.export.export(model, (), given).module()
    assert torch.allclose(program(**given)[0], model(**given)[0], atol=1e-6)


@torch.no_grad()
def test_a_soft_prompt_in_one_graph_with_position_ids_is_refused_by_one_line():
    model = build("bert")
    given = of_rows(model, opendelta.SoftPromptModel, soft_token_num=2)
    with pytest.raises(opendelta.SiteError, match=r"in one graph .*: leave position_ids out"):
        torch.export.export(model, (), given)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave position_ids out"):
        torch.compile(model, backend="eager", fullgraph=True)(**given)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(**given)
    assert torch.allclose(found[0], model(**given)[0], atol=1e-6)
    del given["position_ids"]
    program = torch.export.export(model, (), given).module()
    assert torch.allclose(program(**given)[0], model(**given)[0], atol=1e-6)


def test_jit_script_is_refused_by_one_line_that_names_what_works():
    model = tower()
    LoraModel(model, modified_modules=["fc"])
    with (
        pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"),
        pytest.raises(opendelta.DeltaError, match=r"torch\.export\.export can, .*to_backbone\(\)"),
    ):
        torch.jit.script(model)


def test_jit_trace_keeps_the_deltas():
    model, x = tower(), vectors(2, 8)
    put_deltas_on_tower(model)
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(model, vectors(3, 8))
    assert torch.allclose(traced(x), model(x), atol=1e-6)


def test_fx_takes_sites_of_torch_modules_as_leaves_which_run_their_deltas():
    model, x = tower(), vectors(2, 8)
    plain = model(x)
    shake(LoraModel(model, modified_modules=["fc"]))
    shake(IA3Model(model, modified_modules=["out"], feedforward_modules=["out"]))
    shake(AdapterModel(model, modified_modules=["fc", "head"]))
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(x), model(x))
    assert not torch.allclose(graph(x), plain)


def test_functional_call_replaces_the_tensors_of_deltas():
    model, x = tower(), vectors(2, 8)
    lora = LoraModel(model, modified_modules=["fc"])
    plain = model(x)
    shake(lora)
    zeros = {name: torch.zeros_like(p) for name, p in lora.named_parameters()}
    assert not torch.allclose(model(x), plain)
    assert torch.allclose(torch.func.functional_call(model, zeros, (x,)), plain)


def test_functional_call_on_a_merged_model_uses_the_weights_that_it_is_given():
    model, x = tower(), vectors(2, 8)
    shake(LoraModel(model, modified_modules=["fc"]))
    acting, before = model(x), {n: p.detach().clone() for n, p in model.named_parameters()}
    with opendelta.composition(model).only():
        plain = model(x)
    opendelta.composition(model).merge()
    merged = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.allclose(torch.func.functional_call(model, merged, (x,)), acting, atol=1e-6)
    assert torch.allclose(torch.func.functional_call(model, before, (x,)), plain, atol=1e-6)


def test_per_sample_gradients_of_deltas_are_those_of_single_samples():
    model, x = tower(), vectors(3, 8)
    put_deltas_on_tower(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for row, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad)


# ----------------------------------------------------------------------------------- fused encoders
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
PLACES = {
    "layers.0.linear1": LoraModel,
    "layers.0.linear2": LoraModel,
    "layers.0.self_attn.out_proj": LoraModel,
    "layers.0.norm1": AdapterModel,
    "layers.1.self_attn": AdapterModel,
    "layers.0": AdapterModel,
}


def encoder(trainable, nested):
    """The same encoder every time; with parameters that train, torch takes no fused path."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=nested)
    model.dummy_inputs = {"src": torch.zeros(1, 3, 8)}
    return model.eval().requires_grad_(trainable)


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"
)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("place", PLACES)
def test_the_fused_path_of_transformer_encoder_steps_aside_for_deltas(place, mask, nested):
    x, outputs = vectors(2, 5, 8), []
    for trainable in (True, False):
        model = encoder(trainable, nested)
        torch.manual_seed(1)
        delta = PLACES[place](model, modified_modules=[f"[r]{place}"])
        shake(delta)
        delta.requires_grad_(trainable)
        with torch.set_grad_enabled(trainable):
            outputs.append(model(x, src_key_padding_mask=mask).detach())
        assert opendelta.unreached(model) == []
    slow, fused = outputs
    kept = slice(None) if mask is None else ~mask
    assert torch.allclose(fused[kept], slow[kept], atol=1e-5)
    assert not torch.allclose(fused[kept], encoder(False, nested)(x)[kept], atol=1e-3)


@pytest.mark.covers("Composition.to_backbone")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_fusing_a_site_with_a_batch_norm_is_refused_and_its_plain_model_can_be_fused(kind):
    torch.manual_seed(0)
    first, norm, fuse, x = {
        "linear": (nn.Linear(8, 8), nn.BatchNorm1d(8), fuse_linear_bn_eval, torch.randn(2, 8)),
        "conv": (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), fuse_conv_bn_eval, torch.randn(1, 4, 5, 5)),
    }[kind]
    norm.running_var.fill_(4.0)
    model = nn.Sequential(first, norm).eval()
    shake(LoraModel(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match=r"deltas: fuse a plain model, .*to_backbone\(\)"):
        fuse(*model)
    assert torch.allclose(optimization.fuse(model)(x), model(x), atol=1e-5)  # it leaves sites
    plain = opendelta.composition(model).to_backbone()
    assert torch.allclose(fuse(*plain)(x), model(x), atol=1e-5)


# ----------------------------------------------------------------------------- replicas and threads
@pytest.mark.covers("unreached", "DeltaConfig.reads")
@pytest.mark.parametrize("reads", [False, True], ids=["called", "read"])
def test_a_data_parallel_replica_computes_with_its_own_tensors_and_deltas(reads):
    model = reader() if reads else tower()
    x = vectors(2, 8)
    if reads:
        shake(LoraModel(model, modified_modules=["q"], reads=True))
    else:
        put_deltas_on_tower(model)

    found = replica_of(model, factor=0.5)(x)
    assert opendelta.unreached(model) == []  # a replica counts for its original
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.allclose(found, model(x), atol=1e-6)


def test_threads_may_share_a_site():
    model, x = tower(), vectors(2, 8)
    put_deltas_on_tower(model)
    expected = model(x)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: torch.equal(model(x), expected), range(200)))


# ---------------------------------------------------------------------- modules of unusual standing
def test_a_module_registered_under_two_names_gets_one_layer_and_acts_under_both():
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    model, x = nn.Sequential(linear, nn.Tanh(), linear), vectors(2, 8)
    before = opendelta.snapshot(model)
    delta = shake(LoraModel(model, modified_modules=["0", "2"]))
    assert list(delta.layers) == ["0"]
    layer = delta.layers["0"]
    changed = linear.weight + layer.scaling * layer.lora_B @ layer.lora_A
    expected = F.linear(torch.tanh(F.linear(x, changed, linear.bias)), changed, linear.bias)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert opendelta.unreached(model) == []
    delta.detach()
    opendelta.assert_pristine(model, like=before)


@pytest.mark.covers("assert_pristine", "PristineError")
def test_the_root_can_be_the_site():
    model, x = nn.Linear(8, 8), vectors(2, 8)
    plain, before = model(x), opendelta.snapshot(model)
    lora = shake(LoraModel(model, modified_modules=[""]))
    adapter = shake(AdapterModel(model, modified_modules=[""]))
    assert list(model.state_dict())[:2] == ["weight", "bias"]
    assert list(lora.state_dict()) == ["deltas.lora.lora_A", "deltas.lora.lora_B"]
    changed = adapter.layers[""].change(F.linear(x, _folded(model, lora.layers[""]), model.bias))
    assert torch.allclose(model(x), changed, atol=1e-5)
    detach([lora, adapter])
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(model(x), plain)
    model.mine = 1
    with pytest.raises(
        opendelta.PristineError, match=r"^the root \(Linear\): attributes got \['mine'\]$"
    ):
        opendelta.assert_pristine(model, like=before)


def _folded(module, layer):
    return layer.fold({"weight": module.weight})["weight"]


def test_deltas_go_on_a_plain_net_inside_two_user_modules():
    model, x = nn.Sequential(nn.Sequential(tower(), nn.Tanh())), vectors(2, 8)
    plain, before = model(x), opendelta.snapshot(model)
    lora = shake(LoraModel(model, modified_modules=["fc"]))
    inner = shake(LowRankAdapterModel(model, modified_modules=["[r]blocks\\.\\d"]))
    assert list(lora.layers) == ["0.0.blocks.0.fc", "0.0.blocks.1.fc"]
    assert list(inner.layers) == ["0.0.blocks.0", "0.0.blocks.1"]
    assert opendelta.check(model, x)
    assert not torch.allclose(model(x), plain)
    detach([lora, inner])
    opendelta.assert_pristine(model, like=before)


def test_a_new_instance_of_the_class_of_a_site_is_a_plain_module():
    model = tower()
    shake(LoraModel(model, modified_modules=["fc"]))
    new = type(model.blocks[0].fc)(8, 8)
    assert type(new) is nn.Linear

    x, fresh = vectors(2, 8), nn.Sequential(new)
    shake(LoraModel(fresh, modified_modules=["0"]))
    expected = F.linear(x, _folded(new, new.deltas["lora"]), new.bias)
    assert torch.allclose(fresh(x), expected, atol=1e-5)


def test_sites_of_one_class_share_their_generated_class():
    model = tower()
    LoraModel(model, modified_modules=["fc", "head"])
    assert len({type(model.blocks[0].fc), type(model.blocks[1].fc), type(model.head)}) == 1


def test_the_generated_class_of_a_nested_class_looks_like_it_too():
    class Nested(nn.Linear):
        """A class that is not at the top of its module."""

    model = nn.Sequential(Nested(8, 8))
    LoraModel(model, modified_modules=["0"])
    assert type(model[0]).__qualname__ == Nested.__qualname__
    assert type(model[0]).__doc__ == Nested.__doc__


def test_forward_hooks_see_what_goes_into_a_site_and_what_the_deltas_make_of_it():
    model, x = tower(), vectors(2, 8)
    seen = []
    model.head.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    model.head.register_forward_hook(lambda _module, _given, output: seen.append(output))
    adapter = shake(AdapterModel(model, modified_modules=["head"]))
    output = model(x)
    given, made = seen
    assert torch.equal(made, output)
    plain = F.linear(given, model.head.weight, model.head.bias)
    assert torch.equal(made, adapter.layers["head"].change(plain))


def test_a_bound_forward_that_somebody_keeps_survives_the_detach():
    model, x = tower(), vectors(2, 8)
    linear = model.blocks[0].fc
    plain = linear(x)
    delta = LoraModel(model, modified_modules=["fc"])
    kept = linear.forward
    delta.detach()
    assert torch.equal(kept(x), plain)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 2


def test_deltas_go_on_a_module_that_somebody_subclassed_before():
    model, x = tower(), vectors(2, 8)
    parametrize.register_parametrization(model.head, "weight", Twice())
    plain, subclass = model(x), type(model.head)
    delta = shake(LoraModel(model, modified_modules=["head"]))
    assert not torch.allclose(model(x), plain)
    delta.detach()
    assert type(model.head) is subclass
    assert torch.equal(model(x), plain)


def test_a_module_that_somebody_subclassed_on_top_of_a_site_keeps_an_empty_stack():
    model, x = tower(), vectors(2, 8)
    linear = model.head
    plain = linear(x)
    delta = shake(LoraModel(model, modified_modules=["head"]))
    changed = linear(x)
    parametrize.register_parametrization(linear, "weight", Twice())

    delta.detach()
    assert len(stack_of(linear)) == 0
    assert torch.allclose(linear(x) - linear.bias, 2 * (plain - linear.bias), atol=1e-6)

    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    assert torch.equal(linear(x), plain)
    delta.attach()
    assert torch.equal(linear(x), changed)
    delta.detach()
    opendelta.assert_pristine(model)
    assert type(linear) is nn.Linear


def scripted(module):
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        return torch.jit.script(module)


def test_scripted_modules_are_refused():
    model = nn.Sequential(scripted(nn.Linear(8, 8)))
    with pytest.raises(SiteError, match="TorchScript"):
        AdapterModel(model, modified_modules=["0"])


def test_deltas_go_on_a_model_that_has_a_scripted_module_elsewhere():
    model, x = nn.Sequential(tower(), scripted(nn.Tanh())), vectors(2, 8)
    plain = model(x)
    delta = shake(LoraModel(model, modified_modules=["fc"]))
    assert opendelta.check(model, x)
    assert not torch.allclose(model(x), plain)
    delta.detach()
    opendelta.assert_pristine(model)
    assert torch.equal(model(x), plain)


def test_an_output_width_is_found_through_a_scripted_module():
    model = nn.Sequential(scripted(nn.Tanh()), nn.Sequential(tower()))
    delta = AdapterModel(model, modified_modules=["1"])
    assert delta.layers["1"].width == 4


def test_a_snapshot_can_be_taken_of_a_model_that_has_a_scripted_module():
    model = nn.Sequential(tower(), scripted(nn.Tanh()))
    with untouched(model):
        LoraModel(model, modified_modules=["fc"]).detach()


def test_a_detached_delta_is_freed_with_its_handle():
    model = tower()
    delta = LoraModel(model, modified_modules=["fc"])
    layer = weakref.ref(delta.layers["blocks.0.fc"])
    delta.detach()
    del delta
    gc.collect()
    assert layer() is None
    assert all(plain_class(module) is None for module in model.modules())


# ------------------------------------------------------------------------------- the shape-only run
class Normalised(nn.Module):
    """A block whose output width no table knows, and that keeps statistics when it trains."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = self.norm(self.drop(self.fc(x)).flatten(0, -2))
        return self.last, self.calls


def test_finding_an_output_width_changes_no_buffer_attribute_hook_or_random_state():
    model = nn.Sequential(Normalised()).train()
    random_state = torch.get_rng_state()
    with untouched(model):
        found = widths(Backbone.of(model), ["0"])
    assert found == {"0": Widths(8, 6, found["0"].moved)}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[0].calls == 0
    assert not hasattr(model[0], "last")


class Joins(Tower):
    """A module whose forward takes what nobody can guess."""

    def forward(self, x, *, y):
        return super().forward(x + y[..., :8] * y[..., 8:])


class NeedsTwo(nn.Module):
    """A model of such a module."""

    def __init__(self):
        super().__init__()
        self.net = Joins()

    def forward(self, x, y):
        return self.net(x, y=y)


def test_an_output_width_that_cannot_be_found_is_an_error_that_says_what_to_give():
    model = NeedsTwo()
    with untouched(model), pytest.raises(SiteError, match=r"'net'.*sample_inputs"):
        AdapterModel(model, modified_modules=["net"])

    samples = {"x": torch.zeros(1, 8), "y": torch.zeros(1, 16)}
    delta = AdapterModel(model, modified_modules=["net"], sample_inputs=samples)
    assert delta.layers["net"].width == 4
