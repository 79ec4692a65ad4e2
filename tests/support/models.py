"""Tiny randomly initialised models, their inputs, and deltas on all kinds of their modules."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel
from opendelta._deltas.registry import METHODS
from support.nets import shake

VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model: the class of the whole model.
        config: its configuration, without dropout, so that two runs give the same.
        projections: the linear modules that get a LoRA and an IA3.
        blocks: {field of the output that holds hidden states: list of the blocks it comes from}.
        inner: the `PreTrainedModel`s inside the whole model.
    """

    model: type[PreTrainedModel]
    config: PreTrainedConfig
    projections: list[str]
    blocks: dict[str, str]
    inner: list[str]


_encoder: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

FAMILIES = {
    "bert": Family(
        model=transformers.BertForMaskedLM,
        config=transformers.BertConfig(**_encoder),
        projections=["query", "intermediate.dense"],
        blocks={"hidden_states": "bert.encoder.layer"},
        inner=["bert"],
    ),
    "roberta": Family(
        model=transformers.RobertaForMaskedLM,
        config=transformers.RobertaConfig(**_encoder),
        projections=["query", "intermediate.dense"],
        blocks={"hidden_states": "roberta.encoder.layer"},
        inner=["roberta"],
    ),
    "gpt2": Family(
        model=transformers.GPT2LMHeadModel,
        config=transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        projections=["c_attn", "c_fc"],
        blocks={"hidden_states": "transformer.h"},
        inner=["transformer"],
    ),
    "llama": Family(
        model=transformers.LlamaForCausalLM,
        config=transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            eos_token_id=None, pad_token_id=0,
        ),
        projections=["q_proj", "down_proj"],
        blocks={"hidden_states": "model.layers"},
        inner=["model"],
    ),
    "mistral": Family(
        model=transformers.MistralForCausalLM,
        config=transformers.MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            sliding_window=5, eos_token_id=None, pad_token_id=0,
        ),
        projections=["q_proj", "down_proj"],
        blocks={"hidden_states": "model.layers"},
        inner=["model"],
    ),
    "t5": Family(
        model=transformers.T5ForConditionalGeneration,
        config=transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
        ),
        projections=["q", "wo"],
        blocks={
            "encoder_hidden_states": "encoder.block",
            "decoder_hidden_states": "decoder.block",
        },
        inner=["encoder", "decoder"],
    ),
    "bart": Family(
        model=transformers.BartForConditionalGeneration,
        config=transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0,
            bos_token_id=1, eos_token_id=None, forced_eos_token_id=None,
            decoder_start_token_id=2, pad_token_id=0,
        ),
        projections=["q_proj", "fc2"],
        blocks={
            "encoder_hidden_states": "model.encoder.layers",
            "decoder_hidden_states": "model.decoder.layers",
        },
        inner=["model", "model.decoder"],
    ),
}  # fmt: skip

FIVE = ["bert", "gpt2", "llama", "t5", "bart"]
GENERATORS = ["gpt2", "llama", "t5", "bart"]

RESIZED = {  # the sizes of models whose vocabulary is resized
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 40,
}  # fmt: skip


# -------------------------------------------------------------------------------- models and inputs
def build(name):
    """The same tiny model every time, in evaluation mode."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    return family.model(copy.deepcopy(family.config)).eval()


def token_ids(rows=2, length=7):
    """The same token ids every time; none of them is special."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def inputs(model):
    """Arguments for the forward of `model`."""
    ids = token_ids()
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


def logits(model):
    """What `model` computes from `inputs`, without gradients."""
    with torch.no_grad():
        return model(**inputs(model)).logits


def blocks(model, name):
    """(field of the output, full name, block) of every block of the model called `name`."""
    for field, path in FAMILIES[name].blocks.items():
        for index, block in enumerate(model.get_submodule(path)):
            yield field, f"{path}.{index}", block


# ------------------------------------------------------------------------------------ plain modules
class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.fc(x)))


class Tower(nn.Module):
    """A few blocks and a head, on vectors of 8; `checkpointed` recomputes the blocks."""

    def __init__(self, depth=2, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(8, 4)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def tower(depth=2, checkpointed=False):
    """The same tower every time."""
    torch.manual_seed(0)
    return Tower(depth, checkpointed)


def vectors(*shape):
    """The same random numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def put_deltas_on_tower(model):
    """Put the same deltas on a tower every time: on the first linear, the second, and the block.

    They act beside a module, before and after it, and around a module that is no table's.
    """
    torch.manual_seed(7)
    blocks = [f"blocks.{index}" for index in range(len(model.blocks))]
    deltas = (
        LoraModel(model, modified_modules=["fc"], lora_r=2),
        IA3Model(model, modified_modules=["fc", "out"], feedforward_modules=["out"]),
        AdapterModel(model, modified_modules=["fc"], bottleneck_dim=3),
        AdapterModel(model, modified_modules=blocks, bottleneck_dim=3, name="block"),
    )
    for delta in deltas:
        shake(delta, scale=0.2)
    return deltas


# ------------------------------------------------------------------------------------------- deltas
def put_deltas(model, name, scale=0.2, **options):
    """Put the same deltas on the model called `name` every time.

    LoRA and IA3 are on projections, the adapter is on the blocks, on the model itself, which is the
    root, and on the models inside it.

    Args:
        scale: how far they are from the identity.
        options: for all of them.
    """
    family = FAMILIES[name]
    places = ["", *family.inner, *(where for _, where, _ in blocks(model, name))]
    torch.manual_seed(7)
    deltas = (
        LoraModel(model, modified_modules=family.projections, lora_r=4, **options),
        IA3Model(model, modified_modules=family.projections, **options),
        AdapterModel(model, modified_modules=places, bottleneck_dim=4, **options),
    )
    for delta in deltas:
        shake(delta, scale=scale)
    return deltas


SMALL = {  # options with which a method is as small as the models
    "prefix": {"prefix_token_num": 3, "embed_dim": 8, "mid_dim": 8},
    "soft_prompt": {"soft_token_num": 3},
    "oft": {"oft_block_size": 8},
    "vera": {"r": 8},
    "fourierft": {"n_frequency": 20},
}
SCALES = {"fourierft": 0.002, "vera": 0.1}


def put_default(method, model, seed=7, **options):
    """A delta where its paper has it, and that acts."""
    torch.manual_seed(seed)
    delta = METHODS[method](model, **SMALL.get(method, {}), **options)
    return shake(delta, seed=seed, scale=SCALES.get(method, 0.05))


def detach(deltas):
    """Take all `deltas` off."""
    for delta in deltas:
        delta.detach()


def sites(deltas):
    """The full names of all modules that carry one of the `deltas`, each once."""
    return list(dict.fromkeys(where for delta in deltas for where in delta.layers))


def delta_names(model):
    """The names of the attached deltas in the order in which they act."""
    return opendelta.composition(model).names


def by_hand(linear, x):
    """The output of a linear module that is not called."""
    return nn.functional.linear(x, linear.weight, linear.bias)


class Reader(nn.Module):
    """A parent whose function reads the weight of a child, so that no look at its code tells."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        return by_hand(self.q, x)


def reader():
    torch.manual_seed(0)
    return Reader()
