"""Soft prompts in rows with padding, packed documents and caches: as their tokens written there."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from support.nets import shake, untouched
from transformers.models.clvp.modeling_clvp import ClvpConditioningEncoder
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2Model
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextModel
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextModel
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

import opendelta
from opendelta import LoReftModel, PrefixModel, SiteError, SoftPromptModel
from opendelta._sequences.embedding import SCALES
from opendelta._sequences.layout import SKIPS
from opendelta._texts.arguments import HIDDEN_BY_ID

pytestmark = pytest.mark.covers("SoftPromptModel", "SoftPromptConfig.soft_token_num", "PrefixModel")

PROMPT = [7, 9, 11]
LENGTH = len(PROMPT)
WIDE = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
BYTES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "hidden_size_global": 64,
}  # fmt: skip
GROUPED = {**WIDE, "num_key_value_heads": 2, "eos_token_id": None}
HEAD = {**GROUPED, "head_dim": 8}
ROWS = {  # for each block, of each token
    **HEAD, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0,
}  # fmt: skip
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": None}
T5 = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None,
}  # fmt: skip
BART = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 40, "scale_embedding": True, "init_std": 0.2,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
CLASSES = {
    "marian": (T.MarianMTModel, T.MarianConfig, BART),
    "pegasus": (T.PegasusForConditionalGeneration, T.PegasusConfig, BART),
    "mvp": (T.MvpForConditionalGeneration, T.MvpConfig, BART),
    "blenderbot_small": (
        T.BlenderbotSmallForConditionalGeneration, T.BlenderbotSmallConfig, BART
    ),
    "bart": (T.BartForConditionalGeneration, T.BartConfig, BART),
    "m2m_100": (T.M2M100ForConditionalGeneration, T.M2M100Config, BART),
    "nllb_moe": (T.NllbMoeForConditionalGeneration, T.NllbMoeConfig, {
        **BART, "num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0
    }),
    "fsmt": (T.FSMTForConditionalGeneration, T.FSMTConfig, {
        **BART, "src_vocab_size": 60, "tgt_vocab_size": 60, "langs": ["en", "de"]
    }),
    "trocr": (T.TrOCRForCausalLM, T.TrOCRConfig, {
        **BART, "use_learned_position_embeddings": False
    }),
    "opt": (T.OPTForCausalLM, T.OPTConfig, {
        **WIDE, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 40
    }),
    "falcon_h1": (T.FalconH1ForCausalLM, T.FalconH1Config, {
        **GROUPED, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_state": 4, "embedding_multiplier": 5.0, "mamba_chunk_size": 8,
        "num_hidden_layers": 1,
    }),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, GROUPED),
    "mistral": (T.MistralForCausalLM, T.MistralConfig, {**GROUPED, "sliding_window": 6}),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config, HEAD),
    "gemma3": (T.Gemma3ForCausalLM, T.Gemma3TextConfig, {**HEAD, "sliding_window": 6}),
    "gpt_neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig, {**WIDE, "eos_token_id": None}),
    "gpt2": (T.GPT2LMHeadModel, T.GPT2Config, {**GPT, "n_positions": 32, "pad_token_id": 0}),
    "bloom": (T.BloomForCausalLM, T.BloomConfig, {
        "vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
        "eos_token_id": None,
    }),
    "mamba": (T.MambaForCausalLM, T.MambaConfig, {
        **WIDE, "state_size": 4, "eos_token_id": None
    }),
    "mamba2": (T.Mamba2ForCausalLM, T.Mamba2Config, {
        **WIDE, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8,
        "eos_token_id": None,
    }),
    "falcon_mamba": (T.FalconMambaForCausalLM, T.FalconMambaConfig, {
        **WIDE, "state_size": 4, "eos_token_id": None
    }),
    "rwkv": (T.RwkvForCausalLM, T.RwkvConfig, {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "intermediate_size": 48, "eos_token_id": None, "pad_token_id": 0,
    }),
    "minimax": (T.MiniMaxForCausalLM, T.MiniMaxConfig, {
        **HEAD, "num_local_experts": 2, "num_experts_per_tok": 1
    }),
    "bert": (T.BertForMaskedLM, T.BertConfig, WIDE),
    "roberta": (T.RobertaForMaskedLM, T.RobertaConfig, {**WIDE, "max_position_embeddings": 40}),
    "modernbert": (T.ModernBertForMaskedLM, T.ModernBertConfig, {
        **WIDE, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1,
        "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "hrm": (T.HrmTextForCausalLM, T.HrmTextConfig, {**HEAD, "eos_token_id": None}),
    "jina": (T.JinaEmbeddingsV3Model, T.JinaEmbeddingsV3Config, WIDE),
    "longformer": (T.LongformerModel, T.LongformerConfig, {
        **WIDE, "attention_window": [4, 4], "max_position_embeddings": 40
    }),
    "luke": (T.LukeModel, T.LukeConfig, {
        **WIDE, "max_position_embeddings": 40, "entity_vocab_size": 8, "entity_emb_size": 8
    }),
    "esm": (T.EsmForMaskedLM, T.EsmConfig, {
        **WIDE, "max_position_embeddings": 40, "mask_token_id": 3,
        "position_embedding_type": "rotary",
    }),
    "markuplm": (T.MarkupLMModel, T.MarkupLMConfig, WIDE),
    "gemma3n": (T.Gemma3nForCausalLM, T.Gemma3nTextConfig, {
        **ROWS, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]
    }),
    "gemma4": (T.Gemma4ForCausalLM, T.Gemma4TextConfig, {**ROWS, "global_head_dim": 8}),
    "qwen4": (Qwen4ExpTextModel, Qwen4ExpTextConfig, {
        **HEAD, "layer_types": ["linear_attention", "indexed_attention"], "eos_token_id": 1,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "moe_intermediate_size": 16, "num_experts": 4,
        "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2, "hc_count": 2,
        "hc_lowrank": 4, "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "ple_layer_ids": [1],
        "make_ngram_vocab_size_divisible_by": 2, "split_ngram_parts": 1, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 1,
    }),
    "csm": (T.CsmDepthDecoderModel, T.CsmDepthDecoderConfig, {
        **HEAD, "backbone_hidden_size": 32, "num_codebooks": 12
    }),
    "higgs": (HiggsAudioV2Model, T.HiggsAudioV2Config, {
        **HEAD, "num_codebooks": 2, "codebook_size": 10, "audio_token_id": 58,
        "audio_delay_token_id": 59,
    }),
    "clvp": (ClvpConditioningEncoder, T.ClvpConfig, {
        "text_config": {"vocab_size": 60, "hidden_size": 32}, "decoder_config": {
            "hidden_size": 32, "num_attention_heads": 4, "num_mel_attn_blocks": 1,
            "feature_size": 16, "vocab_size": 60,
        },
    }),
    "blt": (T.BltForCausalLM, T.BltConfig, {
        "vocab_size": 60, "encoder_config": BYTES, "decoder_config": BYTES,
        "global_config": {**BYTES, "hidden_size": 64}, "patcher_config": BYTES,
        "encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 50,
    }),
    "phi4": (T.Phi4MultimodalForCausalLM, T.Phi4MultimodalConfig, {
        **GROUPED, "intermediate_size": 256, "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_token_id": 58,
        }, "audio_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4,
            "audio_token_id": 59, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
        },
    }),
    "kosmos2": (Kosmos2TextModel, Kosmos2TextConfig, {
        "vocab_size": 60, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4,
        "max_position_embeddings": 64, "init_std": 0.2,
    }),
    "idefics": (T.IdeficsForVisionText2Text, T.IdeficsConfig, {
        **WIDE, "cross_layer_interval": 1, "use_resampler": False, "additional_vocab_size": 0,
        "alpha_initializer": "ones", "vision_config": {
            "embed_dim": 32, "image_size": 32, "patch_size": 8, "intermediate_size": 32,
            "num_attention_heads": 2, "num_hidden_layers": 1,
        },
    }),
    "layoutlm": (T.LayoutLMModel, T.LayoutLMConfig, WIDE),
    "ernie": (T.ErnieModel, T.ErnieConfig, {**WIDE, "use_task_id": True}),
    "funnel": (T.FunnelModel, T.FunnelConfig, {
        "vocab_size": 60, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8,
        "d_inner": 48, "num_decoder_layers": 1,
    }),
    "xlm": (T.XLMModel, T.XLMConfig, {
        "vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 3,
        "max_position_embeddings": 40,
    }),
    "flaubert": (T.FlaubertModel, T.FlaubertConfig, {
        "vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40
    }),
    "t5gemma": (T5GemmaEncoder, T5GemmaModuleConfig, {
        **HEAD, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
        "dropout_rate": 0.0,
    }),
    "xlnet": (T.XLNetModel, T.XLNetConfig, {
        "vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48
    }),
    "reformer": (T.ReformerModel, T.ReformerConfig, {
        "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8,
        "feed_forward_size": 48, "attn_layers": ["local"], "local_attn_chunk_length": 4,
        "axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 16], "is_decoder": True,
        "pad_token_id": 0, "eos_token_id": None,
    }),
    "bigbird": (T.BigBirdModel, T.BigBirdConfig, {
        **WIDE, "block_size": 2, "num_random_blocks": 1
    }),
    "double": (T.GPT2DoubleHeadsModel, T.GPT2Config, {**GPT, "num_labels": 1}),
    "canine": (T.CanineModel, T.CanineConfig, {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48,
    }),
    "layoutlmv3": (T.LayoutLMv3Model, T.LayoutLMv3Config, {
        **WIDE, "coordinate_size": 4, "shape_size": 8, "max_position_embeddings": 40,
        "visual_embed": False,
    }),
    "moshi": (T.MoshiForCausalLM, T.MoshiConfig, {
        **HEAD, "num_key_value_heads": 4, "ffn_dim": 48, "max_position_embeddings": 40
    }),
    "fuyu": (T.FuyuForCausalLM, T.FuyuConfig, {
        "text_config": {**WIDE, "vocab_size": 70, "max_position_embeddings": 40}, "image_size": 16,
        "patch_size": 8, "image_token_id": 69, "pad_token_id": 0, "eos_token_id": None,
    }),
    "exaone4_5": (T.Exaone4_5_ForConditionalGeneration, T.Exaone4_5_Config, {
        "text_config": {**GROUPED, "vocab_size": 70, "sliding_window": 6, "model_type": "exaone4"},
        "vision_config": {
            "depth": 1, "hidden_size": 16, "num_heads": 2, "num_key_value_heads": 2,
            "out_hidden_size": 32, "intermediate_size": 16,
        },
        "image_token_id": 68, "video_token_id": 69,
    }),
    "deepseek_v4": (T.DeepseekV4ForCausalLM, T.DeepseekV4Config, {
        **HEAD, "moe_intermediate_size": 16, "q_lora_rank": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8,
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
    }),
    "t5": (T.T5ForConditionalGeneration, T.T5Config, T5),
    "led": (T.LEDModel, T.LEDConfig, {
        "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "attention_window": [4, 4], "max_encoder_position_embeddings": 40,
        "pad_token_id": 0,
    }),
}  # fmt: skip
IDS = torch.randint(12, 60, (2, 8), generator=torch.Generator().manual_seed(0))
WRITTEN = torch.cat([torch.tensor([PROMPT, PROMPT]), IDS], 1)


def build(name, **options):
    model, config, sizes = CLASSES[name]
    torch.manual_seed(0)
    return model(config(**{**sizes, **options})).eval()


def put(model, **options):
    options = {"soft_token_num": LENGTH, "token_init": PROMPT, "dtype": "float32", **options}
    return SoftPromptModel(model, **options)


def run(model, ids, **batch):
    """The logits, or the hidden states."""
    out = model(ids, **batch)
    return out.last_hidden_state if "last_hidden_state" in out else out[0]


def near(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def same_gradients(delta, *outputs):
    """The prompt gets the same gradient from each of the outputs."""
    one, other = (torch.autograd.grad(o.pow(2).sum(), delta.parameters()) for o in outputs)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------ padding
WITHOUT_POSITIONS = ["llama", "mistral", "gemma3", "gpt_neox", "bloom", "mamba", "mamba2"]
WITHOUT_POSITIONS += ["falcon_mamba", "minimax", "roberta", "longformer", "luke", "modernbert"]
WITHOUT_POSITIONS += ["xlnet"]
WITH_POSITIONS = ["llama", "mistral", "gemma3", "qwen3", "gpt_neox", "gpt2", "bert", "esm"]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    ("name", "positions"),
    [*((n, False) for n in WITHOUT_POSITIONS), *((n, True) for n in WITH_POSITIONS)],
)
def test_a_padded_row_is_as_the_row_alone(name, positions, left):
    model = build(name)
    delta = put(model)
    mask = torch.ones_like(IDS)
    tokens = slice(3, None) if left else slice(5)
    mask[1] = 0
    mask[1, tokens] = 1
    batch = {"attention_mask": mask}
    if positions:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = torch.where(mask == 1, IDS, pad)
    together, alone = run(model, ids, **batch)[1, tokens], run(model, IDS[1:, tokens])[0]
    near(together, alone)
    # training: the same gradient reaches the prompt from the padded row as from the row alone
    one, other = (
        torch.autograd.grad(o.pow(2).sum(), delta.parameters()) for o in (together, alone)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("left", [True, False])
def test_a_decoder_attends_to_the_prompt_of_a_padded_encoder_row(left):
    model = build("t5")
    put(model)
    mask = torch.ones_like(IDS)
    tokens = slice(3, None) if left else slice(5)
    mask[1] = 0
    mask[1, tokens] = 1
    decoder = {"decoder_input_ids": IDS[:, :4]}
    together = model(torch.where(mask == 1, IDS, 0), attention_mask=mask, **decoder).logits
    near(together[1:], model(IDS[1:, tokens], decoder_input_ids=IDS[1:, :4]).logits)


def prefix(model, **options):
    options = {"prefix_token_num": 2, "mid_dim": 4, "embed_dim": 4, "dtype": "backbone", **options}
    return shake(PrefixModel(model, **options), scale=1.0)


TURNED = [
    "llama", "mistral", "gemma3", "gpt_neox", "modernbert", "esm", "opt", "t5", "moshi", "fuyu",
    "exaone4_5",
]  # fmt: skip


@pytest.mark.parametrize("deltas", [[prefix], [prefix, put], [put, prefix]])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")  # Exaone's images
@pytest.mark.parametrize("name", TURNED)
def test_a_prefix_acts_on_a_padded_row_as_on_the_row_alone(name, left, deltas):
    model = build(name).double()
    for delta in deltas:
        delta(model)
    mask = torch.ones_like(IDS)
    tokens = slice(3, None) if left else slice(5)
    mask[1] = 0
    mask[1, tokens] = 1
    decoder = [{}, {}]
    if name == "t5":
        decoder = [{"decoder_input_ids": ids[:, :4]} for ids in (IDS, IDS[1:])]
    ids = torch.where(mask == 1, IDS, getattr(model.config, "pad_token_id", None) or 0)
    together = run(model, ids, attention_mask=mask, **decoder[0])[1]
    alone = run(model, IDS[1:, tokens], **decoder[1])[0]
    near(together if name == "t5" else together[tokens], alone)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox", "moshi", "fuyu"])
def test_a_prefix_acts_on_padded_rows_after_a_cache_as_without(name):
    model = build(name).double()
    prefix(model)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    cache = model(IDS[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    then = model(IDS[:, 6:], attention_mask=mask, past_key_values=cache).logits
    near(then[1], model(IDS[1:, 3:]).logits[0, -2:])


def test_a_prefix_refuses_a_mask_that_does_not_show_the_padding():
    model = build("llama").double()
    prefix(model)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    seen = mask[:, None, None].bool() & torch.ones(8, 8).tril().bool()
    with pytest.raises(SiteError, match="the mask that 'model' is given does not show which tok"):
        model(IDS, attention_mask=seen)
    together = model(IDS, attention_mask=seen, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    near(together.logits[1, 3:], model(IDS[1:, 3:]).logits[0])


def test_a_prefix_refuses_a_mask_for_other_keys_than_there_are():
    model = build("minimax", layer_types=["linear_attention", "full_attention"])
    prefix(model)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3}
    with pytest.raises(SiteError, match="MiniMaxAttention: its mask is for 1 keys, and it has 9"):
        model.generate(IDS, **options)
    model.generate(IDS, use_cache=False, **options)


IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def loreft(model):
    return shake(LoReftModel(model, first=1, last=2, dtype="backbone"), scale=1.0)


def prefix_in_text(model):
    return prefix(model, modified_modules=[r"[r]language_model.*self_attn$"])


def loreft_in_text(model):
    blocks = [r"[r]language_model\.layers\.\d+$"]
    return shake(LoReftModel(model, modified_modules=blocks, first=1, last=1), scale=1.0)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("delta", [prefix_in_text, loreft_in_text])
def test_padding_is_heard_of_through_a_model_that_makes_masks_of_its_own(delta, left, positions):
    torch.manual_seed(0)
    config = T.Gemma3Config(text_config=HEAD, vision_config=IMAGES, mm_tokens_per_image=4)
    model = T.Gemma3ForConditionalGeneration(config).eval().double()
    delta(model)
    mask = torch.ones_like(IDS)
    tokens = slice(3, None) if left else slice(5)
    mask[1] = 0
    mask[1, tokens] = 1
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    together = model(IDS, attention_mask=mask, **more).logits[1, tokens]
    near(together, model(IDS[1:, tokens]).logits[0])


@pytest.mark.parametrize(
    ("name", "left", "delta"),
    [  # XLM counts its tokens from the left
        *((name, False, delta) for name in ("xlm", "flaubert") for delta in (put, loreft)),
        *(("t5gemma", left, delta) for left in (True, False) for delta in (put, prefix, loreft)),
    ],
)
def test_padding_that_a_model_finds_by_ids_alone_is_as_with_a_mask(name, left, delta):
    model = build(name).double()
    pad = getattr(model.config, "pad_token_id", 0)
    tokens = slice(3, None) if left else slice(5)
    mask = torch.zeros_like(IDS)
    mask[0], mask[1, tokens] = 1, 1
    ids = torch.where(mask == 1, IDS, pad)
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left and delta is put else {}
    shown = {"attention_mask": mask, **more}
    near(run(model, ids, **more)[mask == 1], run(model, ids, **shown)[mask == 1])
    delta(model)
    alone = run(model, IDS[1:, tokens])[0]
    near(run(model, ids, **more)[1, tokens], alone)
    near(run(model, ids, **shown)[1, tokens], alone)


def test_all_classes_that_find_padding_by_ids_alone_are_known():
    """T5Gemma's decoder does so in training alone, where later tokens are not seen anyway."""
    finds = re.compile(r"make_default_2d_attention_mask|input_ids (!=|==) .*pad\w*(id|index|idx)")
    found = {
        cls.name
        for cls, call in forwards()
        if "ModuleList(" in ast.unparse(cls) and finds.search(ast.unparse(call))
    }
    assert found == {*HIDDEN_BY_ID, "T5GemmaDecoder"}


# ------------------------------------------------------------------------- scales and numberings
SCALED = ["marian", "pegasus", "mvp", "blenderbot_small", "fsmt", "m2m_100", "bart", "falcon_h1"]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", SCALED)
def test_embeddings_are_scaled_as_the_model_scales_them(name, given):
    model = build(name).double()
    decoder = {} if name == "falcon_h1" else {"decoder_input_ids": IDS[:, :4]}
    masks = [{"attention_mask": torch.ones_like(ids)} if given else {} for ids in (WRITTEN, IDS)]
    expected = model(WRITTEN, **decoder, **masks[0]).logits
    put(model, dtype="backbone")
    found = model(IDS, **decoder, **masks[1]).logits
    near(found, expected if decoder else expected[:, LENGTH:])


def test_all_classes_that_scale_token_ids_alone_are_known():
    scaled = re.compile(r"\(input_ids\) \* self\.(\w+)")
    both = re.compile(r"inputs_embeds \* self\.")
    found = set()
    for file in Path(T.__file__).parent.glob("models/*/modeling_*.py"):
        for body in re.split(r"^class ", file.read_text(), flags=re.MULTILINE):
            takes = re.search(r"inputs_embeds(: |=None)", body)
            if takes and scaled.search(body) and not both.search(body):
                found.add((body.partition("(")[0], scaled.search(body)[1]))
    assert found == set(SCALES.items())


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["fsmt", "m2m_100", "nllb_moe", "trocr"])
def test_positions_are_numbered_by_the_tokens_that_are_no_padding(name, left):
    model = build(name)
    model.get_input_embeddings().weight.data[1] = 1.0  # FSMT takes zeros for padding
    put(model)
    mask = torch.ones_like(IDS)
    tokens = slice(3, None) if left else slice(5)
    mask[1] = 0
    mask[1, tokens] = 1
    decoder = {} if name == "trocr" else {"decoder_input_ids": IDS[:, :4]}
    together = model(torch.where(mask == 1, IDS, 1), attention_mask=mask, **decoder).logits[1]
    row = {"decoder_input_ids": IDS[1:, :4]} if decoder else {}
    near(together if decoder else together[tokens], model(IDS[1:, tokens], **row).logits[0])


# ------------------------------------------------------------------- more of token ids than rows
PADDING = torch.cat([torch.zeros(2, LENGTH, dtype=torch.long), IDS], 1)


def of_rows(name):
    """A model whose blocks get rows by token ids, and the output where the prompt has padding's."""
    model = build(name).double()
    text = model.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rows = text.get_per_layer_inputs(PADDING)
    written = model(inputs_embeds=text.embed_tokens(WRITTEN), per_layer_inputs=rows).logits
    assert (written - model(WRITTEN).logits).abs().max() > 1e-3
    return model, written[:, LENGTH:]


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_blocks_get_the_rows_of_tokens_by_their_ids_and_of_padding_for_the_prompt(name):
    model, expected = of_rows(name)
    delta = put(model, dtype="backbone")
    near(model(IDS).logits, expected)
    text = model.model
    given = {"inputs_embeds": text.embed_tokens(IDS)}
    near(model(**given, per_layer_inputs=text.get_per_layer_inputs(IDS)).logits, expected)
    SoftPromptModel(model, soft_token_num=1, token_init=[20], name="other", dtype="backbone")
    shake(delta)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    padded = model(torch.where(mask == 1, IDS, 0), attention_mask=mask).logits[1, 3:]
    near(padded, model(IDS[1:, 3:]).logits[0])
    options = {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    scores = [model.generate(IDS, use_cache=use, **options).scores for use in (True, False)]
    near(*scores)


def test_embeddings_alone_have_the_rows_that_the_model_gives_them():
    model = build("gemma3n")
    embeds = model.get_input_embeddings()
    expected = model(inputs_embeds=embeds(WRITTEN)).logits[:, LENGTH:]
    put(model)
    near(model(inputs_embeds=embeds(IDS)).logits, expected)
    model = build("gemma4")  # it finds the ids of embeddings, and a trained prompt has none
    shake(put(model))
    near(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, model(IDS).logits)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "absolute"])
@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize(
    "option", [{}, {"token_dropout": True}, {"emb_layer_norm_before": True}], ids=str
)
def test_what_esm_does_to_token_ids_alone_it_does_behind_a_prompt(
    option, pad, positions, padded, two
):
    sizes = {"position_embedding_type": positions, "pad_token_id": pad, "mask_token_id": 3}
    model = build("esm", **sizes, **option).double()
    ids = IDS.clone()
    ids[:, 2] = ids[1, 5] = 3
    if padded:
        ids[1, 6:] = pad
    written = torch.cat([WRITTEN[:, :LENGTH], ids], 1)
    expected = model(written, attention_mask=(written != pad).long()).logits[:, LENGTH:]
    if two:
        for name, part in (("a", PROMPT[:1]), ("b", PROMPT[1:])):
            put(model, soft_token_num=len(part), token_init=part, name=name, dtype="backbone")
    else:
        put(model, dtype="backbone")
    seen = ids != pad
    near(model(ids, attention_mask=seen.long()).logits[seen], expected[seen])


@functools.cache
def classes():
    """The syntax of all of transformers' classes of models that have a forward, and of that."""
    files = Path(T.__file__).parent.glob("models/*/modeling_*.py")
    found = [part for file in files for part in ast.parse(file.read_text()).body]
    return [
        (part, call)
        for part in found
        if isinstance(part, ast.ClassDef)
        for call in part.body
        if isinstance(call, ast.FunctionDef) and call.name == "forward"
    ]


def forwards():
    """Those that take token ids or embeddings."""
    for part, call in classes():
        if {"input_ids", "inputs_embeds"} <= {a.arg for a in call.args.args}:
            yield part, call


def test_all_classes_that_skip_a_child_where_embeddings_are_given_are_known():
    skips = re.compile(
        r"if inputs_embeds is None:\s+inputs_embeds = self\.(\w+)\(input_ids=([^)]*)\)"
    )
    found = {}
    for cls, call in forwards():
        for name, more in skips.findall(ast.unparse(call)):
            if "inputs_embeds" not in more:
                found[cls.name] = name
    assert found == SKIPS


PLACES = {  # positions, padding and shapes
    "make_default_2d_attention_mask()", "self._pad_to_window_size()", "torch.numel()",
    "create_position_ids_from_input_ids()", "self.create_position_ids_from_input_ids()",
    "position_ids.unsqueeze(0).expand_as()", "input_ids != self.pad_index",
}  # fmt: skip
BY_IDS = {
    "rows for each block": {"Gemma3nTextModel"},
    "handed on": {"EsmEmbeddings"},
    "refused when attaching": {
        "CanineEmbeddings", "ClvpConditioningEncoder", "CsmDepthDecoderModel", "DeepseekV4Model",
    },
    "images and audio refused": {
        "Phi4MultimodalFeatureEmbedding", "Phi4MultimodalAudioEmbedding",
        "Phi4MultimodalImageEmbedding",
    },
    "outside what embeds the text": {
        "EmbeddingGemma2Model", "EvollaSaProtEmbeddings", "Gemma3nMultimodalEmbedder",
    },
    "of no use": {"Glm5NextTextModel"},
}  # fmt: skip


def uses(cls, call):
    """What a forward does with token ids beside embedding them, without the embeddings' help."""
    own = {part.name for part in cls.body if isinstance(part, ast.FunctionDef)}
    for node in ast.walk(call):
        text = ast.unparse(node)
        if isinstance(node, ast.Compare | ast.BinOp) and " is " not in text:
            if re.search(r"\binput_ids (?!is\b)|[=+*%-] input_ids$", text):
                yield text
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            child = name.startswith("self.") and name.split(".")[1] not in own
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            names = {part.id for part in given if isinstance(part, ast.Name)}
            if not child and "input_ids" in names and "inputs_embeds" not in names:
                yield f"{name}()"


def test_all_classes_that_use_token_ids_beside_embedding_them_are_known():
    """That is: those that hold blocks or embeddings. Others hand the tokens to such classes."""
    found = {
        cls.name
        for cls, call in forwards()
        if "ModuleList(" in ast.unparse(cls) or "Embed" in cls.name
        if set(uses(cls, call)) - PLACES
    }
    assert found == set().union(*BY_IDS.values())


DEEP = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24,
    "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "num_position_embeddings": 16, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("deep", [[0], []])
@pytest.mark.parametrize("length", [1, 2])
def test_what_images_add_to_deeper_blocks_is_theirs_behind_a_prompt(length, deep):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = T.Qwen3VLConfig(
        text_config={**HEAD, "rope_parameters": rope}, image_token_id=59,
        vision_config={**DEEP, "deepstack_visual_indexes": deep}, vision_start_token_id=57,
        vision_end_token_id=58,
    )  # fmt: skip
    model = T.Qwen3VLForConditionalGeneration(config).eval()
    images = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}

    def logits(ids):
        more = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 59).long()}
        return model(input_ids=ids, **images, **more).logits

    ids = torch.tensor([[5] * length + [59] * 4] * 2)
    written = logits(torch.cat([torch.tensor([PROMPT] * 2), ids], 1))[:, LENGTH:]
    put(model)
    near(logits(ids), written)


# -------------------------------------------------------------------------------------- two prompts
OTHER = [20, 21]
TWO = ["llama", "mistral", "gpt_neox", "gpt2", "bloom", "mamba", "m2m_100", "bart", "t5"]


@pytest.mark.parametrize("off", [None, "a", "b"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", TWO)
def test_two_prompts_of_padded_rows_with_a_cache_are_as_their_tokens_written(name, beams, off):
    model = build(name)
    if name != "bloom":  # its mask overflows in float64
        model = model.double()
    prompts = {"a": PROMPT, "b": OTHER}
    deltas = {
        key: SoftPromptModel(
            model, soft_token_num=len(ids), token_init=ids, name=key, dtype="backbone"
        )
        for key, ids in prompts.items()
    }
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "use_cache": True}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    mask = torch.ones_like(IDS)
    left = name != "bart"  # its positions count padding
    tokens = slice(3, None) if left else slice(5)
    mask[1] = 0
    mask[1, tokens] = 1
    ids = torch.where(mask == 1, IDS, model.config.pad_token_id or 0)
    acting = [key for key in prompts if key != off]
    with opendelta.composition(model).only(*acting):
        found = model.generate(ids, attention_mask=mask, **options)
        with opendelta.route(model, [acting, acting], repeats=beams):
            routed = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(routed.sequences, found.sequences)
    written = [token for key in acting for token in prompts[key]]
    for row, part in enumerate((slice(None), tokens)):
        one = torch.cat([torch.tensor([written]), IDS[row : row + 1, part]], 1)
        with deltas["a"].disabled(), deltas["b"].disabled():
            alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        for new, old in zip(found.scores, alone.scores, strict=True):
            near(new[row * beams], old[0])
        assert torch.equal(found.sequences[row, -4:], alone.sequences[0, -4:])


# ------------------------------------------------------------------------------------------ packing
PACKING = ["llama", "qwen3", "mistral", "gpt_neox"]  # these part packed documents by themselves
SIZES = (3, 5)
POSITIONS = torch.tensor([[*range(3), *range(5)]])


def packed(model, **options):
    """The gradients' source: logits of two documents in one row."""
    use = {} if model.config.model_type == "bert" else {"use_cache": False}
    return run(model, IDS[:1], position_ids=POSITIONS, **use, **options)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", PACKING)
def test_a_packed_document_is_as_the_document_alone(name, train):
    model = build(name).train(train)
    delta = put(model)
    together = packed(model)
    alone = torch.cat([run(model, doc) for doc in IDS[:1].split(SIZES, 1)], 1)
    near(together, alone)
    one, other = (
        torch.autograd.grad(o.pow(2).sum(), delta.parameters()) for o in (together, alone)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", [*PACKING, "bert", "roberta", "gpt2", "modernbert"])
def test_each_document_has_its_prompt_written_before_it(name, cache):
    model = build(name)
    first, second = IDS[:1].split(SIZES, 1)
    prompt = torch.tensor([PROMPT])
    written = torch.cat([prompt, first, prompt, second], 1)
    positions = torch.tensor([[*range(6), *range(8)]])
    options = {"use_cache": cache} if name in DECODERS else {}
    expected = run(model, written, position_ids=positions, **options)
    put(model)
    found = run(model, IDS[:1], position_ids=POSITIONS, **options)
    near(found, torch.cat([expected[:, 3:6], expected[:, 9:]], 1))


DECODERS = [*PACKING, "gpt2"]


@pytest.mark.parametrize("name", [*PACKING, "bert"])
def test_rows_may_have_other_numbers_of_documents(name):
    model = build(name)
    put(model)
    options = {"use_cache": False} if name in DECODERS else {}
    positions = torch.cat([POSITIONS, torch.arange(8)[None]])
    together = run(model, IDS, position_ids=positions, **options)
    near(together[:1], packed(model))
    near(together[1:], run(model, IDS[1:]))


def test_rows_of_other_numbers_are_refused_where_the_end_of_a_row_would_be_seen():
    model = build("layoutlm")
    put(model)
    positions = torch.cat([POSITIONS, torch.arange(8)[None]])
    with pytest.raises(SiteError, match="one call of LayoutLMModel must pack the same number"):
        model(IDS, position_ids=positions)


def test_loreft_sees_the_prompt_as_the_first_tokens_in_whatever_order():
    places = []
    for order in ([put, None], [None, put]):
        model = build("llama", num_hidden_layers=1)
        reft = None
        for step in order:
            if step is put:
                put(model)
            else:
                reft = LoReftModel(
                    model, modified_modules=[r"[r]layers\.0"], first=LENGTH + 1, last=1
                )
                shake(reft, scale=1.0)
        new = packed(model)
        with reft.disabled():
            old = packed(model)
        places.append(((new - old).abs().amax(-1) > 1e-5)[0].nonzero().flatten().tolist())
    assert places == [[0, 2, 3, 7]] * 2


# ------------------------------------------------------------------------------------------- caches
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name", ["mamba", "mamba2", "falcon_mamba", "rwkv", "minimax", "bloom", "mistral", "gemma3"]
)
def test_a_cache_or_state_changes_nothing(name, padded):
    model = build(name)
    put(model)
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :3] = 0
    if name == "rwkv":  # it knows no padding, and its state takes one row
        mask = mask[:1]
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
    options |= {"attention_mask": mask, "return_dict_in_generate": True}
    ids = torch.where(mask == 1, IDS[: len(mask)], 0)
    scores = [model.generate(ids, use_cache=use, **options).scores for use in (True, False)]
    near(*scores)


@pytest.mark.parametrize("prompt_first", [True, False])
@pytest.mark.parametrize("name", ["rwkv", "mamba", "llama"])
def test_the_last_tokens_behind_a_prompt_are_no_padding(name, prompt_first):
    """RWKV's own mask goes no further than its outermost module."""
    model = build(name)
    blocks = [r"[r](layers|blocks)\.\d+$"]
    steps = [put, lambda to: shake(LoReftModel(to, modified_modules=blocks, first=0, last=1))]
    for step in steps if prompt_first else steps[::-1]:
        step(model)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    with torch.no_grad():
        alone = model(IDS[1:, :5]).logits
        near([model(IDS, attention_mask=mask).logits[1:, :5]], [alone])


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_static_cache_is_refused(name):
    model = build(name)
    put(model)
    options = {"max_new_tokens": 2, "cache_implementation": "static", "disable_compile": True}
    with pytest.raises(SiteError, match="the static cache of "):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)


def test_a_cache_that_holds_something_else_is_refused():
    model = build("llama")
    put(model)
    cache = model(IDS, use_cache=True).past_key_values
    assert cache.get_seq_length() == 8 + LENGTH
    mask = torch.ones(2, 9 + LENGTH, dtype=torch.long)
    with pytest.raises(SiteError, match=r"holds 11 positions, and the mask has 12 columns"):
        model(IDS[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba"])
def test_a_row_that_begins_when_the_cache_holds_its_padding_is_refused(name, positions):
    model = build(name)
    put(model)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    more = [{"position_ids": p} for p in (places[:, :3], places[:, 3:])] if positions else [{}, {}]
    if name == "bloom":
        more = [{}, {}]
    out = model(IDS[:, :3], attention_mask=mask[:, :3], use_cache=True, **more[0])
    held = "cache_params" if name == "mamba" else "past_key_values"
    with pytest.raises(SiteError, match="row 1 begins after 3 columns of padding that the cache"):
        model(IDS[:, 3:], attention_mask=mask, **{held: out[held]}, **more[1])
    if name == "llama":
        with pytest.raises(SiteError, match="row 1 begins after 3 columns"):
            model.generate(IDS, attention_mask=mask, prefill_chunk_size=3, max_new_tokens=2)
        model.generate(IDS, attention_mask=mask, prefill_chunk_size=6, max_new_tokens=2)


@pytest.mark.parametrize("new", [0, 2, 5])
def test_a_cache_of_generate_is_refused_by_another_generate(new):
    model = build("llama")
    put(model)
    out = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, IDS[:, :new]], 1)
    with pytest.raises(SiteError, match=r"the position ids begin at \d+, and the cache holds 11 t"):
        model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=2)


# ------------------------------------------------------------------------ values for each token
def first_again(value):
    """`value` as if the prompt were written, with the values of the first token."""
    return torch.cat([value[:, :1].expand(-1, LENGTH, *value.shape[2:]), value], 1)


BOXES = torch.tensor([1, 2, 3, 4]) + torch.arange(8)[None, :, None].expand(2, -1, 4)
SOME = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0]]).expand(2, -1)
WIDENED = [
    ("longformer", "global_attention_mask", SOME),
    ("longformer", "attention_mask", torch.ones_like(IDS)),
    ("layoutlm", "bbox", BOXES),
    ("ernie", "task_type_ids", SOME),
    ("ernie", "token_type_ids", SOME),
    ("funnel", "token_type_ids", SOME),
    ("xlm", "langs", SOME),
    ("roberta", "position_ids", torch.arange(8)[None]),
]


@pytest.mark.parametrize(("name", "argument", "value"), WIDENED)
def test_values_for_each_token_are_widened(name, argument, value):
    model = build(name)
    is_position = argument == "position_ids"
    written = torch.arange(8 + LENGTH)[None] if is_position else first_again(value)
    expected = run(model, WRITTEN, **{argument: written})
    if argument != "attention_mask":
        assert not torch.allclose(expected, run(model, WRITTEN), atol=1e-3)
    put(model)
    near(run(model, IDS, **{argument: value}), expected[:, LENGTH:])


@pytest.mark.parametrize(
    "name",
    [
        "longformer",
        "funnel",
        "layoutlm",
        "ernie",
        "esm",
        "markuplm",
        "reformer",
        "bigbird",
        "xlnet",
    ],
)
def test_without_such_values_it_is_as_its_tokens(name):
    model = build(name)
    expected = run(model, WRITTEN)
    put(model)
    near(run(model, IDS), expected[:, LENGTH:])


def test_an_output_may_be_a_named_tuple():
    model = build("reformer")
    expected = run(model, torch.cat([WRITTEN, IDS[:, :1]], 1))
    put(model)
    near(run(model, torch.cat([IDS, IDS[:, :1]], 1)), expected[:, LENGTH:])


def test_an_output_whose_positions_are_not_the_rows_is_refused():
    model = build("bigbird")
    put(model)
    with pytest.raises(SiteError, match="an output of 18 positions for 17 of prompt and tokens"):
        model(IDS.repeat(1, 2)[:, :14])  # it pads to whole blocks, and then pools
    run(model, IDS.repeat(1, 2)[:, :15])
    torch.manual_seed(0)
    model = T.VisualBertModel(T.VisualBertConfig(visual_embedding_dim=4, **WIDE)).eval()
    put(model)
    with pytest.raises(SiteError, match="an output of 13 positions for 11 of prompt and tokens"):
        model(IDS, visual_embeds=torch.zeros(2, 2, 4))


@pytest.mark.parametrize("given", [False, True])
def test_global_attention_in_an_encoder_decoder(given):
    model = build("led")
    batch = {"decoder_input_ids": IDS[:, :4]}
    both = [{}, {}]
    if given:
        both = [{"global_attention_mask": mask} for mask in (first_again(SOME), SOME)]
    expected = model(WRITTEN, **batch, **both[0]).last_hidden_state
    put(model)
    near(model(IDS, **batch, **both[1]).last_hidden_state, expected)


def test_labels_of_rows_are_no_values_of_tokens():
    torch.manual_seed(0)
    model = T.BertForSequenceClassification(T.BertConfig(**WIDE)).eval()
    put(model)
    ids, labels = IDS.repeat(4, 1), torch.arange(8) % 2
    out = model(ids, labels=labels)
    near(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


REFUSED = [
    ("xlnet", {"perm_mask": torch.zeros(2, 8, 8)}, "XLNetModel is given 'perm_mask', which"),
    ("xlnet", {"input_mask": torch.zeros(2, 8)}, "XLNetModel is given 'input_mask', which"),
    ("xlm", {"lengths": torch.tensor([8, 8])}, "XLMModel is given 'lengths', which says"),
    ("llama", {"cross_attention_mask": torch.ones(2, 8, 1, 1)}, "given 'cross_attention_mask', wh"),
    ("markuplm", {"xpath_tags_seq": torch.zeros(2, 8, 50)}, "given 'xpath_tags_seq', which says"),
    ("llama", {"cu_seq_lens_q": torch.tensor([0, 8])}, "LlamaModel is given 'cu_seq_lens_q'"),
    ("luke", {"entity_position_ids": torch.zeros(2, 1, 2)}, "given 'entity_position_ids', which"),
]


@pytest.mark.parametrize(("name", "batch", "message"), REFUSED)
def test_what_cannot_be_widened_is_refused_by_name(name, batch, message):
    model = build(name)
    put(model)
    with pytest.raises(SiteError, match=message):
        model(IDS, **batch)


def test_ids_of_several_choices_and_models_without_an_embedding_are_refused():
    model = build("double")
    put(model)
    with pytest.raises(SiteError, match=r"GPT2Model must be \[batch, length\], and are \(2, 2, 4"):
        model(IDS.view(2, 2, 4))
    model = build("canine")
    with untouched(model), pytest.raises(SiteError, match="CanineModel has no one embedding of"):
        put(model)
    model = build("layoutlmv3")
    with untouched(model), pytest.raises(SiteError, match="LayoutLMv3Model asks for token ids, an"):
        put(model)
    model = build("deepseek_v4")
    with untouched(model), pytest.raises(SiteError, match=r"token ids, and .*DeepseekV4HashRouter"):
        put(model)
    model = build("layoutlmv3", has_relative_attention_bias=False)
    put(model)
    run(model, IDS)


ASKING = {
    "csm": "the root: CsmDepthDecoderModel asks for token ids.* embeds them by their positions",
    "clvp": "the root: ClvpConditioningEncoder asks for token ids.* puts other tokens around",
    "higgs": "the root: HiggsAudioV2Model asks for token ids.* tells audio from text by them",
    "blt": "'model.local_encoder': BltLocalEncoder asks for token ids.* works on patches of them",
    "qwen4": "token ids, and .* Qwen4ExpTextPLELayer inside it",
}


@pytest.mark.parametrize("name", ASKING)
def test_models_that_make_more_of_token_ids_are_refused_when_attaching(name):
    model = build(name)
    with untouched(model), pytest.raises(SiteError, match=ASKING[name]):
        put(model)


MUSICGEN = {
    "text_encoder": {"model_type": "t5", "vocab_size": 60, "d_model": 16, "d_ff": 24, "d_kv": 8,
                     "num_layers": 1, "num_heads": 2},
    "audio_encoder": {"model_type": "encodec", "num_filters": 4, "hidden_size": 8,
                      "codebook_size": 32, "codebook_dim": 8, "upsampling_ratios": [2, 2],
                      "target_bandwidths": [1.5], "num_lstm_layers": 1, "sampling_rate": 32},
    "decoder": {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 48,
                "num_attention_heads": 4, "num_codebooks": 2, "pad_token_id": 20},
}  # fmt: skip
TOWER = {"hidden_size": 64, "num_hidden_layers": 2}
AROUND = {  # (model, config, its options, why it is refused)
    "musicgen": (T.MusicgenForConditionalGeneration, T.MusicgenConfig, MUSICGEN,
                 "'text_encoder.encoder' .* it multiplies the encoder's output by the mask"),
    "musicgen_melody": (T.MusicgenMelodyForConditionalGeneration, T.MusicgenMelodyConfig, MUSICGEN,
                        "'text_encoder.encoder' .* it multiplies the encoder's output by the mask"),
    "bridgetower": (T.BridgeTowerModel, T.BridgeTowerConfig, {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vision_config": {
            **TOWER, "patch_size": 8, "image_size": 16,
        }, "text_config": {**TOWER, "num_attention_heads": 2, "vocab_size": 60},
    }, "'text_model' .* it runs the blocks of its text model, and never that model"),
    "tipsv2": (T.Tipsv2TextModel, T.Tipsv2TextConfig, {**WIDE, "max_position_embeddings": 40},
               "the root .* it multiplies the blocks' output by the mask of the prompt and the to"),
    "lxmert": (T.LxmertModel, T.LxmertConfig, {
        "vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
        "l_layers": 1, "x_layers": 1, "r_layers": 1,
    }, "the root .* it returns the tokens' hidden states in tuples beside those of images"),
    "prophetnet": (T.ProphetNetForCausalLM, T.ProphetNetConfig, {
        "vocab_size": 60, "hidden_size": 16, "decoder_ffn_dim": 24, "num_decoder_layers": 1,
        "num_decoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_encoder_layers": 1,
        "num_encoder_attention_heads": 2,
    }, "'prophetnet.decoder' .* it returns several streams, which its head cuts by the number"),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_models_that_have_no_place_for_a_prompt_are_refused_when_attaching(name):
    cls, config, options, why = AROUND[name]
    model = cls(config(**options))
    with untouched(model), pytest.raises(SiteError, match=f"a soft prompt in {why}"):
        put(model)


def test_an_embedding_of_unknown_width_says_what_to_do():
    model = T.MusicgenForCausalLM(T.MusicgenDecoderConfig(**MUSICGEN["decoder"]))
    said = "'embed_tokens' has no known width; choose another module .* or .* such as PrefixModel"
    with untouched(model), pytest.raises(SiteError, match=said):
        put(model)


def test_all_classes_that_have_no_place_for_a_prompt_are_known():
    pieces = re.compile(r"in self\.(text_model|language_model|text_encoder)\.encoder\.")
    multiplied = re.compile(r"hidden_states \* \w*attention_mask")
    pooled = re.compile(r"hidden_states? \* \w*mask\b")
    found = set()
    for part, call in classes():
        text = ast.unparse(call)
        by_mask = "encoder_outputs" in text and multiplied.search(text)
        embeds = "inputs_embeds" in {a.arg for a in call.args.args}
        after = embeds and "create_" in text and pooled.search(text)
        if by_mask or after or pieces.search(text):
            found.add(part.name)
    assert found == {cls.__name__ for cls, *_ in AROUND.values()} - {
        "LxmertModel", "ProphetNetForCausalLM",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_head_around_a_model_that_takes_token_ids_alone_is_refused_when_attaching(kind):
    cls = getattr(T, f"EsmcFor{kind}")
    model = cls(T.EsmcConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, head_dim=8,
                             num_attention_heads=2, intermediate_size=24))  # fmt: skip
    why = rf"{cls.__name__} takes no embeddings .* no argument of 'esmc' \(EsmcModel\)"
    with untouched(model), pytest.raises(SiteError, match=why):
        put(model)


def test_without_what_asks_for_token_ids_they_take_a_prompt():
    for name, option in (("qwen4", "ple_layer_ids"), ("gemma4", "hidden_size_per_layer_input")):
        model = build(name, **{option: [] if name == "qwen4" else 0})
        expected = run(model, WRITTEN)[:, LENGTH:]
        put(model)
        near(run(model, IDS), expected)


@pytest.mark.parametrize("name", ["image_pixel_values", "audio_input_features"])
def test_what_is_put_among_the_tokens_by_their_ids_is_refused(name):
    model = build("phi4")
    expected = run(model, WRITTEN)[:, LENGTH:]
    put(model)
    near(run(model, IDS), expected)
    with pytest.raises(SiteError, match=f"Phi4MultimodalModel is given '{name}', and finds its pl"):
        model(IDS, **{name: torch.zeros(2, 1, 3, 8, 8)})


def test_masks_of_the_places_of_images_are_widened():
    mask = torch.zeros(2, 8, dtype=torch.long)
    mask[:, 2:4] = 1
    images = {"image_embeds": torch.ones(2, 2, 32)}
    model = build("kosmos2")
    wide = torch.cat([torch.zeros(2, LENGTH, dtype=torch.long), mask], 1)
    expected = run(model, WRITTEN, image_embeds_position_mask=wide, **images)[:, LENGTH:]
    put(model)
    near(run(model, IDS, image_embeds_position_mask=mask, **images), expected)
    seen, images = mask[..., None], {"pixel_values": torch.ones(2, 1, 3, 32, 32)}
    model = build("idefics")
    expected = run(model, WRITTEN, image_attention_mask=first_again(seen), **images)[:, LENGTH:]
    put(model)
    near(run(model, IDS, image_attention_mask=seen, **images), expected)


@pytest.mark.parametrize("size", [4, 8, 5])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_position_ids_that_an_encoder_decoder_ignores_are_ignored(name, size):
    model = build(name)
    put(model)
    batch = {"decoder_input_ids": IDS[:, :4]}
    positions = torch.arange(size).expand(2, -1)
    near(model(IDS, position_ids=positions, **batch).logits, model(IDS, **batch).logits)


@pytest.mark.parametrize(
    ("name", "option", "size", "needed"),
    [
        ("gpt2", "n_positions", 10, 11),
        ("bert", "max_position_embeddings", 10, 11),
        ("roberta", "max_position_embeddings", 11, 12),  # its first position is 1
    ],
)
def test_a_table_of_positions_that_is_too_short_is_said_with_the_numbers(
    name, option, size, needed
):
    model = build(name, **{option: size})
    put(model)
    message = f"prompt of 3 and 8 tokens need {needed} positions, and the model's table has {size}"
    with pytest.raises(SiteError, match=message):
        model(IDS)
    run(model, IDS[:, :7])


def test_a_pooler_beside_the_blocks_sees_the_tokens_alone():
    model = build("jina")
    states = model(WRITTEN).last_hidden_state[:, LENGTH:]
    pooled = model.pooler(states)
    put(model, soft_token_num=2, token_init=PROMPT[:2], name="a")
    put(model, soft_token_num=LENGTH - 2, token_init=PROMPT[2:], name="b")
    out = model(IDS)
    near(out.last_hidden_state, states)
    near(out.pooler_output, pooled)


def test_a_pooler_that_is_given_one_position_is_refused_by_name():
    class Pools(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(60, 8)
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
            self.pooler = torch.nn.Linear(8, 8)

        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
            h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
            h = self.layers[0](h)
            return h, self.pooler(h[:, 0])

    model = Pools()
    delta = put(model)
    with pytest.raises(SiteError, match=r"a pooler is given \[2, 8\], .* give strip=False"):
        model(IDS)
    delta.detach()
    put(model, strip=False)
    assert model(IDS)[0].shape == (2, LENGTH + 8, 8)


class MeanOf(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(8, 8)

    def forward(self, h, mask):
        return self.dense((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Masks(torch.nn.Module):
    """A pooler of its own beside the blocks, which is given a mask of `axes`, too."""

    def __init__(self, axes):
        super().__init__()
        self.embedding, self.axes = torch.nn.Embedding(60, 8), axes
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.pooler = MeanOf()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        h = self.layers[0](h)
        mask = attention_mask if self.axes == 2 else attention_mask[:, None, None]
        return h, self.pooler(h, mask)


def test_a_pooler_that_takes_the_mask_too_is_given_that_of_the_tokens():
    torch.manual_seed(0)
    model, mask = Masks(2), torch.ones(IDS.shape)
    mask[0, -2:] = mask[1, :1] = 0
    expected = model(IDS, attention_mask=mask)
    put(model)
    near(model(IDS, attention_mask=mask)[1], expected[1])
    model.axes = 4
    with pytest.raises(SiteError, match=r"a pooler is given \[2, 1, 1, \d+\], which does not show"):
        model(IDS, attention_mask=mask)


@pytest.mark.parametrize("use_cache", [False, True])
def test_two_stacks_of_blocks_both_see_the_prompt(use_cache):
    model = build("hrm")
    expected = run(model, WRITTEN)[:, LENGTH:]
    written = model.generate(WRITTEN, max_new_tokens=4, use_cache=use_cache, do_sample=False)
    put(model)
    near(run(model, IDS), expected)
    tokens = model.generate(IDS, max_new_tokens=4, use_cache=use_cache, do_sample=False)
    assert torch.equal(tokens[:, IDS.size(1) :], written[:, WRITTEN.size(1) :])


@pytest.mark.parametrize(
    ("name", "cls"), [("xlm", T.XLMWithLMHeadModel), ("flaubert", T.FlaubertWithLMHeadModel)]
)
def test_a_model_that_finds_padding_by_ids_does_so_where_generate_passes_a_cache(name, cls):
    torch.manual_seed(0)
    model = cls(build(name).config).eval()
    ids = IDS.clone()
    ids[0, -3:] = model.config.pad_index
    put(model)
    given = {"attention_mask": ids != model.config.pad_index, "max_new_tokens": 2}
    given |= {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    cached, not_cached = (model.generate(ids, use_cache=c, **given).logits for c in (True, False))
    near(torch.stack(cached), torch.stack(not_cached))


@pytest.mark.parametrize("shape", [(2, 8), (1, 8), (8,)])
def test_values_of_tokens_for_all_rows_at_once_are_refused_too(shape):
    class Weighs(T.GPT2Model):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, weights=None):
            embeds = super().forward(input_ids, None, attention_mask, inputs_embeds=inputs_embeds)
            embeds = embeds[0]
            return embeds if weights is None else embeds * weights.view(-1, 8, 1)

    torch.manual_seed(0)
    model = Weighs(T.GPT2Config(**CLASSES["gpt2"][2])).eval()
    put(model)
    with pytest.raises(SiteError, match="Weighs is given 'weights', which says something of each"):
        model(IDS, weights=torch.ones(shape))


def test_the_cache_of_reformer_is_refused():
    config = T.ReformerConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=4, attention_head_size=8,
        feed_forward_size=48, attn_layers=["local"], local_attn_chunk_length=4, is_decoder=True,
        axial_pos_embds=False, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.ReformerModelWithLMHead(config).eval()
    put(model)
    with pytest.raises(SiteError, match=r"holds whole chunks, .* generate\(use_cache=False\)"):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert model.generate(IDS, max_new_tokens=3, use_cache=False).shape == (2, 11)


def test_a_table_of_the_positions_of_images_is_no_limit():
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 48, "image_size": 16, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    model = T.GitModel(T.GitConfig(vision_config=vision, **WIDE, bos_token_id=1, eos_token_id=2))
    model.eval()
    expected = run(model, WRITTEN)[:, LENGTH:]
    put(model)
    near(run(model, IDS), expected)
