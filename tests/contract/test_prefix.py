"""Prefixes: attention by hand in float64, gates, checkpointing, copies, compiling, refusals."""

import copy
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from support.models import build, inputs, logits, token_ids
from support.nets import shake, untouched
from torch import nn

import opendelta
from opendelta import LoraModel, PrefixModel, SiteError

pytestmark = pytest.mark.covers(
    "PrefixModel", "PrefixConfig.prefix_token_num", "PrefixConfig.reparameterize"
)

MODELS = ["bert", "roberta", "gpt2", "llama", "mistral", "t5", "bart"]
CROSS = {"t5": ["SelfAttention", "EncDecAttention"], "bart": ["self_attn", "encoder_attn"]}
LENGTH = 3

on_all_models = pytest.mark.parametrize("name", MODELS)
either_way = pytest.mark.parametrize("reparameterize", [True, False])
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def prefixed(model, architecture, **options):
    """A prefix in every attention module, cross-attention too, and that acts."""
    torch.manual_seed(7)
    options = {"prefix_token_num": LENGTH, "embed_dim": 8, "mid_dim": 8, **options}
    return shake(PrefixModel(model, modified_modules=CROSS.get(architecture), **options))


def padding():
    """The attention mask of a batch whose second row is shorter, padded on the right."""
    mask = torch.ones_like(token_ids())
    mask[1, 5:] = 0
    return mask


def close(one, other, atol=1e-5):
    return torch.allclose(one, other, atol=atol, rtol=0)


# ----------------------------------------------------------------------------- attention by hand
@dataclass(frozen=True)
class Place:
    """Where a model computes attention, and by which of its modules.

    Attributes:
        path: the attention module in block number {}.
        parts: the projections of queries, keys and values inside it, or the fused one.
        out: the projection that takes what attention gives; the module itself gives that if "".
        causal: whether a query sees the keys up to its own only.
        queries, keys: whether they are padded when the input is.
    """

    path: str
    parts: tuple[str, ...]
    out: str
    causal: bool = False
    queries: bool = True
    keys: bool = True


_proj = ("q_proj", "k_proj", "v_proj")
_bert = (("query", "key", "value"), "")
PLACES = {
    "bert": Place("bert.encoder.layer.{}.attention.self", *_bert),
    "roberta": Place("roberta.encoder.layer.{}.attention.self", *_bert),
    "gpt2": Place("transformer.h.{}.attn", ("c_attn",), "c_proj", causal=True),
    "llama": Place("model.layers.{}.self_attn", _proj, "o_proj", causal=True),
    "mistral": Place("model.layers.{}.self_attn", _proj, "o_proj", causal=True),
    "t5 encoder": Place("encoder.block.{}.layer.0.SelfAttention", ("q", "k", "v"), "o"),
    "t5 decoder": Place(
        "decoder.block.{}.layer.0.SelfAttention", ("q", "k", "v"), "o", True, False, False
    ),
    "t5 cross": Place(
        "decoder.block.{}.layer.1.EncDecAttention", ("q", "k", "v"), "o", queries=False
    ),
    "bart encoder": Place("model.encoder.layers.{}.self_attn", _proj, "out_proj"),
    "bart decoder": Place(
        "model.decoder.layers.{}.self_attn", _proj, "out_proj", True, False, False
    ),
    "bart cross": Place("model.decoder.layers.{}.encoder_attn", _proj, "out_proj", queries=False),
}


def watched(model, place, module):
    """What the modules of one attention give in the next forward: [q, k, v, what comes out]."""
    seen = []
    for part in place.parts:
        part = module.get_submodule(part)
        part.register_forward_hook(lambda _m, _a, out: seen.extend(out.split(32, -1)) or None)
    if place.out:
        out = module.get_submodule(place.out)
        out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        module.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    return seen


def by_hand(name, model, place, module, prefix, seen, mask):
    """softmax(q [P_k; K]^T / scale + bias) [P_v; V], with the prefix seen by all queries."""
    width = prefix[0].size(1) // (2 if name in ("llama", "mistral") else 4)
    query, key, value = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in seen[:3])
    if name in ("llama", "mistral"):
        angles = torch.arange(7.0, dtype=torch.float64)[:, None] / 10000 ** (
            torch.arange(0, width, 2, dtype=torch.float64) / width
        )
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        first, second = slice(width // 2), slice(width // 2, None)
        query, key = (
            x * cos + torch.cat([-x[..., second], x[..., first]], -1) * sin for x in (query, key)
        )
    rows, heads, length, count = *query.shape[:3], key.size(2)
    past_key, past_value = (p.unflatten(-1, (-1, width)).transpose(0, 1) for p in prefix)
    key = torch.cat([past_key.expand(rows, -1, -1, -1), key], 2)
    value = torch.cat([past_value.expand(rows, -1, -1, -1), value], 2)
    key, value = (t.repeat_interleave(heads // t.size(1), 1) for t in (key, value))

    distance = torch.arange(length)[:, None] - torch.arange(count)
    visible = torch.ones(rows, 1, length, count, dtype=torch.bool)
    if place.causal:
        visible = visible & (distance >= 0)
    if name == "mistral":
        visible = visible & (distance < model.config.sliding_window)
    if mask is not None and place.keys:
        visible = visible & mask.bool()[:, None, None]
    visible = torch.cat([visible.new_ones(rows, 1, length, LENGTH), visible], -1)

    scores = query @ key.mT
    if name != "t5":
        scores = scores / width**0.5
    elif "cross" not in place.path and "EncDec" not in place.path:
        first = model.get_submodule(place.path.format(0))
        scores[..., LENGTH:] += first.compute_bias(length, count)
    out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@implementations
@pytest.mark.parametrize("where", PLACES)
def test_attention_goes_over_the_prefix_and_the_keys(where, implementation, padded):
    name, place = where.split()[0], PLACES[where]
    model = build(name).double()
    model.set_attn_implementation(implementation)
    delta = prefixed(model, name, reparameterize=False)
    mask = padding() if padded else None
    for block in range(2):
        path = place.path.format(block)
        module, layer = model.get_submodule(path), delta.layers[path]
        seen = watched(model, place, module)
        with torch.no_grad():
            model(**inputs(model), attention_mask=mask)
            prefix = (layer.past_key, layer.past_value)
            expected = by_hand(name, model, place, module, prefix, seen, mask)
        found = seen[3].reshape(expected.shape)
        real = ... if mask is None or not place.queries else mask.bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-7, rtol=1e-6)


def test_the_keys_and_values_of_all_layers_come_from_one_network():
    model = build("bert").double()
    delta = prefixed(model, "bert")
    layers = [delta.layers[f"bert.encoder.layer.{block}.attention.self"] for block in range(2)]
    network = layers[0].shared
    assert layers[1].shared is network
    E, W, b = network.embedding, network.hidden.weight, network.hidden.bias
    hidden = torch.tanh(E @ W.T + b)
    for layer in layers:
        for part, found in zip((layer.key, layer.value), layer.keys_and_values(), strict=True):
            expected = (hidden @ part.weight.T + part.bias).view(LENGTH, 4, 8).transpose(0, 1)
            torch.testing.assert_close(found, expected)


@either_way
@on_all_models
def test_eager_and_sdpa_give_the_same(name, reparameterize):
    model = build(name).double()
    prefixed(model, name, reparameterize=reparameterize)
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(**inputs(model), attention_mask=padding()).logits)
    real = ... if model.config.is_encoder_decoder else padding().bool()
    assert close(found[0][real], found[1][real], 1e-6)  # Llama's softmax is in float32


@on_all_models
def test_attention_weights_are_those_of_the_prefix_and_the_keys(name):
    model = build(name)
    model.set_attn_implementation("eager")
    prefixed(model, name)
    output = model(**inputs(model), output_attentions=True)
    for field in (f for f in output if f.endswith("attentions")):
        keys = 4 if field.startswith("decoder") else 7
        for weights in output[field]:
            assert weights.size(-1) == LENGTH + keys
            assert close(weights.sum(-1), torch.ones(()))


# ------------------------------------------------------------------------------- coming and going
@either_way
@on_all_models
def test_without_the_prefix_the_model_is_itself_bit_for_bit(name, reparameterize):
    model = build(name)
    plain = logits(model)
    with untouched(model):
        delta = prefixed(model, name, reparameterize=reparameterize)
        assert not close(logits(model), plain, 1e-4)
        with delta.disabled():
            assert torch.equal(logits(model), plain)
        delta.detach()
        assert torch.equal(logits(model), plain)


@on_all_models
def test_two_prefixes_on_one_module_commute(name):
    model = build(name)
    one = prefixed(model, name, name="one")
    alone = logits(model)
    shake(prefixed(model, name, name="two", prefix_token_num=2), seed=2)
    both = logits(model)
    opendelta.composition(model).reorder(["two", "one"])
    assert close(logits(model), both)
    assert not close(both, alone, 1e-4)
    with one.disabled():
        assert not close(logits(model), both, 1e-4)


@on_all_models
def test_the_config_of_the_model_is_not_changed(name, tmp_path):
    model = build(name)
    config, before = model.config, model.config.to_dict()
    prefixed(model, name)
    logits(model)
    assert model.config is config
    assert config.to_dict() == before
    assert config._attn_implementation == "sdpa"
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict().keys() == before.keys()
    for module in model.modules():
        if "config" in module.__dict__:
            assert "opendelta" not in module.__dict__["config"].to_json_string()


@on_all_models
def test_the_implementation_may_change_while_the_prefix_is_there(name):
    model = build(name)
    prefixed(model, name)
    expected = logits(model)
    model.set_attn_implementation("eager")
    assert close(logits(model), expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), expected)


# ----------------------------------------------------------------------------------------- gates
def set_gates(delta, bias):
    """Open or close the gates of `delta`, whatever their input is."""
    for key, parameter in delta.named_parameters():
        if ".gate." in f".{key}":
            nn.init.constant_(parameter, bias if key.endswith("bias") else 0.0)


@pytest.mark.covers("DeltaConfig.gate")
@implementations
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_closed_gate_is_no_prefix_and_an_open_one_no_gate(name, implementation):
    model = build(name)
    model.set_attn_implementation(implementation)
    for mask in (None, padding()):
        real = ... if mask is None or name == "t5" else mask.bool()

        def run(mask=mask, real=real):
            with torch.no_grad():
                return model(**inputs(model), attention_mask=mask).logits[real]

        plain = run()
        delta = prefixed(model, name)
        ungated = run()
        values = delta.state_dict(named="gated")
        delta.detach()
        delta = prefixed(model, name, gate=True, name="gated")
        missing = model.load_state_dict(values, strict=False).missing_keys
        assert [key for key in missing if "deltas" in key and ".gate." not in key] == []
        set_gates(delta, -50.0)
        assert close(run(), plain)
        set_gates(delta, 50.0)
        assert close(run(), ungated)
        set_gates(delta, 0.0)
        assert not close(run(), ungated, 1e-4)
        assert not close(run(), plain, 1e-4)
        delta.detach()


# ---------------------------------------------------------------------------------- checkpointing
def gradients(model, delta):
    """The gradients of the prefix in training mode."""
    model.train().zero_grad()
    model(**inputs(model), use_cache=False).logits.pow(2).sum().backward()
    found = {key: parameter.grad for key, parameter in delta.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    return found


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@on_all_models
def test_checkpointing_gives_the_same_gradients(name, reentrant, gate):
    model = build(name).double()
    delta = prefixed(model, name, gate=gate)
    delta.freeze_module()
    expected = gradients(model, delta)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, delta)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


# ----------------------------------------------------------------------------------------- copies
IN_A_FRESH_PROCESS = """
import sys, torch
for model, inputs, expected in torch.load(sys.argv[1], weights_only=False):
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
"""


@either_way
@on_all_models
def test_copies_compute_the_same_on_their_own(name, reparameterize):
    model = build(name)
    delta = prefixed(model, name, reparameterize=reparameterize)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        with delta.disabled():
            assert torch.equal(logits(other), expected)


def test_a_pickled_prefix_acts_in_a_fresh_process(tmp_path):
    saved = []
    for number, name in enumerate(MODELS):
        model = build(name)
        prefixed(model, name, reparameterize=number % 2 == 0, gate=number % 3 == 0)
        saved.append((model, inputs(model), logits(model)))
    torch.save(saved, tmp_path / "models.pt")
    command = [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS, tmp_path / "models.pt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -------------------------------------------------------------------------------------- compiling
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_with_a_prefix_compiles_into_one_graph(name, gate):
    torch._dynamo.reset()
    model = build(name)
    plain = logits(model)
    delta = prefixed(model, name, reparameterize=not gate, gate=gate)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert close(fast(**inputs(model)).logits, logits(model))
        with delta.disabled():
            assert close(fast(**inputs(model)).logits, plain)


# --------------------------------------------------------------------------------------- refusals
class OfTorch(nn.Module):
    """Attention that is torch's own."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_attention_of_torch_is_refused():
    with pytest.raises(SiteError, match="attention interface"):
        PrefixModel(OfTorch(), modified_modules=["attn"])


def test_attention_with_an_equation_of_its_own_is_refused():
    config = transformers.DebertaV2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = transformers.DebertaV2Model(config)
    with untouched(model), pytest.raises(SiteError, match="attention interface"):
        PrefixModel(model, modified_modules=["attention.self"])


SERIES = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1], "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "num_time_features": 1,
}  # fmt: skip
SOUND = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


@pytest.mark.parametrize("places", [None, ["encoder"]])
@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.WavLMModel(transformers.WavLMConfig(**SOUND)),
        lambda: transformers.InformerModel(transformers.InformerConfig(**SERIES)),
        lambda: transformers.AutoformerModel(transformers.AutoformerConfig(**SERIES)),
    ],
)
def test_the_refusal_names_what_other_methods_take(make, places):
    model = make()
    refusal = r"'encoder.* \(\w+\) cannot carry 'prefix', which takes: .* LoRA, take 'encoder\..*'"
    with untouched(model), pytest.raises(SiteError, match=refusal) as error:
        PrefixModel(model, modified_modules=places)
    named = re.findall(r"'([\w.]+)'", str(error.value).partition("take ")[2])
    LoraModel(model, modified_modules=[f"[r]^{re.escape(name)}$" for name in named])


def use(model, implementation):
    """Have all attention of `model` computed by `implementation`, which may not be installed."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._attn_implementation_internal = implementation


@pytest.mark.parametrize("other", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_other_implementations_are_refused(name, other):
    model = build(name)
    use(model, other)
    with untouched(model), pytest.raises(SiteError, match=r"eager and sdpa.*set_attn_implement"):
        prefixed(model, name)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_change_to_another_implementation_is_refused_by_the_next_forward(name):
    model = build(name)
    prefixed(model, name)
    use(model, "flash_attention_2")
    with pytest.raises(SiteError, match=r"eager and sdpa.*set_attn_implement"):
        logits(model)
