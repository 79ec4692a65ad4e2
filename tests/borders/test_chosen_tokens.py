"""LoReFT's first and last tokens: windows, padding, packed documents, caches, and recomputation.

The models have one block, so that a change of one token after it is seen at this token alone.
"""

import re
import threading

import pytest
import torch
import transformers as T
from support.nets import shake, untouched

import opendelta
from opendelta import LoReftModel, SiteError

pytestmark = pytest.mark.covers("LoReftModel", "LoReftConfig.first", "LoReftConfig.last")

WIDE = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
CAUSAL = {**WIDE, "num_key_value_heads": 2, "pad_token_id": 0}
HEAD = {**CAUSAL, "head_dim": 8}
MODELS = {
    "llama": lambda: T.LlamaModel(T.LlamaConfig(**CAUSAL)),
    "mistral": lambda: T.MistralModel(T.MistralConfig(sliding_window=4, **CAUSAL)),
    "gemma2": lambda: T.Gemma2Model(T.Gemma2Config(sliding_window=4, **HEAD)),
    "gemma3": lambda: T.Gemma3TextModel(T.Gemma3TextConfig(sliding_window=4, **HEAD)),
    "gpt_oss": lambda: T.GptOssModel(
        T.GptOssConfig(sliding_window=4, num_local_experts=2, num_experts_per_tok=1, **HEAD)
    ),
    "recurrent_gemma": lambda: T.RecurrentGemmaModel(
        T.RecurrentGemmaConfig(
            attention_window_size=4, block_types=["attention"], lru_width=32, **HEAD
        )
    ),
    "qwen3": lambda: T.Qwen3Model(T.Qwen3Config(**HEAD)),
    "gpt_neox": lambda: T.GPTNeoXModel(T.GPTNeoXConfig(**WIDE)),
    "bert": lambda: T.BertModel(T.BertConfig(**WIDE)),
    "mamba": lambda: T.MambaModel(T.MambaConfig(state_size=4, **WIDE)),
}
WINDOWS = ["mistral", "gemma2", "gemma3", "gpt_oss", "recurrent_gemma"]
PACKING = ["llama", "qwen3", "mistral", "gpt_neox", "bert"]
BLOCK = [r"[r](layers|layer)\.0"]
LINEAR = {name: ["down_proj"] for name in ("llama", "mistral", "qwen3")}
LINEAR |= {"gpt_neox": ["dense_4h_to_h"], "bert": [r"[r]layer\.0\.output\.dense"]}
IDS = torch.arange(5, 17)[None]
STARTS = [0, 4, 9]  # of three documents in a row of 12 tokens
PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]])}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def put(model, modules=BLOCK, first=2, last=None, name="loreft"):
    options = {"modified_modules": modules, "low_rank_dimension": 2, "name": name}
    return shake(LoReftModel(model, first=first, last=last, **options), scale=1.0)


def changed(model, delta, **batch):
    """The places (row, token) that the delta changes."""
    with torch.no_grad():
        new = model(**batch).last_hidden_state
        with delta.disabled():
            old = model(**batch).last_hidden_state
    return [tuple(place) for place in ((new - old).abs().amax(-1) > 1e-5).nonzero().tolist()]


def row(*places):
    return [(0, place) for place in places]


# ------------------------------------------------------------------------------------------ windows
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_hides_no_first_token(name, attention, train):
    model = build(name).train(train)
    if name not in ("gpt_oss", "gemma2"):  # they have no sdpa
        model.set_attn_implementation(attention)
    assert changed(model, put(model, last=1), input_ids=IDS) == row(0, 1, 11)


# ------------------------------------------------------------------------------------------ padding
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", PACKING)
def test_padding_is_no_token_for_blocks_and_linear_modules(name, linear, left, positions):
    model = build(name)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, : 5 if left else None] = 0
    mask[1, 7:] = 1 if left else 0
    if not left:
        mask[1, :7] = 1
    batch = {"input_ids": IDS.expand(2, -1), "attention_mask": mask}
    if positions:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    delta = put(model, LINEAR[name] if linear else BLOCK, last=1)
    expected = [5, 6, 11] if left else [0, 1, 6]
    assert changed(model, delta, **batch) == row(0, 1, 11) + [(1, place) for place in expected]


# ------------------------------------------------------------------------------------------ packing
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", PACKING)
def test_each_packed_document_has_its_first_and_last_tokens(name, cache, linear):
    model = build(name)
    delta = put(model, LINEAR[name] if linear else BLOCK, last=1)
    expected = row(0, 1, 3, 4, 5, 8, 9, 10, 11)
    assert changed(model, delta, input_ids=IDS, use_cache=cache, **PACKED) == expected


def test_documents_of_one_token_and_rows_with_other_documents():
    model = build("llama")
    positions = torch.tensor([[*range(12)], [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    batch = {"input_ids": IDS.expand(2, -1), "position_ids": positions, "use_cache": False}
    expected = row(0, 1) + [(1, place) for place in (0, 1, 2, 3)]
    assert changed(model, put(model), **batch) == expected


# ------------------------------------------------------------------------------------------- caches
@pytest.mark.parametrize("cut", [1, 2, 3, 6])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "recurrent_gemma"])
def test_tokens_in_the_cache_came_before(name, positions, cut):
    model = build(name)
    put(model, first=3)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 0] = 0
    more = [{}, {}]
    if positions:
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        more = [{"position_ids": places[:, :cut]}, {"position_ids": places[:, cut:]}]
    ids = IDS.expand(2, -1)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, **({"position_ids": places} if positions else {}))
        cache = {"past_key_values": T.DynamicCache(config=model.config), "use_cache": True}
        model(ids[:, :cut], attention_mask=mask[:, :cut], **cache, **more[0])
        then = model(ids[:, cut:], attention_mask=mask, **cache, **more[1])
    torch.testing.assert_close(
        then.last_hidden_state, full.last_hidden_state[:, cut:], atol=1e-5, rtol=0
    )


def test_a_static_cache_counts_by_position_ids():
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(eos_token_id=None, **CAUSAL)).eval()
    put(model, first=3)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :10] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(IDS.expand(2, -1), use_cache=False, **options)
    fixed = model.generate(
        IDS.expand(2, -1), cache_implementation="static", disable_compile=True, **options
    )
    torch.testing.assert_close(fixed.scores, plain.scores, atol=1e-5, rtol=0)


def test_a_mask_for_each_kind_of_layer_shows_the_padding():
    torch.manual_seed(0)
    sizes = {**HEAD, "num_hidden_layers": 3, "attention_window_size": 4, "lru_width": 32}
    config = T.RecurrentGemmaConfig(eos_token_id=None, initializer_range=0.2, **sizes)
    model = T.RecurrentGemmaForCausalLM(config).double().eval()
    put(model, modules=[r"[r]layers\.\d+$"])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_scores": True, "disable_compile": True}
    alone = model.generate(IDS[:, :4], use_cache=False, **options).scores
    padded = torch.cat([torch.zeros_like(IDS[:, :3]), IDS[:, :4]], 1)
    for more in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        out = model.generate(padded, attention_mask=(padded != 0).long(), **options, **more)
        torch.testing.assert_close(out.scores, alone)


def test_a_call_that_does_not_say_is_refused_by_name():
    model = build("llama")
    delta = put(model)
    mask = torch.zeros(1, 1, 12, 12)
    with pytest.raises(SiteError, match="the call of the root does not say by its mask, position"):
        model(IDS, attention_mask=mask)
    model(IDS, attention_mask=mask, position_ids=torch.arange(12)[None])
    hidden = torch.zeros(1, 12, 32)
    places = model.rotary_emb(hidden, torch.arange(12)[None])
    with pytest.raises(SiteError, match=r"'layers\.0' is given a mask or a cache, but no module"):
        model.layers[0](hidden, attention_mask=mask, position_embeddings=places)
    delta.detach()
    put(model, last=1, name="last")
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(SiteError, match=r"last=\.\.\. needs all tokens at once"):
        model(IDS[:, :1], past_key_values=cache)


SEEN = torch.ones(12, 12).tril().bool()
HIDING = {
    "itself": lambda mask: mask[:, None, None] & SEEN,
    "padding": lambda mask: (mask[:, None, None] & SEEN) | torch.eye(12).bool(),
    "additive": lambda mask: torch.where(mask[:, None, None] & SEEN, 0.0, -1e9),
    "all": lambda mask: (seen := mask[:, None, None] & SEEN) | ~seen.any(-1, keepdim=True),
}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("form", HIDING)
def test_position_ids_over_padding_are_refused_with_a_mask_of_who_sees_whom(form, left):
    model = build("llama")
    delta = put(model, last=1)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, slice(5) if left else slice(7, None)] = False
    batch = {"input_ids": IDS, "attention_mask": HIDING[form](mask)}
    with pytest.raises(SiteError, match="does not say by its mask, position ids and cache"):
        model(**batch, position_ids=torch.arange(12)[None])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = row(5, 6, 11) if left else row(0, 1, 6)
    found = changed(model, delta, **batch, position_ids=places)
    assert [place for place in found if mask[place]] == expected


def test_packed_documents_may_come_with_a_mask_of_who_sees_whom():
    model = build("llama")
    delta = put(model, last=1)
    number = (PACKED["position_ids"] == 0).cumsum(-1)
    mask = (number[:, None, :, None] == number[:, None, None]) & SEEN
    found = changed(model, delta, input_ids=IDS, attention_mask=mask, **PACKED)
    assert found == row(0, 1, 3, 4, 5, 8, 9, 10, 11)


STATES = {
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(state_size=4, **STATE)),
    "mamba2": lambda: T.Mamba2ForCausalLM(
        T.Mamba2Config(state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=8, **STATE)
    ),
    "rwkv": lambda: T.RwkvForCausalLM(T.RwkvConfig(attention_hidden_size=32, **STATE)),
}
STATE = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_states_that_count_no_tokens_are_counted(name, prompt):
    torch.manual_seed(0)
    model = STATES[name]().eval()
    put(model, [r"[r](layers|blocks)\.\d+"], first=6 + 3 * prompt)
    if prompt:
        opendelta.SoftPromptModel(model, soft_token_num=3)
    mask = torch.ones(2, 5, dtype=torch.long)
    if name == "rwkv":  # it knows no padding, and its state takes one row
        mask = mask[:1]
    mask[1:, :2] = 0
    ids = torch.where(mask == 1, IDS[:, :5], 0)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with_state, without = (model.generate(ids, use_cache=u, **options) for u in (True, False))
    torch.testing.assert_close(with_state.scores, without.scores, atol=1e-5, rtol=0)


def test_states_of_unknown_tokens_are_refused_or_need_a_mask():
    model = build("mamba")
    delta = put(model, first=6)
    with torch.no_grad():
        full = model(IDS).last_hidden_state[:, -1:]
        with delta.disabled():
            state = model(IDS[:, :4], use_cache=True).cache_params
        with pytest.raises(SiteError, match="as 'cache_params' may hold: give position_ids, or"):
            model(IDS[:, 4:], cache_params=state)
        out = model(IDS[:, :11], use_cache=True)
        found = model(IDS[:, 11:], cache_params=out.cache_params, attention_mask=IDS > 0)
    torch.testing.assert_close(found.last_hidden_state, full, atol=1e-5, rtol=0)


# --------------------------------------------------------------- modules that do not show the rows
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FLAT = {
    "opt": lambda: T.OPTModel(T.OPTConfig(word_embed_proj_dim=32, ffn_dim=48, **WIDE)),
    "llama4": lambda: T.Llama4TextModel(
        T.Llama4TextConfig(num_local_experts=2, intermediate_size_mlp=48, **HEAD)
    ),
    "qwen2_moe": lambda: T.Qwen2MoeModel(
        T.Qwen2MoeConfig(shared_expert_intermediate_size=16, **EXPERTS, **CAUSAL)
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_where_tokens_of_all_rows_are_in_one_list_the_message_names_the_block(name):
    torch.manual_seed(0)
    model, ids = FLAT[name]().eval(), IDS.view(3, 4)
    delta = put(model, None)
    with pytest.raises(SiteError, match=r"\(12, 32\) for 3 rows of 4 tokens.* the block") as error:
        model(ids)
    pattern = re.search(r"modified_modules=\['(.*)'\], or all", str(error.value))[1]
    delta.detach()
    put(model, [pattern.replace("\\\\", "\\")], name="block")
    together = model(ids).last_hidden_state
    alone = torch.cat([model(row[None]).last_hidden_state for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


LONGER = {
    "longformer": lambda: T.LongformerModel(T.LongformerConfig(attention_window=[8], **WIDE)),
    "funnel": lambda: T.FunnelModel(
        T.FunnelConfig(
            vocab_size=60, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48,
            num_decoder_layers=1,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONGER)
def test_where_blocks_have_another_length_too_the_message_names_none(name):
    model = LONGER[name]().eval()
    delta = put(model, None)
    with pytest.raises(SiteError, match="show the tokens: choose all tokens, first=None and last"):
        model(IDS)
    delta.detach()
    LoReftModel(model, name="all", first=None, last=None)
    model(IDS)


BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


@pytest.mark.parametrize("modules", [None, [r"[r]layers?\.0"]])
@pytest.mark.parametrize(
    "make",
    [
        lambda: T.FSMTModel(T.FSMTConfig(src_vocab_size=60, tgt_vocab_size=60, **BART)),
        lambda: T.XLNetModel(T.XLNetConfig(vocab_size=60, d_model=32, n_layer=1, n_head=4)),
    ],
)
def test_tokens_before_rows_are_refused_by_name_when_attaching(make, modules):
    model = make()
    with untouched(model), pytest.raises(SiteError, match=r"are \[length, batch, width\]"):
        put(model, modules)
    put(model, modules, first=None)


@pytest.mark.parametrize("modules", [["layers.0"], ["layers.0.linear2"]])
def test_torchs_own_blocks_have_tokens_before_rows_unless_told_otherwise(modules):
    for batch_first in (False, True):
        block = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        model = torch.nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        if batch_first:
            put(model, modules)
            continue
        with untouched(model), pytest.raises(SiteError, match=r"are \[length, batch, width\]"):
            put(model, modules)
        put(model, modules, first=None)


@pytest.mark.parametrize("numbers", [[1, 1, 2, 2, 2, 3, 0], [0, 0, 1, 1, 2, 2, 2]])
def test_a_mask_that_numbers_documents_is_refused_without_position_ids(numbers):
    model, mask = build("llama"), torch.tensor([numbers])
    ids = torch.randint(2, 59, (1, 7), generator=torch.Generator().manual_seed(0))
    delta = put(model)
    with pytest.raises(SiteError, match="attention_mask numbers the documents of a row"):
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 0, 1, 2, 0, 1]]))
    model(ids, attention_mask=torch.tensor([[2, 1, 1, 1, 1, 1, 0]]))  # as Longformer's
    delta.detach()
    opendelta.SoftPromptModel(model, soft_token_num=2)
    with pytest.raises(SiteError, match="no place in this mask: attention_mask numbers"):
        model(ids, attention_mask=mask)


T5 = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
BOTH = {
    "mbart": lambda: T.MBartModel(T.MBartConfig(vocab_size=60, **BART)),
    "plbart": lambda: T.PLBartModel(T.PLBartConfig(vocab_size=60, **BART)),
    "blenderbot": lambda: T.BlenderbotModel(T.BlenderbotConfig(vocab_size=60, **BART)),
    "umt5": lambda: T.UMT5Model(T.UMT5Config(**T5)),
}


@pytest.mark.parametrize("length", [12, 4, 7])
@pytest.mark.parametrize("name", BOTH)
def test_position_ids_of_another_length_than_the_tokens_say_nothing_of_them(name, length):
    """They come to both sides of an encoder-decoder, which ignores them."""
    torch.manual_seed(0)
    model = BOTH[name]().eval()
    put(model, None, first=1, last=1)
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    positions = torch.arange(length)[None]
    found = model(position_ids=positions, **batch).last_hidden_state
    torch.testing.assert_close(found, model(**batch).last_hidden_state)


# ------------------------------------------------------------------------------------ recomputation
def gradients(model, delta, calls, thread):
    """The gradients of the delta after the forwards of two batches and one backward."""
    losses = [model(**batch).last_hidden_state.pow(2).sum() for batch in calls]
    worker = threading.Thread(target=sum(losses).backward)
    if thread:
        worker.start()
        worker.join()
    else:
        worker.run()
    return [p.grad.clone() for p in delta.parameters()]


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mistral", "bert"])
def test_checkpointed_blocks_choose_the_same_tokens_again(name, reentrant, thread):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    ids = IDS.expand(2, -1)
    calls = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, :7]}]
    found = []
    for checkpointed in (False, True):
        model = build(name)
        model.get_input_embeddings().weight.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if name == "bert":
            model.config.attention_probs_dropout_prob = 0.0
        for module in model.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        delta = put(model.train(), last=1)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        found.append(gradients(model, delta, calls, thread))
    torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------- routes and graphs
def test_rows_of_a_route_keep_their_own_padding():
    model = build("llama")
    put(model)
    put(model, first=1, name="loreft_1")
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = mask[2, :9] = 0
    batch = {"input_ids": IDS.expand(3, -1), "attention_mask": mask}
    rows = ["loreft", None, "loreft_1"]
    with torch.no_grad():
        with opendelta.route(model, rows):
            found = model(**batch).last_hidden_state
        for index, name in enumerate(rows):
            one = {key: value[index : index + 1] for key, value in batch.items()}
            with opendelta.composition(model).only(*([name] if name else [])):
                alone = model(**one).last_hidden_state
            torch.testing.assert_close(found[index : index + 1], alone, atol=1e-5, rtol=0)


def test_it_compiles_into_one_graph_with_padding():
    model = build("mistral")
    put(model, last=1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    batch = {"input_ids": IDS.expand(2, -1), "attention_mask": mask, "use_cache": False}
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, expected = fast(**batch), model(**batch)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


# ------------------------------------------------------------------------------ beside images
IMAGE = {**WIDE, "image_size": 32, "patch_size": 8}  # 16 patches, and CLIP's class token
TEXT = {**WIDE, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
TOWERS = {
    "clip": (T.CLIPModel, T.CLIPConfig, {"projection_dim": 16}, 17),
    "siglip": (T.SiglipModel, T.SiglipConfig, {}, 16),
    "altclip": (T.AltCLIPModel, T.AltCLIPConfig, {"projection_dim": 16}, 17),
    "chinese_clip": (T.ChineseCLIPModel, T.ChineseCLIPConfig, {"projection_dim": 16}, 17),
}


@pytest.mark.parametrize("length", [9, 0])
@pytest.mark.parametrize("name", TOWERS)
def test_the_padding_of_a_text_is_none_of_an_image(name, length):
    model, config, sizes, tokens = TOWERS[name]
    torch.manual_seed(0)
    text = {**TEXT, "project_dim": 32} if name == "altclip" else TEXT
    model = model(config(text_config=text, vision_config=IMAGE, **sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    ids = torch.randint(3, 60, (2, length or tokens))  # a text may have as many tokens
    mask = torch.ones_like(ids)
    mask[0, 4:], mask[1, 6:] = 0, 0
    plain = model(pixel_values=images, input_ids=ids, attention_mask=mask)
    shake(LoReftModel(model, low_rank_dimension=2, first=2, last=2), scale=1.0)
    both = model(pixel_values=images, input_ids=ids, attention_mask=mask)
    other = model(pixel_values=images, input_ids=ids.flip(0), attention_mask=mask.flip(0))
    alone = model.vision_model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(both.vision_model_output.last_hidden_state, alone)
    torch.testing.assert_close(other.image_embeds, both.image_embeds)
    row = model.text_model(ids[:1, :4], attention_mask=mask[:1, :4]).last_hidden_state
    near = both.text_model_output.last_hidden_state[:1, :4]
    torch.testing.assert_close(near, row, atol=1e-5, rtol=1e-5)
    assert (both.image_embeds - plain.image_embeds).abs().max() > 1e-3


def test_the_queries_of_a_q_former_are_no_tokens_of_the_text():
    sizes = {"vision_config": {**IMAGE, "hidden_size": 32}, "num_query_tokens": 6}
    queries = {**WIDE, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    torch.manual_seed(0)
    config = T.Blip2Config(qformer_config=queries, text_config=CAUSAL | {
        "model_type": "llama", "vocab_size": 60
    }, image_token_index=59, **sizes)  # fmt: skip
    model = T.Blip2ForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 4, 0, 0, 0, 0]])
    ids = torch.cat([torch.full((1, 6), 59), ids], 1)
    mask = (ids != 0).long()
    images = torch.randn(1, 3, 32, 32)
    shake(LoReftModel(model, modified_modules=[r"[r]qformer\.encoder\.layer\.\d$"]), scale=1.0)
    expected = model.get_image_features(images).qformer_outputs.last_hidden_state
    found = model(pixel_values=images, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found.qformer_outputs.last_hidden_state, expected)


def test_first_tokens_of_images_that_are_one_row_are_refused():
    text = {**HEAD, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    torch.manual_seed(0)
    model = T.Qwen2VLModel(T.Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    put(model, [r"[r]visual\.blocks\.0\.mlp\.fc2"])
    pixels, grid = torch.randn(32, 96), torch.tensor([[1, 4, 4]] * 2)
    with pytest.raises(SiteError, match=r"several images or sounds as one row \('grid_thw'\)"):
        model.visual(pixels, grid)
    assert model.visual(pixels[:16], grid[:1]).last_hidden_state.shape[0] == 16
