"""Deltas and torch.compile: whole graphs, every change noticed, known configurations reused."""

import pytest
import torch
from support.models import (
    FIVE,
    Reader,
    build,
    detach,
    inputs,
    logits,
    put_deltas,
    put_deltas_on_tower,
    tower,
    vectors,
)
from support.nets import shake
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, composition
from opendelta.errors import CompileLimitError


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


@pytest.fixture
def counter():
    """A backend that counts the graphs it compiles, in `frame_count`."""
    return CompileCounterWithBackend("aot_eager")


def compiled(model, backend="aot_eager"):
    """`model` compiled into one graph."""
    return torch.compile(model, fullgraph=True, backend=backend)


def close(one, other):
    return torch.allclose(one, other, atol=1e-5)


# ----------------------------------------------------------------------- before and after attaching
def test_a_model_with_deltas_compiles_into_one_graph(counter):
    model, x = tower(), vectors(2, 8)
    plain = model(x)
    put_deltas_on_tower(model)
    fast = compiled(model, counter)
    assert close(fast(x), model(x))
    assert not close(fast(x), plain)
    assert counter.frame_count == 1


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_float64_model_is_as_exact_as_in_eager_mode(scale):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double(), vectors(2, 8).double()
    for cls, options in ((LoraModel, {"lora_r": 3}), (AdapterModel, {"bottleneck_dim": 3})):
        shake(cls(model, modified_modules=["0", "1"], **options)).scale = scale
    names = [shake(LoraModel(model, modified_modules=["0"], lora_r=3)).name for _ in range(2)]
    opendelta.AverageModel(model, deltas=names, weights=[0.3, 0.7])
    wanted = model(x)
    torch.testing.assert_close(compiled(model)(x), wanted, rtol=1e-13, atol=1e-13)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), wanted, rtol=1e-13, atol=1e-13)


def test_deltas_attached_after_compiling_are_noticed(counter):
    model, x = tower(), vectors(2, 8)
    fast = compiled(model, counter)
    plain = fast(x)
    put_deltas_on_tower(model)
    assert close(fast(x), model(x))
    assert not close(fast(x), plain)
    assert counter.frame_count == 2


def test_the_root_of_a_compiled_model_may_become_a_site():
    model, x = tower(), vectors(2, 8)
    fast = compiled(model)
    fast(x)
    delta = shake(AdapterModel(model, modified_modules=["", "blocks.0"]))
    assert close(fast(x), model(x))
    delta.detach()
    assert close(fast(x), model(x))


def test_gradients_of_compiled_deltas_are_those_of_eager_ones():
    model, x = tower(), vectors(2, 8)
    put_deltas_on_tower(model)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).pow(2).sum(), parameters)
    found = torch.autograd.grad(compiled(model)(x).pow(2).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.covers(
    "Delta.enable", "Delta.disable", "Delta.attach", "Delta.detach", "Composition.reorder"
)
def test_every_change_is_noticed_and_known_configurations_cost_nothing(counter):
    model, x = tower(depth=1), vectors(2, 8)
    lora, ia3, adapter, _ = put_deltas_on_tower(model)
    order = composition(model).names
    fast = compiled(model, counter)
    seen = []

    def compiled_frames():
        """How many more graphs the model has needed; its output is checked, and kept."""
        before, output = counter.frame_count, fast(x)
        assert close(output, model(x))
        seen.append(output)
        return counter.frame_count - before

    assert compiled_frames() == 1
    assert [compiled_frames() for _ in range(3)] == [0, 0, 0]

    lora.disable()
    assert compiled_frames() == 1
    lora.enable()
    assert compiled_frames() == 0
    adapter.disable()
    assert compiled_frames() == 1
    adapter.enable()
    assert compiled_frames() == 0

    composition(model).reorder(["adapter", "lora", "ia3", "block"])
    assert compiled_frames() == 1
    composition(model).reorder(order)
    assert compiled_frames() == 0

    ia3.detach()
    assert compiled_frames() == 1
    ia3.attach()
    assert compiled_frames() == 0

    for delta in (lora, ia3):  # new values are no new configuration
        shake(delta)
    assert compiled_frames() == 0
    model(x)  # and neither is what an eager call notes
    assert compiled_frames() == 0

    first, off, other_off, moved, gone, changed = (seen[i] for i in (0, 4, 6, 8, 10, -1))
    different = [first, off, other_off, moved, gone, changed]
    for index, output in enumerate(different):
        assert not any(close(output, other) for other in different[:index])


@pytest.mark.covers("Composition.frozen")
def test_frozen_compiles_nothing_new_inside_and_afterwards(counter):
    model, x = tower(), vectors(2, 8)
    put_deltas_on_tower(model)
    model(x)
    fast = compiled(model, counter)
    with torch.no_grad():
        outputs = [fast(x)]
        for _ in range(2):
            with composition(model).frozen():
                outputs.append(fast(x))
            outputs.append(fast(x))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert counter.frame_count == 1


def test_detaching_everything_leaves_the_compiled_model_plain(counter):
    model, x = tower(), vectors(2, 8)
    plain = model(x)
    fast = compiled(model, counter)
    fast(x)
    detach(put_deltas_on_tower(model))
    assert close(fast(x), plain)
    assert counter.frame_count == 1  # the graph from before the deltas serves again


def test_eight_configurations_fit_under_the_recompile_limit(counter):
    model, x = tower(depth=0), vectors(2, 8)
    methods = (LoraModel, IA3Model, AdapterModel)
    deltas = [shake(method(model, modified_modules=["head"])) for method in methods]
    fast = compiled(model, counter)
    for _ in range(2):
        for configuration in range(8):
            for bit, delta in enumerate(deltas):
                (delta.enable if configuration & 1 << bit else delta.disable)()
            assert close(fast(x), model(x))
    assert counter.frame_count == 8


# --------------------------------------------------------------------------------------- other ways
# Dynamo looks at .grad of the inputs of each block, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_blocks_that_are_compiled_one_by_one_notice_every_change(counter):
    model, x = tower(depth=4), vectors(2, 8)
    plain = model(x)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    assert close(model(x), plain)
    deltas = put_deltas_on_tower(model)
    assert opendelta.check(model, x)

    def eager():
        with torch.compiler.set_stance("force_eager"):
            return model(x)

    before = counter.frame_count
    assert close(model(x), eager())
    assert not close(model(x), plain)
    assert counter.frame_count - before <= 2  # not one for each of the four equal blocks

    deltas[0].disable()
    assert close(model(x), eager())
    before = counter.frame_count
    deltas[0].enable()
    assert close(model(x), eager())
    assert counter.frame_count == before
    detach(deltas)
    assert close(model(x), plain)


def test_checkpointing_inside_a_compiled_model_gives_the_same_gradients():
    model, x = tower(checkpointed=True).train(), vectors(2, 8)
    put_deltas_on_tower(model)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).pow(2).sum(), parameters)
    found = torch.autograd.grad(compiled(model)(x).pow(2).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.covers("DeltaConfig.reads")
def test_weights_that_are_read_compile_too():
    model, x = Reader(), vectors(2, 8)
    plain = model(x)
    lora = shake(LoraModel(model, modified_modules=["q"], reads=True))
    ia3 = shake(IA3Model(model, modified_modules=["q"], reads=True))
    fast = compiled(model)
    assert close(fast(x), model(x))
    assert not close(fast(x), plain)
    lora.disable()
    assert close(fast(x), model(x))
    detach([lora, ia3])
    assert close(fast(x), plain)


def test_a_reads_site_that_is_called_compiles_too():
    model, x = nn.Sequential(nn.Linear(8, 8)), vectors(2, 8)
    shake(LoraModel(model, modified_modules=["0"], reads=True))
    assert close(compiled(model)(x), model(x))


# -------------------------------------------------------------------------------------------- audit
@pytest.mark.covers("check", "unreached")
def test_check_runs_a_compiled_model_eagerly_and_finds_that_all_layers_act():
    model, x = tower(), vectors(2, 8)
    put_deltas_on_tower(model)
    fast = compiled(model)
    fast(x)
    assert len(opendelta.unreached(model)) == 10  # compiled code takes no notes
    assert opendelta.check(fast, x)
    assert opendelta.unreached(model) == []


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "wrapped"])
def test_the_first_forward_warns_of_no_layer_inside_a_compiled_block(in_place):
    model = tower()
    put_deltas_on_tower(model)
    for index, block in enumerate(model.blocks):
        if in_place:
            block.compile(fullgraph=True, backend="aot_eager")
        else:
            model.blocks[index] = compiled(block)
    with torch.no_grad():
        model(vectors(2, 8))


def test_check_reports_what_a_compiled_model_does_not_reach():
    model = Reader()
    LoraModel(model, modified_modules=["q"])
    fast = compiled(model)
    fast(vectors(2, 8))  # no warning from compiled code
    assert opendelta.check(fast, vectors(2, 8)).unreached == ["q.deltas.lora"]


# ------------------------------------------------------------------------------------- whole models
SLOW = {"t5", "bart"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FIVE]
)
def test_a_transformers_model_with_deltas_compiles_into_one_graph(name, counter):
    model = build(name)
    plain = logits(model)
    put_deltas(model, name)
    fast, given = compiled(model, counter), inputs(model) | {"use_cache": False}
    if name == "bert":
        del given["use_cache"]
    with torch.no_grad():
        found = fast(**given).logits
    assert torch.allclose(found, logits(model), atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_deltas_and_their_gradients():
    model, x = tower(depth=1), vectors(2, 8)
    put_deltas_on_tower(model)
    parameters = list(model.parameters())
    expected, output = model(x), compiled(model, "inductor")(x)
    assert close(output, expected)
    expected = torch.autograd.grad(expected.pow(2).sum(), parameters)
    found = torch.autograd.grad(output.pow(2).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- limits
@pytest.mark.covers("Delta.scale")
def test_a_change_of_scale_compiles_nothing_new(counter):
    model, x = tower(), vectors(2, 8)
    deltas = [d for d in put_deltas_on_tower(model) if type(d).layer_class.scales]
    assert len({type(delta) for delta in deltas}) > 1
    fast = compiled(model, counter)
    fast(x)
    for scale in (0.5, 0.25, -2.0, 0.0, 1.0):
        for delta in deltas:
            delta.scale = scale
        assert close(fast(x), model(x))
    assert counter.frame_count == 1


def test_scaled_deltas_are_exact_and_train_under_inductor():
    model, x = tower(depth=0), vectors(2, 8)
    one, other = (shake(LoraModel(model, modified_modules=["head"], name=n)) for n in "ab")
    fast = compiled(model, "inductor")
    for scale in (1.0, 0.5):
        one.scale = scale
        wanted = torch.autograd.grad(model(x).pow(2).sum(), [*one.parameters()])
        found = torch.autograd.grad(fast(x).pow(2).sum(), [*one.parameters()])
        assert all(close(a, b) for a, b in zip(wanted, found, strict=True))
    assert other.scale == 1


@pytest.mark.parametrize("method", [AdapterModel, opendelta.OFTModel, opendelta.HRAModel])
def test_a_change_that_is_not_scaled_is_the_eager_one_to_the_bit(method):
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    shake(method(model, modified_modules=["0"]))
    x = 4 * torch.randn(32, 64).bfloat16()
    assert torch.equal(compiled(model, "eager")(x), model(x))


@pytest.mark.covers("CompileLimitError")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_past_the_recompile_limit_the_error_names_the_option(counter, fullgraph):
    model, x = tower(depth=0), vectors(2, 8)
    deltas = [
        shake(LoraModel(model, modified_modules=["head"], name=f"d{i}"), seed=i) for i in range(4)
    ]
    fast = torch.compile(model, fullgraph=fullgraph, backend=counter)

    def choose(number):
        for bit, delta in enumerate(deltas):
            (delta.enable if number & 1 << bit else delta.disable)()

    for number in range(8):
        choose(number)
        fast(x)
    choose(8)
    with pytest.raises(CompileLimitError, match=r"Set torch\._dynamo\.config\.recompile_limit to"):
        fast(x)
    choose(3)
    assert close(fast(x), model(x))  # what was compiled is still there
    assert counter.frame_count == 8
    choose(8)
    with torch._dynamo.config.patch(recompile_limit=16):
        assert close(fast(x), model(x))
    assert counter.frame_count == 9


@pytest.mark.covers("CompileLimitError")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_past_the_recompile_limit_a_first_delta_on_a_module_is_told_too(counter, fullgraph):
    model, x = tower(depth=1), vectors(2, 8)
    last, *others = (LoraModel(model, modified_modules=["head"], name=f"d{i}") for i in range(8))
    fast = torch.compile(model, fullgraph=fullgraph, backend=counter)
    composed = opendelta.composition(model)
    for delta in (*others, last):  # torch tells what changed since the last graph
        with composed.only(delta):
            fast(x)
    late = shake(LoraModel(model, modified_modules=["fc"], name="late"))
    with composed.only(last, late), pytest.raises(CompileLimitError, match="recompile_limit to"):
        fast(x)


def test_past_the_recompile_limit_a_model_without_deltas_is_left_to_torch(counter):
    LoraModel(tower(), modified_modules=["head"])
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fast = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2):
        for model[1] in (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU()):
            assert close(fast(vectors(2, 8)), model(vectors(2, 8)))
