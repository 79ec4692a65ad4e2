"""The role of each module of one block of each tower, for many architectures.

Written from the modelling code of transformers 5.23, not from what opendelta finds. A module of a
block that is not listed has no role.
"""

# Attention and feed-forwards that several architectures share.
QKVO = "q_proj: q, k_proj: k, v_proj: v, o_proj: proj"
QKV_OUT = "q_proj: q, k_proj: k, v_proj: v, out_proj: proj"
SELF = "self.query: q, self.key: k, self.value: v, output.dense: proj"
GATED = "gate_proj: gate, up_proj: w1, down_proj: w2"
FUSED_GATE = "gate_up_proj: gate_up, down_proj: w2"
FC = "fc1: w1, fc2: w2"
MOE = "gate: router, experts: experts"
MLA = "q_a_proj: q, q_b_proj: q, kv_a_proj_with_mqa: kv, kv_b_proj: kv, o_proj: proj"

# Blocks: {sublayer: {module around: what its modules do}}.
LLAMA = {
    "attn": {"self_attn": QKVO, "": "input_layernorm: layer_norm"},
    "ff": {"mlp": GATED, "": "post_attention_layernorm: layer_norm"},
}
MIXTRAL = {"attn": LLAMA["attn"], "ff": {"mlp": MOE, "": "post_attention_layernorm: layer_norm"}}
SHARED_EXPERT = {
    "attn": LLAMA["attn"],
    "ff": {"mlp": MOE, "mlp.shared_expert": GATED, "": "post_attention_layernorm: layer_norm"},
}
POST_NORM = {  # norms after attention and after the feed-forward, none before
    "attn": {"self_attn": QKVO, "": "post_attention_layernorm: layer_norm"},
    "ff": {"mlp": GATED, "": "post_feedforward_layernorm: layer_norm"},
}
SANDWICH = {
    "attn": {
        "self_attn": QKVO,
        "": "input_layernorm: layer_norm, post_attention_layernorm: layer_norm",
    },
    "ff": {
        "mlp": GATED,
        "": "pre_feedforward_layernorm: layer_norm, post_feedforward_layernorm: layer_norm",
    },
}
BERT = {
    "attn": {"attention": f"{SELF}, output.LayerNorm: layer_norm"},
    "ff": {"": "intermediate.dense: w1, output.dense: w2, output.LayerNorm: layer_norm"},
}
BART = {
    "attn": {"self_attn": QKV_OUT, "": "self_attn_layer_norm: layer_norm"},
    "ff": {"": f"{FC}, final_layer_norm: layer_norm"},
}
BART_DECODER = BART | {
    "cross_attn": {"encoder_attn": QKV_OUT, "": "encoder_attn_layer_norm: layer_norm"}
}
GPT2 = {
    "attn": {"attn": "c_attn: qkv, c_proj: proj", "": "ln_1: layer_norm"},
    "ff": {"mlp": "c_fc: w1, c_proj: w2", "": "ln_2: layer_norm"},
}
T5_ATTENTION = "q: q, k: k, v: v, o: proj"
VIT = {
    "attn": {"attention": QKVO, "": "layernorm_before: layer_norm"},
    "ff": {"mlp": FC, "": "layernorm_after: layer_norm"},
}
CLIP = {
    "attn": {"self_attn": QKV_OUT, "": "layer_norm1: layer_norm"},
    "ff": {"mlp": FC, "": "layer_norm2: layer_norm"},
}
WAV2VEC2 = {
    "attn": {"attention": QKV_OUT, "": "layer_norm: layer_norm"},
    "ff": {
        "feed_forward": "intermediate_dense: w1, output_dense: w2",
        "": "final_layer_norm: layer_norm",
    },
}
BLOOM = {
    "attn": {
        "self_attention": "query_key_value: qkv, dense: proj",
        "": "input_layernorm: layer_norm",
    },
    "ff": {"mlp": "dense_h_to_4h: w1, dense_4h_to_h: w2"},
}
DELTA_NET = {"mixer": {"linear_attn": "in_proj_qkvz: in, in_proj_ba: in, out_proj: out"}}


def t5(ff, decoder=False):
    """A block of T5 or one of its kind, whose feed-forward is `ff`."""
    last = 2 if decoder else 1
    block = {
        "attn": {"layer.0": "layer_norm: layer_norm", "layer.0.SelfAttention": T5_ATTENTION},
        "ff": {f"layer.{last}": "layer_norm: layer_norm", f"layer.{last}.DenseReluDense": ff},
    }
    cross = {"layer.1": "layer_norm: layer_norm", "layer.1.EncDecAttention": T5_ATTENTION}
    return block | ({"cross_attn": cross} if decoder else {})


def causal(cls, block, blocks="model.layers.0", **more):
    """An architecture with `embed_tokens` and a head beside its blocks."""
    towers = {blocks: block} if block is not None else {}
    return {
        "class": cls,
        "blocks": towers | more,
        "embeddings": ["model.embed_tokens"],
        "heads": ["lm_head"],
    }


def encoder(cls, name, block, head, where="encoder.layer.0"):
    """An architecture like BERT."""
    return {
        "class": cls,
        "blocks": {f"{name}.{where}": block},
        "embeddings": [f"{name}.embeddings.word_embeddings"],
        "heads": [head],
    }


def tower(cls, blocks, embeddings=(), heads=()):
    """An architecture of one or more towers."""
    return {
        "class": cls,
        "blocks": blocks,
        "embeddings": list(embeddings),
        "heads": list(heads),
    }


QFORMER_ATTENTION = (
    "attention.query: q, attention.key: k, attention.value: v, output.dense: proj, "
    "output.LayerNorm: layer_norm"
)
QFORMER = {
    "attn": {"attention": QFORMER_ATTENTION},
    "ff": {
        "": "intermediate_query.dense: w1, output_query.dense: w2, "
        "output_query.LayerNorm: layer_norm"
    },
}
DETR = {
    "attn": {"self_attn": QKVO, "": "self_attn_layer_norm: layer_norm"},
    "ff": {"mlp": FC, "": "final_layer_norm: layer_norm"},
}
UMT5_FF = "wi_0: gate, wi_1: w1, wo: w2"
T5_NAMES = ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]
BART_NAMES = ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"]
BART_BLOCKS = {"model.encoder.layers.0": BART, "model.decoder.layers.0": BART_DECODER}

TRUTH = {
    # ---------------------------------------------------------------------------- encoders
    "bert": encoder("BertForMaskedLM", "bert", BERT, "cls.predictions.decoder"),
    "roberta": encoder("RobertaForMaskedLM", "roberta", BERT, "lm_head.decoder"),
    "electra": tower(
        "ElectraForMaskedLM",
        {"electra.encoder.layer.0": BERT},
        ["electra.embeddings.word_embeddings"],
        ["generator_lm_head"],
    ),
    "deberta": encoder(
        "DebertaForMaskedLM",
        "deberta",
        BERT
        | {
            "attn": {
                "attention": "self.in_proj: qkv, output.dense: proj, output.LayerNorm: layer_norm"
            }
        },
        "cls.predictions.decoder",
    ),
    "deberta-v2": encoder(
        "DebertaV2ForMaskedLM",
        "deberta",
        BERT
        | {
            "attn": {
                "attention": "self.query_proj: q, self.key_proj: k, self.value_proj: v, "
                "output.dense: proj, output.LayerNorm: layer_norm"
            }
        },
        "cls.predictions.decoder",
    ),
    "albert": tower(
        "AlbertForMaskedLM",
        {
            "albert.encoder.albert_layer_groups.0.albert_layers.0": {
                "attn": {
                    "attention": "query: q, key: k, value: v, dense: proj, LayerNorm: layer_norm"
                },
                "ff": {"": "ffn: w1, ffn_output: w2, full_layer_layer_norm: layer_norm"},
            }
        },
        ["albert.embeddings.word_embeddings"],
        ["predictions.decoder"],
    ),
    "distilbert": tower(
        "DistilBertForMaskedLM",
        {
            "distilbert.transformer.layer.0": {
                "attn": {
                    "attention": "q_lin: q, k_lin: k, v_lin: v, out_lin: proj",
                    "": "sa_layer_norm: layer_norm",
                },
                "ff": {"ffn": "lin1: w1, lin2: w2", "": "output_layer_norm: layer_norm"},
            }
        },
        ["distilbert.embeddings.word_embeddings"],
        ["vocab_projector"],
    ),
    "mpnet": encoder(
        "MPNetForMaskedLM",
        "mpnet",
        BERT
        | {
            "attn": {
                "attention": "attn.q: q, attn.k: k, attn.v: v, attn.o: proj, LayerNorm: layer_norm"
            }
        },
        "lm_head.decoder",
    ),
    "esm": tower(
        "EsmForMaskedLM",
        {
            "esm.encoder.layer.0": {
                "attn": {"attention": f"{SELF}, LayerNorm: layer_norm"},
                "ff": {"": "intermediate.dense: w1, output.dense: w2, LayerNorm: layer_norm"},
            }
        },
        ["esm.embeddings.word_embeddings"],
        ["lm_head.decoder"],
    )
    | {"config": {"vocab_size": 33, "pad_token_id": 1}},
    "convbert": tower("ConvBertModel", {"encoder.layer.0": BERT}, ["embeddings.word_embeddings"]),
    "layoutlm": encoder("LayoutLMForMaskedLM", "layoutlm", BERT, "cls.predictions.decoder"),
    "luke": tower(
        "LukeModel",
        {
            "encoder.layer.0": BERT
            | {
                "attn": {
                    "attention": f"{SELF}, self.w2e_query: q, self.e2w_query: q, "
                    "self.e2e_query: q, output.LayerNorm: layer_norm"
                }
            }
        },
        ["embeddings.word_embeddings"],
    ),
    "longformer": tower(
        "LongformerModel",
        {
            "encoder.layer.0": BERT
            | {
                "attn": {
                    "attention": f"{SELF}, self.query_global: q, self.key_global: k, "
                    "self.value_global: v, output.LayerNorm: layer_norm"
                }
            }
        },
        ["embeddings.word_embeddings"],
    ),
    "lilt": tower(
        "LiltModel",
        {
            "encoder.layer.0": {
                "attn": {
                    "attention": f"{SELF}, self.layout_query: q, self.layout_key: k, "
                    "self.layout_value: v, output.LayerNorm: layer_norm, "
                    "layout_output.dense: proj, layout_output.LayerNorm: layer_norm"
                },
                "ff": {
                    "": "intermediate.dense: w1, output.dense: w2, output.LayerNorm: layer_norm, "
                    "layout_intermediate.dense: w1, layout_output.dense: w2, "
                    "layout_output.LayerNorm: layer_norm"
                },
            }
        },
        ["embeddings.word_embeddings"],
    ),
    "big_bird": tower("BigBirdModel", {"encoder.layer.0": BERT}, ["embeddings.word_embeddings"]),
    "xlnet": tower(
        "XLNetLMHeadModel",
        {
            "transformer.layer.0": {
                "attn": {"rel_attn": "layer_norm: layer_norm"},
                "ff": {"ff": "layer_1: w1, layer_2: w2, layer_norm: layer_norm"},
            }
        },
        ["transformer.word_embedding"],
        ["lm_loss"],
    ),
    "xlm": tower(
        "XLMModel",
        {
            "attentions.0": {"attn": {"": "q_lin: q, k_lin: k, v_lin: v, out_lin: proj"}},
            "layer_norm1.0": {"attn": {"": "*: layer_norm"}},
            "ffns.0": {"ff": {"": "lin1: w1, lin2: w2"}},
            "layer_norm2.0": {"ff": {"": "*: layer_norm"}},
        },
        ["embeddings"],
    ),
    "modernbert": tower(
        "ModernBertForMaskedLM",
        {
            "model.layers.1": {
                "attn": {"attn": "Wqkv: qkv, Wo: proj", "": "attn_norm: layer_norm"},
                "ff": {"mlp": "Wi: gate_up, Wo: w2", "": "mlp_norm: layer_norm"},
            }
        },
        ["model.embeddings.tok_embeddings"],
        ["decoder"],
    ),
    "fnet": tower(
        "FNetModel",
        {"encoder.layer.0": {"ff": BERT["ff"]}},
        ["embeddings.word_embeddings"],
    ),
    # ---------------------------------------------------------------------- encoder-decoders
    "t5": tower(
        "T5ForConditionalGeneration",
        {
            "encoder.block.0": t5("wi: w1, wo: w2"),
            "decoder.block.0": t5("wi: w1, wo: w2", decoder=True),
        },
        T5_NAMES,
        ["lm_head"],
    ),
    "mt5": tower(
        "MT5ForConditionalGeneration",
        {"encoder.block.0": t5(UMT5_FF), "decoder.block.0": t5(UMT5_FF, decoder=True)},
        T5_NAMES,
        ["lm_head"],
    ),
    "umt5": tower(
        "UMT5ForConditionalGeneration",
        {"encoder.block.0": t5(UMT5_FF), "decoder.block.0": t5(UMT5_FF, decoder=True)},
        T5_NAMES,
        ["lm_head"],
    ),
    "bart": tower("BartForConditionalGeneration", BART_BLOCKS, BART_NAMES, ["lm_head"]),
    "mbart": tower("MBartForConditionalGeneration", BART_BLOCKS, BART_NAMES, ["lm_head"]),
    "marian": tower("MarianMTModel", BART_BLOCKS, BART_NAMES, ["lm_head"]),
    "pegasus": tower("PegasusForConditionalGeneration", BART_BLOCKS, BART_NAMES, ["lm_head"]),
    "whisper": tower(
        "WhisperForConditionalGeneration",
        BART_BLOCKS,
        ["model.decoder.embed_tokens"],
        ["proj_out"],
    ),
    # ------------------------------------------------------------------------------ decoders
    "gpt2": tower("GPT2LMHeadModel", {"transformer.h.0": GPT2}, ["transformer.wte"], ["lm_head"]),
    "gpt_bigcode": tower(
        "GPTBigCodeForCausalLM", {"transformer.h.0": GPT2}, ["transformer.wte"], ["lm_head"]
    ),
    "gpt_neo": tower(
        "GPTNeoForCausalLM",
        {
            "transformer.h.0": {
                "attn": {"attn.attention": QKV_OUT, "": "ln_1: layer_norm"},
                "ff": GPT2["ff"],
            }
        },
        ["transformer.wte"],
        ["lm_head"],
    ),
    "gptj": tower(
        "GPTJForCausalLM",
        {
            "transformer.h.0": {
                "attn": {"attn": QKV_OUT, "": "ln_1: layer_norm"},
                "ff": {"mlp": "fc_in: w1, fc_out: w2"},
            }
        },
        ["transformer.wte"],
        ["lm_head"],
    ),
    "codegen": tower(
        "CodeGenForCausalLM",
        {
            "transformer.h.0": {
                "attn": {"attn": "qkv_proj: qkv, out_proj: proj", "": "ln_1: layer_norm"},
                "ff": {"mlp": "fc_in: w1, fc_out: w2"},
            }
        },
        ["transformer.wte"],
        ["lm_head"],
    ),
    "gpt_neox": tower(
        "GPTNeoXForCausalLM",
        {
            "gpt_neox.layers.0": {
                "attn": {
                    "attention": "query_key_value: qkv, dense: proj",
                    "": "input_layernorm: layer_norm",
                },
                "ff": BLOOM["ff"] | {"": "post_attention_layernorm: layer_norm"},
            }
        },
        ["gpt_neox.embed_in"],
        ["lm_head"],
    ),
    "bloom": tower(
        "BloomForCausalLM",
        {
            "transformer.h.0": BLOOM
            | {"ff": BLOOM["ff"] | {"": "post_attention_layernorm: layer_norm"}}
        },
        ["transformer.word_embeddings"],
        ["lm_head"],
    ),
    "falcon": tower(
        "FalconForCausalLM",
        {"transformer.h.0": BLOOM},
        ["transformer.word_embeddings"],
        ["lm_head"],
    ),
    "opt": tower(
        "OPTForCausalLM",
        {"model.decoder.layers.0": BART},
        ["model.decoder.embed_tokens"],
        ["lm_head"],
    ),
    "mpt": tower(
        "MptForCausalLM",
        {
            "transformer.blocks.0": {
                "attn": {"attn": "Wqkv: qkv, out_proj: proj", "": "norm_1: layer_norm"},
                "ff": {"ffn": "up_proj: w1, down_proj: w2", "": "norm_2: layer_norm"},
            }
        },
        ["transformer.wte"],
        ["lm_head"],
    ),
    "ctrl": tower(
        "CTRLLMHeadModel",
        {
            "transformer.h.0": {
                "attn": {
                    "multi_head_attention": "Wq: q, Wk: k, Wv: v, dense: proj",
                    "": "layernorm1: layer_norm",
                },
                "ff": {"ffn": "0: w1, 2: w2", "": "layernorm2: layer_norm"},
            }
        },
        ["transformer.w"],
        ["lm_head"],
    ),
    "llama": causal("LlamaForCausalLM", LLAMA),
    "mistral": causal("MistralForCausalLM", LLAMA),
    "qwen2": causal("Qwen2ForCausalLM", LLAMA),
    "qwen3": causal("Qwen3ForCausalLM", LLAMA),
    "gemma": causal("GemmaForCausalLM", LLAMA),
    "gemma2": causal("Gemma2ForCausalLM", SANDWICH),
    "gemma3_text": causal("Gemma3ForCausalLM", SANDWICH),
    "olmo": causal("OlmoForCausalLM", LLAMA),
    "olmo2": causal("Olmo2ForCausalLM", POST_NORM),
    "exaone4": causal("Exaone4ForCausalLM", POST_NORM),
    "granite": causal("GraniteForCausalLM", LLAMA),
    "stablelm": causal("StableLmForCausalLM", LLAMA),
    "cohere": causal("CohereForCausalLM", LLAMA | {"ff": {"mlp": GATED}}),
    "phi": causal(
        "PhiForCausalLM",
        {
            "attn": {
                "self_attn": "q_proj: q, k_proj: k, v_proj: v, dense: proj",
                "": "input_layernorm: layer_norm",
            },
            "ff": {"mlp": FC},
        },
    ),
    "phi3": causal(
        "Phi3ForCausalLM",
        {
            "attn": {
                "self_attn": "qkv_proj: qkv, o_proj: proj",
                "": "input_layernorm: layer_norm",
            },
            "ff": {"mlp": FUSED_GATE, "": "post_attention_layernorm: layer_norm"},
        },
    ),
    "glm": causal(
        "GlmForCausalLM",
        LLAMA | {"ff": {"mlp": FUSED_GATE, "": "post_attention_layernorm: layer_norm"}},
    ),
    "glm4": causal(
        "Glm4ForCausalLM",
        {
            "attn": {
                "self_attn": QKVO,
                "": "input_layernorm: layer_norm, post_self_attn_layernorm: layer_norm",
            },
            "ff": {
                "mlp": FUSED_GATE,
                "": "post_attention_layernorm: layer_norm, post_mlp_layernorm: layer_norm",
            },
        },
    ),
    "starcoder2": causal(
        "Starcoder2ForCausalLM",
        LLAMA | {"ff": {"mlp": "c_fc: w1, c_proj: w2", "": "post_attention_layernorm: layer_norm"}},
    ),
    "persimmon": causal(
        "PersimmonForCausalLM",
        {
            "attn": {
                "self_attn": "query_key_value: qkv, dense: proj",
                "": "input_layernorm: layer_norm",
            },
            "ff": BLOOM["ff"] | {"": "post_attention_layernorm: layer_norm"},
        },
    ),
    "nemotron": causal(
        "NemotronForCausalLM",
        LLAMA
        | {
            "ff": {
                "mlp": "up_proj: w1, down_proj: w2",
                "": "post_attention_layernorm: layer_norm",
            }
        },
    )
    | {"config": {"num_key_value_heads": 8}},
    # ---------------------------------------------------------------------------- mixtures
    "mixtral": causal("MixtralForCausalLM", MIXTRAL),
    "qwen2_moe": causal("Qwen2MoeForCausalLM", SHARED_EXPERT),
    "qwen3_moe": causal("Qwen3MoeForCausalLM", MIXTRAL),
    "granitemoe": causal(
        "GraniteMoeForCausalLM",
        {
            "attn": LLAMA["attn"],
            "ff": {
                "block_sparse_moe": "router: router, experts: experts",
                "": "post_attention_layernorm: layer_norm",
            },
        },
    ),
    "gpt_oss": causal(
        "GptOssForCausalLM",
        {
            "attn": LLAMA["attn"],
            "ff": {
                "mlp": "router: router, experts: experts",
                "": "post_attention_layernorm: layer_norm",
            },
        },
    ),
    "llama4_text": causal(
        "Llama4ForCausalLM",
        {
            "attn": LLAMA["attn"],
            "ff": {
                "feed_forward": "router: router, experts: experts",
                "feed_forward.shared_expert": GATED,
                "": "post_attention_layernorm: layer_norm",
            },
        },
    ),
    "deepseek_v2": causal(
        "DeepseekV2ForCausalLM",
        {
            "attn": {"self_attn": MLA, "": "input_layernorm: layer_norm"},
            "ff": LLAMA["ff"],
        },
        **{
            "model.layers.1": {
                "attn": {"self_attn": MLA, "": "input_layernorm: layer_norm"},
                "ff": {
                    "mlp": MOE,
                    "mlp.shared_experts": GATED,
                    "": "post_attention_layernorm: layer_norm",
                },
            }
        },
    )
    | {"config": {"first_k_dense_replace": 1}},
    "deepseek_v3": causal(
        "DeepseekV3ForCausalLM",
        {
            "attn": {"self_attn": MLA, "": "input_layernorm: layer_norm"},
            "ff": LLAMA["ff"],
        },
        **{
            "model.layers.3": {
                "attn": {"self_attn": MLA, "": "input_layernorm: layer_norm"},
                "ff": {
                    "mlp": MOE,
                    "mlp.shared_experts": GATED,
                    "": "post_attention_layernorm: layer_norm",
                },
            }
        },
    ),
    # ------------------------------------------------------------------------------ mixers
    "mamba": tower(
        "MambaForCausalLM",
        {"backbone.layers.0": {"mixer": {"mixer": "in_proj: in, out_proj: out"}}},
        ["backbone.embeddings"],
        ["lm_head"],
    ),
    "mamba2": tower(
        "Mamba2ForCausalLM",
        {"backbone.layers.0": {"mixer": {"mixer": "in_proj: in, out_proj: out"}}},
        ["backbone.embeddings"],
        ["lm_head"],
    ),
    "jamba": causal(
        "JambaForCausalLM",
        None,
        **{
            "model.layers.0": {
                "mixer": {"mamba": "in_proj: in, out_proj: out"},
                "ff": {"feed_forward": GATED, "": "pre_ff_layernorm: layer_norm"},
            },
            "model.layers.1": {
                "mixer": {"mamba": "in_proj: in, out_proj: out"},
                "ff": {
                    "feed_forward": "router: router, experts: experts",
                    "": "pre_ff_layernorm: layer_norm",
                },
            },
            "model.layers.4": {
                "attn": LLAMA["attn"],
                "ff": {"feed_forward": GATED, "": "pre_ff_layernorm: layer_norm"},
            },
        },
    ),
    "falcon_h1": causal(
        "FalconH1ForCausalLM",
        {
            "attn": LLAMA["attn"],
            "mixer": {"mamba": "in_proj: in, out_proj: out"},
            "ff": {"feed_forward": GATED, "": "pre_ff_layernorm: layer_norm"},
        },
    ),
    "qwen3_next": causal(
        "Qwen3NextForCausalLM",
        DELTA_NET | {"ff": SHARED_EXPERT["ff"]},
        **{"model.layers.3": SHARED_EXPERT},
    ),
    "recurrent_gemma": causal(
        "RecurrentGemmaForCausalLM",
        {
            "mixer": {"temporal_block": "linear_y: in, linear_x: in, linear_out: out"},
            "ff": {"mlp_block": GATED, "": "channel_pre_norm: layer_norm"},
        },
        **{
            "model.layers.2": {
                "attn": {"temporal_block": QKVO, "": "temporal_pre_norm: layer_norm"},
                "ff": {"mlp_block": GATED, "": "channel_pre_norm: layer_norm"},
            }
        },
    ),
    "rwkv": tower(
        "RwkvForCausalLM",
        {
            "rwkv.blocks.1": {
                "mixer": {"attention": "key: in, value: in, receptance: in, output: out"},
                "ff": {
                    "feed_forward": "key: w1, value: w2, receptance: gate",
                    "": "ln2: layer_norm",
                },
            }
        },
        ["rwkv.embeddings"],
        ["head"],
    ),
    # --------------------------------------------------------------- images, sound, and several
    "vit": tower("ViTModel", {"layers.0": VIT}),
    "deit": tower("DeiTModel", {"layers.0": VIT}),
    "beit": tower("BeitModel", {"layers.0": VIT}),
    "swin": tower("SwinModel", {"encoder.layers.0.blocks.0": VIT}),
    "dinov2": tower(
        "Dinov2Model",
        {
            "encoder.layer.0": {
                "attn": {"attention": QKVO, "": "norm1: layer_norm"},
                "ff": {"mlp": FC, "": "norm2: layer_norm"},
            }
        },
    ),
    "segformer": tower(
        "SegformerModel",
        {
            "stages.0.blocks.0": VIT,
        },
    ),
    "clip": tower(
        "CLIPModel",
        {"text_model.encoder.layers.0": CLIP, "vision_model.encoder.layers.0": CLIP},
        ["text_model.embeddings.token_embedding"],
    ),
    "siglip": tower(
        "SiglipModel",
        {"text_model.encoder.layers.0": CLIP, "vision_model.encoder.layers.0": CLIP},
        ["text_model.embeddings.token_embedding"],
    ),
    "sam": tower(
        "SamModel",
        {
            "vision_encoder.layers.0": {
                "attn": {"attn": "qkv: qkv, proj: proj", "": "layer_norm1: layer_norm"},
                "ff": {"mlp": "lin1: w1, lin2: w2", "": "layer_norm2: layer_norm"},
            },
            "mask_decoder.transformer.layers.0": {
                "attn": {"self_attn": QKV_OUT, "": "layer_norm1: layer_norm"},
                "cross_attn": {
                    "cross_attn_token_to_image": QKV_OUT,
                    "cross_attn_image_to_token": QKV_OUT,
                    "": "layer_norm2: layer_norm, layer_norm4: layer_norm",
                },
                "ff": {"mlp": "lin1: w1, lin2: w2", "": "layer_norm3: layer_norm"},
            },
        },
    ),
    "wav2vec2": tower("Wav2Vec2Model", {"encoder.layers.0": WAV2VEC2}),
    "hubert": tower("HubertModel", {"encoder.layers.0": WAV2VEC2}),
    "wav2vec2-conformer": tower(
        "Wav2Vec2ConformerModel",
        {
            "encoder.layers.0": {
                "attn": {
                    "self_attn": "linear_q: q, linear_k: k, linear_v: v, linear_out: proj",
                    "": "self_attn_layer_norm: layer_norm",
                },
                "ff": {
                    "ffn1": "intermediate_dense: w1, output_dense: w2",
                    "ffn2": "intermediate_dense: w1, output_dense: w2",
                    "": "ffn1_layer_norm: layer_norm, ffn2_layer_norm: layer_norm, "
                    "final_layer_norm: layer_norm",
                },
            }
        },
    ),
    "blip-2": tower(
        "Blip2ForConditionalGeneration",
        {
            "vision_model.encoder.layers.0": {
                "attn": {"self_attn": "qkv: qkv, projection: proj", "": "layer_norm1: layer_norm"},
                "ff": {"mlp": FC, "": "layer_norm2: layer_norm"},
            },
            "qformer.encoder.layer.0": QFORMER
            | {"cross_attn": {"crossattention": QFORMER_ATTENTION}},
            "qformer.encoder.layer.1": QFORMER,
            "language_model.model.decoder.layers.0": BART,
        },
        ["language_model.model.decoder.embed_tokens"],
        ["language_model.lm_head"],
    ),
    "moonshine": tower(
        "MoonshineForConditionalGeneration",
        {
            "model.encoder.layers.0": LLAMA
            | {"ff": {"mlp": FC, "": "post_attention_layernorm: layer_norm"}},
            "model.decoder.layers.0": {
                "attn": LLAMA["attn"],
                "cross_attn": {
                    "encoder_attn": QKVO,
                    "": "post_attention_layernorm: layer_norm",
                },
                "ff": {"mlp": "fc1: gate_up, fc2: w2", "": "final_layernorm: layer_norm"},
            },
        },
        ["model.decoder.embed_tokens"],
        ["proj_out"],
    ),
    "nemotron_h": tower(
        "NemotronHForCausalLM",
        {
            "model.layers.0": {"mixer": {"mixer": "in_proj: in, out_proj: out"}},
            "model.layers.1": {
                "ff": {
                    "mixer": MOE,
                    "mixer.shared_experts": "up_proj: w1, down_proj: w2",
                    "": "norm: layer_norm",
                }
            },
        },
        ["model.embeddings"],
        ["lm_head"],
    ),
    "llama4": tower(
        "Llama4ForConditionalGeneration",
        {
            "vision_model.model.layers.0": LLAMA
            | {"ff": {"mlp": FC, "": "post_attention_layernorm: layer_norm"}}
        },
        ["language_model.model.embed_tokens"],
        ["language_model.lm_head"],
    ),
    "dbrx": tower(
        "DbrxForCausalLM",
        {
            "transformer.blocks.0": {
                "attn": {
                    "norm_attn_norm.attn": "Wqkv: qkv, out_proj: proj",
                    "norm_attn_norm": "norm_1: layer_norm",
                },
                "ff": {
                    "ffn": "router.layer: router, experts: experts",
                    "norm_attn_norm": "norm_2: layer_norm",
                },
            }
        },
        ["transformer.wte"],
        ["lm_head"],
    )
    | {"config": {"attn_config": {"rope_theta": 10000.0}}},
    "detr": tower(
        "DetrModel",
        {
            "encoder.layers.0": DETR,
            "decoder.layers.0": DETR
            | {"cross_attn": {"encoder_attn": QKVO, "": "encoder_attn_layer_norm: layer_norm"}},
        },
    )
    | {
        "config": {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
        }
    },
}
