"""Deltas on transformers models: the model stays what it is for everybody who uses it."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import (
    FIVE,
    GENERATORS,
    blocks,
    build,
    delta_names,
    detach,
    inputs,
    logits,
    put_deltas,
    sites,
    token_ids,
)
from support.nets import shake, untouched
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, UnsavedWarning
from opendelta._backbone.backbone import Backbone
from opendelta._backbone.shapes import widths

five_models = pytest.mark.parametrize("name", FIVE)


# ----------------------------------------------------------------------- the model stays what it is
@pytest.mark.covers("Delta.detach", "unreached")
@five_models
def test_all_deltas_act_and_detaching_restores_the_model_bit_for_bit(name):
    model = build(name)
    plain, before = logits(model), opendelta.snapshot(model)
    deltas = put_deltas(model, name)

    changed = logits(model)  # a layer that does not run would be warned of, and that is an error
    assert opendelta.unreached(model) == []
    for delta in deltas:
        with delta.disabled():
            assert not torch.allclose(logits(model), changed), f"{delta.name} changes nothing"

    detach(deltas)
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(logits(model), plain)


@pytest.mark.covers("Delta.state_dict")
@five_models
def test_the_keys_of_the_backbone_stay_and_those_of_the_deltas_stand_under_their_sites(name):
    model = build(name)
    backbone_keys = list(model.state_dict())
    deltas = put_deltas(model, name)

    prefixes = tuple(
        f"{where}.deltas.{delta.name}.".lstrip(".")
        for delta in deltas
        for where, layer in delta.layers.items()
        if not layer.watches
    )
    keys = list(model.state_dict())
    assert [key for key in keys if not key.startswith(prefixes)] == backbone_keys
    assert {key for key in keys if key.startswith(prefixes)} == {
        key for delta in deltas for key in delta.state_dict()
    }
    for prefix in prefixes:
        assert any(key.startswith(prefix) for key in keys), prefix


@five_models
def test_a_plain_checkpoint_still_loads_while_deltas_are_attached(name):
    plain = build(name)
    model = build(name)
    deltas = put_deltas(model, name)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if not any(parameter is p for delta in deltas for p in delta.parameters()):
                parameter.zero_()

    result = model.load_state_dict(plain.state_dict(), strict=False)

    assert result.unexpected_keys == []
    assert set(result.missing_keys) == {key for delta in deltas for key in delta.state_dict()}
    assert torch.equal(logits(model), expected)


@five_models
def test_a_site_looks_like_the_module_that_it_was(name):
    plain, model = build(name), build(name)
    for where in sites(put_deltas(model, name)):
        was, now = plain.get_submodule(where), model.get_submodule(where)
        assert isinstance(now, type(was))
        assert isinstance(was, type(now))  # accelerate wraps by the first class that it finds
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(now), attribute) == getattr(type(was), attribute)
        assert inspect.signature(now.forward) == inspect.signature(was.forward)


def test_a_linear_site_keeps_its_attributes():
    model = build("bert")
    linear = model.bert.encoder.layer[0].attention.self.query
    weight, bias = linear.weight, linear.bias
    put_deltas(model, "bert")
    assert isinstance(linear, nn.Linear)
    assert linear.weight is weight
    assert linear.bias is bias
    assert (linear.in_features, linear.out_features) == (32, 32)


def test_a_conv1d_site_keeps_its_attributes():
    model = build("gpt2")
    conv1d = model.transformer.h[0].attn.c_attn
    weight = conv1d.weight
    put_deltas(model, "gpt2")
    assert isinstance(conv1d, Conv1D)
    assert conv1d.weight is weight
    assert (conv1d.nx, conv1d.nf) == (32, 96)


@five_models
def test_calling_forward_directly_sees_the_deltas(name):
    model = build(name)
    plain = logits(model)
    put_deltas(model, name)
    with torch.no_grad():
        direct = model.forward(**inputs(model)).logits
    assert torch.equal(direct, logits(model))
    assert not torch.allclose(direct, plain)


def test_calling_forward_of_a_linear_directly_sees_its_deltas():
    model = build("llama")
    put_deltas(model, "llama")
    linear, x = model.model.layers[1].self_attn.q_proj, torch.randn(2, 32)
    assert torch.equal(linear.forward(x), linear(x))
    assert not torch.allclose(linear(x), x @ linear.weight.T)


# ------------------------------------------------------------------------------------------- copies
def torch_save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": torch_save_and_load,
}


@five_models
@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_is_equal_and_independent(name, copier):
    model = build(name)
    plain = logits(model)
    put_deltas(model, name)
    expected, names = logits(model), delta_names(model)

    copied = COPIERS[copier](model)
    assert torch.equal(logits(copied), expected)
    composition = opendelta.composition(copied)
    assert composition.names == names

    composition.reorder(names[::-1])  # adapter around LoRA and IA3 around LoRA: order matters
    reordered = logits(copied)
    assert not torch.allclose(reordered, expected)
    with torch.no_grad():
        for delta in composition:
            for parameter in delta.parameters():
                parameter.zero_()
    detach(list(composition))
    opendelta.assert_pristine(copied)
    assert torch.equal(logits(copied), plain)

    assert delta_names(model) == names
    assert torch.equal(logits(model), expected)
    opendelta.composition(model).reorder(names[::-1])
    assert torch.equal(logits(model), reordered)


IN_A_FRESH_PROCESS = """
import sys
import torch
saved = torch.load(sys.argv[1], weights_only=False)
assert len(saved) == 5
for model, inputs, names, expected in saved:
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-6)
    import opendelta
    composition = opendelta.composition(model)
    assert composition.names == names
    for delta in composition:
        delta.detach()
    opendelta.assert_pristine(model)
"""


@pytest.mark.slow
def test_a_pickled_model_comes_back_whole_in_a_fresh_process(tmp_path):
    saved = []
    for name in FIVE:
        model = build(name)
        put_deltas(model, name)
        saved.append((model, inputs(model), delta_names(model), logits(model)))
    torch.save(saved, tmp_path / "models.pt")
    command = [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS]
    result = subprocess.run([*command, tmp_path / "models.pt"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------ what transformers records
def received_by_blocks(model, name):
    """{field of the output: what each block that belongs to it is given}."""
    received: dict[str, list[Tensor]] = {}
    handles = []
    for field, _, block in blocks(model, name):

        def note(_module, args, kwargs, field=field):
            given = args[0] if args else kwargs["hidden_states"]
            received.setdefault(field, []).append(given.detach().clone())

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    logits(model)
    for handle in handles:
        handle.remove()
    return received


attached_before_or_after = pytest.mark.parametrize(
    "captured_before_attaching", [False, True], ids=["attached first", "captured first"]
)


@five_models
@attached_before_or_after
def test_hidden_states_are_what_the_blocks_receive(name, captured_before_attaching):
    model = build(name)
    if captured_before_attaching:
        model(**inputs(model), output_hidden_states=True)
    put_deltas(model, name)
    with torch.no_grad():
        output = model(**inputs(model), output_hidden_states=True)
    for field, received in received_by_blocks(model, name).items():
        assert len(output[field]) == len(received) + 1
        for recorded, given in zip(output[field][:-1], received, strict=True):
            assert torch.equal(recorded, given)


@five_models
@attached_before_or_after
def test_attentions_are_those_of_the_changed_projections(name, captured_before_attaching):
    model = build(name)
    model.set_attn_implementation("eager")
    count = len(list(blocks(model, name)))
    plain = model(**inputs(model), output_attentions=True) if captured_before_attaching else None
    deltas = put_deltas(model, name)
    output = model(**inputs(model), output_attentions=True)
    if plain is None:
        detach(deltas)
        plain = model(**inputs(model), output_attentions=True)

    fields = [f for f in output if f.endswith("attentions") and not f.startswith("cross")]
    assert sum(len(output[field]) for field in fields) == count
    for field in fields:
        for now, was in zip(output[field], plain[field], strict=True):
            assert torch.allclose(now.sum(-1), torch.ones(()), atol=1e-5)
            assert not torch.allclose(now, was)


# ----------------------------------------------------------------------------------------- generate
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
def test_generating_with_and_without_the_cache_gives_the_same(name, beams):
    model = build(name)
    put_deltas(model, name)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with_cache = model.generate(token_ids(), use_cache=True, **options)
    without_cache = model.generate(token_ids(), use_cache=False, **options)
    assert torch.equal(with_cache, without_cache)


@pytest.mark.parametrize("name", GENERATORS)
def test_generate_uses_the_deltas_in_every_step(name):
    model = build(name)
    put_deltas(model, name)
    ids = token_ids()
    output = model.generate(
        ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    generated = output.sequences[:, :-1]
    given = {"input_ids": generated}
    if model.config.is_encoder_decoder:
        given = {"input_ids": ids, "decoder_input_ids": generated}
    with torch.no_grad():
        direct = model(**given).logits[:, -3:]
    assert torch.allclose(torch.stack(output.logits, dim=1), direct, atol=1e-5)


# ------------------------------------------------------------------------------- saving and loading
@pytest.mark.covers("load")
@five_models
def test_save_pretrained_writes_the_plain_model_and_the_deltas_beside_it(name, tmp_path):
    model = build(name)
    plain = logits(model)
    put_deltas(model, name)
    model.save_pretrained(tmp_path)

    # the class of a site stands for the plain one
    reloaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(reloaded.eval()), plain)
    opendelta.assert_pristine(reloaded)
    assert reloaded.config.architectures == [type(build(name)).__name__]
    opendelta.load(tmp_path, reloaded)
    assert torch.equal(logits(reloaded), logits(model))


def test_save_pretrained_after_detaching_writes_the_plain_backbone_without_a_word(tmp_path):
    model = build("bert")
    detach(put_deltas(model, "bert"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "deltas" in key]  # noqa: SIM118


@five_models
def test_deltas_go_on_a_model_that_was_loaded_with_a_device_map(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    put_deltas(model, name)
    loaded = type(build(name)).from_pretrained(tmp_path, device_map="cpu").eval()
    put_deltas(loaded, name)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert opendelta.unreached(loaded) == []


# ------------------------------------------------------------------------- activation checkpointing
def gradients(model):
    """The gradients of the trainable parameters, in training mode."""
    model.train().zero_grad()
    model(**inputs(model), use_cache=False).logits.pow(2).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found


@five_models
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_recomputes_the_deltas_and_gives_the_same_gradients(
    name, reentrant
):
    model = build(name).double()
    lora, _, adapter = put_deltas(model, name, scale=0.05)
    lora.freeze_module()
    expected = gradients(model)

    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # a block must be given something that requires grad; the embeddings are frozen
        model.enable_input_require_grads()
    runs: Counter[str] = Counter()
    on_blocks = [where for _, where, _ in blocks(model, name)]
    for where in on_blocks:
        count = partial(_count_run, runs, where)
        adapter.layers[where].register_forward_pre_hook(count)
    found = gradients(model)

    assert runs == dict.fromkeys(on_blocks, 2)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


def _count_run(runs, where, *_):
    runs[where] += 1


# --------------------------------------------------------------------------------- dtypes and modes
TOLERANCES = {torch.float64: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}


@five_models
def test_deltas_follow_the_model_to_another_dtype(name):
    model = build(name)
    deltas = put_deltas(model, name)
    expected = logits(model)
    for dtype, tolerance in TOLERANCES.items():
        model.to(dtype)
        assert {p.dtype for delta in deltas for p in delta.parameters()} == {dtype}
        found = logits(model)
        assert found.dtype == dtype
        largest_error = (found.float() - expected).abs().max()
        assert largest_error < tolerance * expected.abs().max(), dtype


@five_models
def test_deltas_on_a_bfloat16_model_are_bfloat16_on_request(name):
    model = build(name).to(torch.bfloat16)
    deltas = put_deltas(model, name, dtype="backbone")
    assert {p.dtype for delta in deltas for p in delta.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.covers("DeltaConfig.dtype")
@five_models
def test_deltas_on_a_bfloat16_model_are_float32_and_train_in_float32(name):
    model = build(name).to(torch.bfloat16)
    plain = logits(model)
    deltas = put_deltas(model, name)
    deltas[0].freeze_module()
    output = model(**inputs(model)).logits
    assert output.dtype == torch.bfloat16
    assert not torch.allclose(output, plain)
    output.float().pow(2).sum().backward()
    for delta in deltas:
        for key, parameter in delta.named_parameters():
            assert parameter.dtype == torch.float32, key
            assert parameter.grad.dtype == torch.float32, key
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_new_layers_take_the_mode_of_the_model(training):
    model = build("bert").train(training)
    for delta in put_deltas(model, "bert"):
        for layer in delta.layers.values():
            assert {module.training for module in layer.modules()} == {training}
    assert {module.training for module in model.modules()} == {training}


def test_re_attached_layers_take_the_dtype_and_mode_that_the_model_has_by_now():
    model = build("bert")
    deltas = put_deltas(model, "bert")
    expected = logits(model)
    detach(deltas)
    model.double().train()
    for delta in deltas:
        delta.attach()
    assert {module.training for module in model.modules()} == {True}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert torch.allclose(logits(model), expected.double(), atol=1e-5)


@pytest.mark.covers("DeltaConfig.dtype")
def test_re_attached_layers_keep_the_dtype_that_was_asked_for():
    model = build("bert")
    delta = LoraModel(model, modified_modules=["query"], dtype="float32")
    delta.detach()
    model.to(torch.bfloat16)
    delta.attach()
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


# ------------------------------------------------------------------------------- the shape-only run
def test_finding_the_output_width_of_a_block_leaves_no_trace():
    model = build("roberta")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # a real forward would draw random numbers
    model.train()
    layer_outputs = [f"roberta.encoder.layer.{index}.output" for index in range(2)]
    random_state = torch.get_rng_state()
    with untouched(model):
        found = widths(Backbone.of(model), layer_outputs)
    assert {name: each.output for name, each in found.items()} == dict.fromkeys(layer_outputs, 32)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.covers("unreached")
def test_finding_an_output_width_does_not_count_as_a_forward_of_earlier_deltas():
    model = build("roberta")
    LoraModel(model, modified_modules=["query"])
    AdapterModel(model, modified_modules=["[r]layer\\.\\d\\.output"])
    assert len(opendelta.unreached(model)) == 4
    logits(model)
    assert opendelta.unreached(model) == []


# ---------------------------------------------------------------------------- where the backbone is
class Inner(nn.Module):
    """A user's module around a transformers model."""

    def __init__(self, model):
        super().__init__()
        self.transformer = model

    def forward(self, input_ids):
        return self.transformer(input_ids=input_ids, output_hidden_states=True).hidden_states[-1]


class Outer(nn.Module):
    """A user's module around that."""

    def __init__(self, model):
        super().__init__()
        self.body = Inner(model)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids):
        return self.head(self.body(input_ids)[:, 0])


def test_deltas_find_their_places_in_a_transformers_model_inside_two_user_modules():
    torch.manual_seed(0)
    model = Outer(build("bert"))
    plain, before = model(token_ids()), opendelta.snapshot(model)
    lora = shake(LoraModel(model, modified_modules=["query"]))
    adapter = shake(AdapterModel(model, modified_modules=["[r]layer\\.\\d", "body", ""]))

    assert list(adapter.layers)[:2] == ["", "body"]
    assert sorted(lora.layers) == [
        f"body.transformer.bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]
    assert all(".cls." in name for name in opendelta.check(model, token_ids()).no_gradient)
    lora.freeze_module()
    assert opendelta.check(model, token_ids())
    assert not torch.allclose(model(token_ids()), plain)
    detach([adapter, lora])
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(model(token_ids()), plain)


@pytest.mark.covers("load")
def test_save_pretrained_of_a_model_inside_user_modules_keeps_all_deltas(tmp_path):
    model = Outer(build("bert"))
    shake(LoraModel(model, modified_modules=["query"]))
    model.body.transformer.save_pretrained(tmp_path)
    plain = Outer(type(build("bert")).from_pretrained(tmp_path).eval())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    opendelta.load(tmp_path, plain)
    assert torch.equal(plain(token_ids()), model(token_ids()))


@pytest.mark.covers("UnsavedWarning")
def test_peft_s_save_pretrained_around_the_backbone_warns_that_it_leaves_deltas_out(tmp_path):
    model = build("bert")
    LoraModel(model, modified_modules=["value"])
    around = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.warns(UnsavedWarning, match=r"leaves out \d+ delta tensors\. Save"):
        around.save_pretrained(tmp_path)
    assert not any(".deltas." in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.covers("UnsavedWarning")
def test_save_pretrained_of_a_model_around_the_backbone_warns(tmp_path):
    model = build("bert")
    LoraModel(model.bert, modified_modules=["query"])
    with pytest.warns(UnsavedWarning, match=r"around this BertModel .*composition\(model\)\.save"):
        model.save_pretrained(tmp_path)


def test_deltas_of_wrapped_models_are_attached_through_the_same_module():
    model = Outer(build("bert"))
    model(token_ids())  # transformers marks the model when it captures outputs for the first time
    before = opendelta.snapshot(model)
    inner = shake(LoraModel(model.body.transformer, modified_modules=["query"]))
    with pytest.raises(opendelta.SiteError, match=r"through its module 'body.transformer'"):
        IA3Model(model, modified_modules=["query"])
    model(token_ids())
    assert opendelta.unreached(model) == []
    assert delta_names(model) == ["lora"]
    inner.detach()
    opendelta.assert_pristine(model, like=before)


@pytest.mark.parametrize("pattern", ["", "root"])
def test_the_model_itself_can_be_the_site(pattern):
    model = build("gpt2")
    plain, before = logits(model), opendelta.snapshot(model)
    delta = shake(AdapterModel(model, modified_modules=[pattern]))
    assert delta.modified_modules == [""]
    assert all(key.startswith("deltas.adapter.") for key in delta.state_dict())
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"
    expected = delta.layers[""].change(plain)
    assert torch.equal(logits(model), expected)
    delta.detach()
    opendelta.assert_pristine(model, like=before)


@attached_before_or_after
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_block_that_a_delta_owns_is_captured_once(name, captured_before_attaching):
    model = build(name)
    plain = build(name)(**inputs(model), output_hidden_states=True).hidden_states
    if captured_before_attaching:
        model(**inputs(model), output_hidden_states=True)
    block = list(blocks(model, name))[-1][1]
    LoraModel(model, exclude_modules=[block], modules_to_save=[block])
    states = model(**inputs(model), output_hidden_states=True).hidden_states
    assert len(states) == len(plain)
    assert all(map(torch.equal, states, plain))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_experts_of_a_float32_model_carry_an_adapter(device, caplog):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, head_dim=8,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    with untouched(model):
        delta = AdapterModel(model, modified_modules=["mlp.experts"], bottleneck_dim=3)
        assert delta.layers["model.layers.0.mlp.experts"].width == 32
        if device == "cpu":
            ids = token_ids().remainder(64)
            changed = shake(delta)
            with changed.disabled():
                plain = model(ids).logits
            assert not torch.allclose(model(ids).logits, plain)
        delta.detach()
    assert not caplog.records
