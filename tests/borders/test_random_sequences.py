"""Random deltas on padded, packed, windowed and routed rows and on caches: as each document alone.

The reference is the plain model: it takes one document, the deltas are hooks computed by hand, and
its attention is written here.
"""

import contextlib
import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from support.verbs import Deltas
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import opendelta
from opendelta import SiteError, composition, route

pytestmark = pytest.mark.covers("route", "LoReftConfig.first", "PrefixModel", "SoftPromptModel")

WIDE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
CAUSAL = {**WIDE, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": None}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
        "tie_word_embeddings": False}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
      "dropout_rate": 0.0, "initializer_factor": 1.0, "pad_token_id": 0,
      "decoder_start_token_id": 0}  # fmt: skip
MAMBA = {**WIDE, "state_size": 4, "eos_token_id": None}
SWIN = {"image_size": 8, "patch_size": 1, "num_channels": 1, "embed_dim": 8, "depths": [2],
        "num_heads": [2], "window_size": 4, "num_labels": 3, "initializer_range": 0.3,
        "drop_path_rate": 0.0}  # fmt: skip
OPT = {"vocab_size": 40, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24,
       "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
       "dropout": 0.0, "init_std": 0.3, "pad_token_id": 0, "tie_word_embeddings": False,
       "eos_token_id": None}  # fmt: skip
MOE = {**WIDE, "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1,
       "moe_intermediate_size": 8, "shared_expert_intermediate_size": 24,
       "eos_token_id": None}  # fmt: skip
MODERN = {**WIDE, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1,
          "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TIMES = {**WIDE, "image_size": 4, "patch_size": 2, "num_frames": 2, "num_channels": 1,
         "num_labels": 3, "hidden_dropout_prob": 0.0, "drop_path_rate": 0}  # fmt: skip
PIXELS = {"swin": (1, 8, 8), "timesformer": (2, 1, 4, 4)}
DECODER = torch.tensor([[0, 5, 9]])


WAYS = ["plain", "frozen", "merged", "checkpointed"]
CHECKPOINTED = {"llama", "mistral", "gemma3", "opt", "qwen2_moe", "modernbert", "timesformer", "t5"}


class Family:
    """A model, the forms of its rows, and its modules by their kind."""

    def __init__(self, make, forms, block, attention, linear, norm, pair=None):
        self.make, self.forms, self.linear, self.norm = make, forms, linear, norm
        self.block, self.attention, self.pair = block, attention, pair


def like_llama(make, forms, linear=("model.layers.1.mlp.down_proj", "lm_head")):
    return Family(
        make, forms, ["model.layers.0.mlp", "model.layers.1"],
        ["model.layers.0.self_attn", "model.layers.1.self_attn"],
        ["model.layers.0.self_attn.q_proj", *linear],
        ["model.norm", "model.layers.1.input_layernorm"],
        [("model.layers.0.mlp", "model.layers.0.mlp"),
         ("model.layers.1.self_attn", "model.layers.1.mlp")],
    )  # fmt: skip


ALL = ["padded", "packed", "masked", "chunks"]
FAMILIES = {
    "llama": like_llama(lambda: T.LlamaForCausalLM(T.LlamaConfig(**CAUSAL)), ALL),
    "mistral": like_llama(
        lambda: T.MistralForCausalLM(T.MistralConfig(sliding_window=3, **CAUSAL)),
        ["padded", "packed", "chunks"],
    ),
    "gemma3": like_llama(
        lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(
            sliding_window=3, layer_types=["sliding_attention", "full_attention"], **CAUSAL
        )),
        ["padded", "packed", "chunks"],
    ),
    "gpt2": Family(
        lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)), ALL,
        ["transformer.h.0.mlp", "transformer.h.1"],
        ["transformer.h.0.attn", "transformer.h.1.attn"],
        ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn", "lm_head"],
        ["transformer.ln_f", "transformer.h.0.ln_1"],
        [("transformer.h.1.attn", "transformer.h.1.mlp")],
    ),
    "bert": Family(
        lambda: T.BertForMaskedLM(T.BertConfig(**WIDE)), ["padded", "masked"],
        ["bert.encoder.layer.0.output", "bert.encoder.layer.1"],
        ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"],
        ["bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.0.output.dense"],
        ["bert.encoder.layer.0.output.LayerNorm"],
    ),
    "t5": Family(
        lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)), ["padded"],
        ["encoder.block.0.layer.1", "decoder.block.1.layer.2"],
        ["encoder.block.1.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention",
         "decoder.block.1.layer.0.SelfAttention"],
        ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"],
        [],
    ),
    "mamba": Family(
        lambda: T.MambaForCausalLM(T.MambaConfig(**MAMBA)), ["padded"],
        ["backbone.layers.0", "backbone.layers.1.mixer"], [],
        ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.out_proj", "lm_head"], [],
    ),
    "opt": Family(
        lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)), ["padded", "chunks"],
        ["model.decoder.layers.0.self_attn", "model.decoder.layers.1"],
        ["model.decoder.layers.0.self_attn", "model.decoder.layers.1.self_attn"],
        ["model.decoder.layers.0.self_attn.v_proj", "model.decoder.layers.1.fc2", "lm_head"],
        ["model.decoder.final_layer_norm", "model.decoder.layers.1.final_layer_norm"],
        [("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2")],
    ),
    "qwen2_moe": like_llama(
        lambda: T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**MOE)), ALL,
        ["model.layers.1.mlp.shared_expert.down_proj", "model.layers.0.mlp.shared_expert_gate"],
    ),
    "modernbert": Family(
        lambda: T.ModernBertForMaskedLM(T.ModernBertConfig(**MODERN)), ["padded"],
        ["model.layers.0.mlp", "model.layers.1"], ["model.layers.0.attn", "model.layers.1.attn"],
        ["model.layers.1.attn.Wqkv", "model.layers.0.mlp.Wo", "decoder"],
        ["model.layers.1.mlp_norm"], [("model.layers.0.attn", "model.layers.0.mlp")],
    ),
    "timesformer": Family(
        lambda: T.TimesformerForVideoClassification(T.TimesformerConfig(**TIMES)), ["images"],
        ["timesformer.encoder.layer.0.temporal_attention", "timesformer.encoder.layer.1.attention",
         "timesformer.encoder.layer.0"], [],
        ["timesformer.encoder.layer.0.temporal_attention.attention.qkv", "classifier",
         "timesformer.encoder.layer.1.attention.attention.qkv",
         "timesformer.encoder.layer.1.output.dense"],
        ["timesformer.layernorm", "timesformer.encoder.layer.0.temporal_layernorm"],
    ),
    "swin": Family(
        lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN)), ["images"],
        ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1.attention"],
        ["swin.encoder.layers.0.blocks.0.attention", "swin.encoder.layers.0.blocks.1.attention"],
        ["swin.encoder.layers.0.blocks.1.attention.q_proj",
         "swin.encoder.layers.0.blocks.0.mlp.fc1", "classifier"],
        ["swin.encoder.layers.0.blocks.0.layernorm_before"],
    ),
}  # fmt: skip


def kinds(family):
    """{kind: (method, its options, its places)}."""
    lora = {"lora_r": 2, "lora_alpha": 3.0}
    found = {
        "lora": (opendelta.LoraModel, lora, family.linear),
        "ia3": (opendelta.IA3Model, {"feedforward_modules": []}, family.linear),
        "bitfit": (opendelta.BitFitModel, {}, family.norm),
        "adapter": (
            opendelta.AdapterModel, {"bottleneck_dim": 2, "non_linearity": "tanh"}, family.block
        ),
        "parallel": (
            opendelta.ParallelAdapterModel, {"bottleneck_dim": 2, "non_linearity": "tanh"},
            family.pair,
        ),
        "first": (opendelta.LoReftModel, {"low_rank_dimension": 2, "first": 2}, family.block),
        "last": (
            opendelta.LoReftModel, {"low_rank_dimension": 2, "first": 1, "last": 2}, family.block
        ),
        "prefix": (
            opendelta.PrefixModel, {"prefix_token_num": 2, "reparameterize": False},
            family.attention,
        ),
        "prompt": (opendelta.SoftPromptModel, {"soft_token_num": 2}, ["root"]),
    }  # fmt: skip
    if "images" in family.forms:
        found = {
            kind: row for kind, row in found.items() if kind not in ("first", "last", "prompt")
        }
    return {
        kind: (method, {**options, "dtype": "backbone"}, places)
        for kind, (method, options, places) in found.items() if places
    }  # fmt: skip


# --------------------------------------------------------------------------- the deltas by hand
def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """softmax(q k^T s + m) v, with the prefixes of a module before its keys."""
    groups = query.size(1) // key.size(1)
    for keys, values in module.__dict__.get("prefixes", ()):
        key, value = before(keys, key), before(values, value)
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * (query.size(-1) ** -0.5 if scaling is None else scaling)
    for bias in (kwargs.get("position_bias"), attention_mask):
        if bias is not None:
            scores = scores + F.pad(bias, (scores.size(-1) - bias.size(-1), 0))
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def before(rows, old):
    """`rows` [prefix, heads * head] before `old` [batch, heads, length, head]."""
    new = rows.unflatten(-1, old.shape[1::2]).transpose(0, 1)
    return torch.cat([new.expand(len(old), -1, -1, -1), old], 2)


ALL_ATTENTION_FUNCTIONS.register("by_hand", attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def bottleneck(own, x):
    hidden = torch.tanh(F.linear(x, own["down_proj.weight"], own["down_proj.bias"]))
    return F.linear(hidden, own["up_proj.weight"], own["up_proj.bias"])


def changed(known, own, x, y):
    """The output y of a module whose input is x, with one layer around it."""
    kind, scale = known.kind, known.scale
    if kind == "lora":
        return y + scale * 1.5 * x @ own["lora_A"].T @ own["lora_B"].T
    if kind == "ia3":
        return y * own["ia3_l"]
    if kind == "bitfit":
        return y + scale * own["bias"]
    if kind == "adapter":
        return y + scale * bottleneck(own, y)
    R = torch.linalg.qr(own["rotate_layer"]).Q.T
    source = F.linear(y, own["learned_source.weight"], own["learned_source.bias"])
    new = y + scale * (source - y @ R.T) @ R
    columns = torch.arange(y.size(1))
    chosen = columns < (2 if kind == "first" else 1)
    if kind == "last":
        chosen = chosen | (columns >= y.size(1) - 2)
    return torch.where(chosen[:, None], new, y)


@contextlib.contextmanager
def hooked(model, acting):
    """The model computes these deltas, by hooks, inside the block."""
    with contextlib.ExitStack() as stack:
        for known in acting:
            for site in known.sites:
                put_hooks(stack, model, known, site)
        yield


def put_hooks(stack, model, known, site):
    if known.kind == "prompt":
        return
    start, end = (site, site) if isinstance(site, str) else site
    module = model.get_submodule(end)
    own = {name: tensor.double() for name, tensor in known.tensors(start).items()}
    if known.kind == "prefix":
        prefixes = module.__dict__.setdefault("prefixes", [])
        prefixes.append((own["past_key"], own["past_value"]))
        stack.callback(prefixes.pop)
        return
    inputs = []

    def enter(module, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def leave(module, args, kwargs, out):
        x, y = inputs.pop(), out if isinstance(out, torch.Tensor) else out[0]
        if known.kind == "parallel":
            y = y + known.scale * bottleneck(own, x)
        else:
            y = changed(known, own, x, y)
        return y if isinstance(out, torch.Tensor) else (y, *out[1:])

    first = model.get_submodule(start)
    stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)


# ------------------------------------------------------------------------------------- the machine
class Sequences(Deltas):
    scaled, most = {"lora", "bitfit", "adapter", "parallel", "first", "last"}, 5

    @initialize(name=st.sampled_from(sorted(FAMILIES)), eager=st.booleans())
    def start(self, name, eager):
        self.name, self.family = name, FAMILIES[name]
        torch.manual_seed(0)
        model = self.family.make().eval()
        self.alone, self.eager = copy.deepcopy(model).double(), eager
        self.rough = eager or name in ("mamba", "qwen2_moe")  # parts of them compute in float32
        if name == "qwen2_moe":
            self.alone.set_experts_implementation("eager")
        if not self.rough:
            model.double()
        if name not in ("mamba", "timesformer"):
            self.alone.set_attn_implementation("by_hand")
            model.set_attn_implementation("eager" if eager else "sdpa")
        self.kinds = kinds(self.family)
        if name in CHECKPOINTED:  # in training
            model.activation_checkpointing_enable()
        self.begin(model)

    def reference(self, document, acting):
        """The plain model's output for one document [length], or one image."""
        with hooked(self.alone, acting):
            if self.name in PIXELS:
                return self.alone(document[None]).logits
            prompts = [
                p.double() for known in acting if known.kind == "prompt"
                for p in known.handle.parameters()
            ]  # fmt: skip
            embeds = self.alone.get_input_embeddings()(document[None])
            embeds = torch.cat([*(prompt[None] for prompt in prompts), embeds], 1)
            if self.name == "t5":
                return self.alone(inputs_embeds=embeds, decoder_input_ids=DECODER).logits[0]
            return self.alone(inputs_embeds=embeds, use_cache=False).logits[0, -len(document) :]

    # -------------------------------------------------------------------------------- the batches
    def documents(self, data, form):
        """For each row its documents."""
        if form == "images":
            count = data.draw(st.integers(1, 3))
            return [[torch.randn(PIXELS[self.name]).double()] for _ in range(count)]
        number = itertools.count(1)
        sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
        if form in ("padded", "chunks"):
            sizes = st.integers(1, 8).map(lambda size: [size])
        rows = data.draw(st.lists(sizes, min_size=1, max_size=3))
        if form == "packed":  # rows are of one length, and have no padding
            most = max(map(sum, rows))
            rows = [[*row[:-1], row[-1] + most - sum(row)] for row in rows]
        return [
            [torch.tensor([1 + next(number) * 7 % 39 for _ in range(size)]) for size in row]
            for row in rows
        ]

    def batch(self, data, form, rows):
        """The arguments of a call, and for each row its tokens' columns."""
        total = max(sum(map(len, row)) for row in rows)
        left = data.draw(st.booleans())
        ids = torch.zeros(len(rows), total, dtype=torch.long)
        mask, places, number = ids.clone(), ids.clone(), ids.clone()
        for index, row in enumerate(rows):
            tokens = torch.cat(row)
            columns = slice(total - len(tokens), None) if left else slice(len(tokens))
            ids[index, columns], mask[index, columns] = tokens, 1
            places[index, columns] = torch.cat([torch.arange(len(doc)) for doc in row])
            number[index, columns] = torch.cat(
                [torch.full((len(doc),), n) for n, doc in enumerate(row)]
            )
        given = {"input_ids": ids}
        if form == "masked":
            shown = (number[:, None] == number[:, :, None]) & (mask[:, None] == 1)
            shown &= mask[:, :, None] == 1
            if self.name != "bert":
                shown = shown.tril()
            shown = (shown | torch.eye(total).bool())[:, None]
            if self.eager:
                shown = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo().min)
            given["attention_mask"] = shown
        elif form != "packed" and (not mask.all() or data.draw(st.booleans())):
            given["attention_mask"] = mask
        fixed = self.name in ("gpt2", "bert") and left and not mask.all()
        if self.name not in ("t5", "mamba", "modernbert") and (
            form in ("packed", "masked") or fixed or data.draw(st.booleans())
        ):
            given["position_ids"] = places
        return given, mask == 1

    def whole(self, given):
        if self.name == "t5":
            ids = DECODER.expand(len(given["input_ids"]), -1)
            return self.model(**given, decoder_input_ids=ids).logits
        return self.model(**given, **({} if "bert" in self.name else {"use_cache": False})).logits

    def in_chunks(self, given, ends, cache):
        """Logits of rows that are given piece by piece."""
        parts, start = [], 0
        for end in ends:
            piece = {
                name: value[:, (0 if name == "attention_mask" else start) : end]
                for name, value in given.items()
            }
            parts.append(self.model(**piece, past_key_values=cache, use_cache=True).logits)
            start = end
        return torch.cat(parts, 1)

    # ------------------------------------------------------------------------------------ the rule
    @precondition(lambda self: getattr(self, "order", None))
    @rule(data=st.data())
    def rows(self, data):
        for _ in range(3):
            self.check(data, False)

    @precondition(lambda self: getattr(self, "order", None))
    @rule(data=st.data())
    def routed_rows(self, data):
        for _ in range(3):
            self.check(data, True)

    def check(self, data, routed):
        """Rows are as their documents alone."""
        form = data.draw(st.sampled_from(self.family.forms))
        rows = self.documents(data, form)
        attached = [known for known in self.order if known.attached]
        inside, blocks = nullcontext, [self.blocks] * len(rows)
        if routed and attached:
            inside, blocks = self.routed(data, rows, attached)
        acting = [[k for k in self.order if self.acts(k, open_)] for open_ in blocks]
        run, seen, static = self.drawn_run(data, form, rows)
        ways = [way for way in WAYS if self.can(way, form, routed)]
        way = data.draw(st.sampled_from(ways))
        try:
            with self.under(way), inside():
                out = run()
        except SiteError as error:
            every = {known.kind for row in acting for known in row}
            if not self.may_refuse(form, every, routed, str(error)):
                raise
            return
        expected = [
            torch.cat([self.reference(doc, known) for doc in row])
            for row, known in zip(rows, acting, strict=True)
        ]
        found = list(out) if seen is None else [o[s] for o, s in zip(out, seen, strict=True)]
        found, expected = torch.cat(found).double(), torch.cat(expected).double()
        near = {"atol": 1e-3, "rtol": 1e-3} if self.rough else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(found, expected, **near)
        trains = attached and found.requires_grad and way != "merged" and not static
        if trains and data.draw(st.booleans()):
            self.check_gradients(found, expected, attached, near)

    def routed(self, data, rows, attached):
        """A function that opens a drawn route, and for each row the open blocks."""
        some = st.lists(st.sampled_from(attached), unique=True)
        taken = [data.draw(some) for _ in rows]
        names = [[known.handle.name for known in row] for row in taken]
        repeats = data.draw(st.sampled_from([1, 2, 4]))
        blocks = [
            [*self.blocks, (None, {known: known in row for known in attached}, True)]
            for row in taken
        ]
        return (lambda: route(self.model, names, repeats)), blocks

    def can(self, way, form, routed):
        """True if rows of this form can run this way."""
        if way == "merged":
            return not self.blocks and not routed
        return way != "checkpointed" or (form != "chunks" and self.name in CHECKPOINTED)

    @contextlib.contextmanager
    def under(self, way):
        composed = composition(self.model)
        with contextlib.ExitStack() as stack:
            if way == "frozen":
                stack.enter_context(torch.no_grad())
                stack.enter_context(composed.frozen())
            elif way == "checkpointed":
                stack.callback(self.model.eval)
                self.model.train()
            elif way == "merged":
                with contextlib.suppress(SiteError):
                    composed.merge()
                    stack.callback(composed.unmerge)
            yield

    def drawn_run(self, data, form, rows):
        """What runs the model, where in the rows tokens are, and if a cache is static."""
        if form == "images":
            pixels = torch.stack([row[0] for row in rows]).to(self.model.dtype)
            return (lambda: self.model(pixels).logits[:, None]), None, False
        given, seen = self.batch(data, form, rows)
        total, static = given["input_ids"].size(1), False
        if form != "chunks":
            seen = None if self.name == "t5" else seen
            return (lambda: self.whole(given)), seen, static
        ends = data.draw(st.sets(st.integers(1, total), min_size=1)) | {total}
        if self.name in ("llama", "gpt2") and data.draw(st.booleans()):
            static = True
            cache = T.StaticCache(config=self.model.config, max_cache_len=total + 2)
        else:
            cache = T.DynamicCache(config=self.model.config)
        return (lambda: self.in_chunks(given, sorted(ends), cache)), seen, static

    def may_refuse(self, form, every, routed, message):
        """True if a refusal says what is so."""
        if "route() was given" in message:  # axis 0 of some module's input is not the rows
            return self.name in ("swin", "timesformer", "opt", "qwen2_moe")
        if "last" in every and form == "chunks":
            return True
        return "prompt" in every and (routed or form in ("masked", "chunks"))

    def check_gradients(self, found, expected, attached, near):
        weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
        own = [p for known in attached for p in known.handle.parameters()]
        unused = {"allow_unused": True, "materialize_grads": True}
        one, other = (
            torch.autograd.grad((out * weights).sum(), own, **unused) for out in (found, expected)
        )
        torch.testing.assert_close(one, other, **near)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
