"""A resize that deltas cannot follow is refused as a whole, whatever the model's class changes."""

import copy

import pytest
import torch
import transformers
from support.models import RESIZED
from support.nets import shake
from transformers.models.bark.configuration_bark import BarkFineConfig
from transformers.models.bark.modeling_bark import BarkFineModel

import opendelta
from opendelta import AdapterModel, BitFitModel, DeltaError, LoraModel

pytestmark = [
    pytest.mark.covers("Delta.attach", "DeltaError"),
    pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning"),
]

IDS = torch.tensor([[3, 4, 5]])


def llama(tied=True, cls=transformers.LlamaForCausalLM):
    return cls(transformers.LlamaConfig(**RESIZED, tie_word_embeddings=tied))


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**RESIZED))


def mobilebert(tied=True):
    own = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    sizes = {**RESIZED, "hidden_size": 32, "tie_word_embeddings": tied}
    return transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**sizes, **own))


def gemma3n():
    own = {
        "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 4, "laurel_rank": 4,
        "num_key_value_heads": 1, "head_dim": 8, "layer_types": ["full_attention"],
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0],
    }  # fmt: skip
    config = transformers.Gemma3nTextConfig(**{**RESIZED, "intermediate_size": [32]}, **own)
    return transformers.Gemma3nForCausalLM(config)


def bark():
    config = BarkFineConfig(
        hidden_size=16, num_layers=1, num_heads=2, block_size=32, input_vocab_size=40,
        output_vocab_size=40, n_codes_total=3, n_codes_given=1,
    )  # fmt: skip
    return BarkFineModel(config)


def marian():
    sizes = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (("layers", 1), ("ffn_dim", 16), ("attention_heads", 2))
    }
    config = transformers.MarianConfig(
        d_model=16, vocab_size=40, decoder_vocab_size=40, pad_token_id=0,
        share_encoder_decoder_embeddings=False, **sizes,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def first(model):
    if isinstance(model, BarkFineModel):
        return model(1, torch.arange(18).view(1, 6, 3)).logits
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


TOKENS = "resize_token_embeddings"
CASES = {  # {what is tried: (model, the module with the delta, part that is resized, method)}
    "beneath llama's head": (llama, "lm_head", "model", TOKENS),
    "beneath gpt2's head": (gpt2, "lm_head", "transformer", TOKENS),
    "beneath bert's head": (bert, "cls.predictions.decoder", "bert", TOKENS),
    "beneath t5's head": (t5, "lm_head", "encoder", TOKENS),
    "beneath marian's head": (marian, "lm_head", "model", "resize_decoder_token_embeddings"),
    "mobilebert's second table": (mobilebert, "cls.predictions.dense", "", TOKENS),
    "gemma's second table": (gemma3n, "embed_tokens_per_layer", "", TOKENS),
    "bark's list of heads": (bark, "lm_heads.0", "", TOKENS),
    "bark's list of tables": (bark, "input_embeds_layers.1", "", TOKENS),
}
QUERIES = ["c_attn", "query", "q_proj", "q", "att_proj"]


@pytest.mark.parametrize("size", [47, 33])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_refused_resize_has_changed_nothing(name, copied, size):
    make, where, part, verb = CASES[name]
    model = make().eval()
    query = next(q for q in QUERIES if any(n.endswith(q) for n, _ in model.named_modules()))
    own = {"modules_to_save": [where]} if copied else {}
    delta = shake(LoraModel(model, modified_modules=[query if copied else where], **own))
    expected, kept = first(model), opendelta.snapshot(model)
    configs = {
        n: copy.deepcopy(vars(m.config)) for n, m in model.named_modules() if hasattr(m, "config")
    }
    parameters, state = [*model.parameters()], torch.get_rng_state()
    with pytest.raises(DeltaError, match=rf"{verb}: 'lora' on '\S*{where}' .*Resize first, then"):
        getattr(model.get_submodule(part), verb)(size)
    assert torch.equal(torch.get_rng_state(), state)
    assert [*map(id, model.parameters())] == [*map(id, parameters)]
    assert opendelta.snapshot(model) == kept
    assert configs == {n: vars(m.config) for n, m in model.named_modules() if hasattr(m, "config")}
    assert torch.equal(first(model), expected)
    getattr(model.get_submodule(part), verb)(40)
    assert torch.equal(first(model), expected)
    delta.detach()
    getattr(model.get_submodule(part), verb)(size)


def test_a_copy_around_the_head_knows_of_the_tables_beneath():
    model = bert().eval()
    LoraModel(model, modified_modules=["query"], modules_to_save=["cls"])
    with pytest.raises(DeltaError, match="'lora' on 'cls' is tied"):
        model.bert.resize_token_embeddings(44)
    assert model.bert.embeddings.word_embeddings.weight.shape == (40, 16)


class Padded(transformers.LlamaForCausalLM):
    def resize_token_embeddings(self, new_num_tokens):
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of=8)


class Failing(transformers.LlamaForCausalLM):
    def resize_token_embeddings(self, *args, **kwargs):
        super().resize_token_embeddings(*args, **kwargs)
        self.config.own = 1
        raise ValueError("own")


@pytest.mark.parametrize(
    ("make", "head", "given", "rows"),
    [
        (lambda: llama(False, Padded), "lm_head", {"new_num_tokens": 44}, 48),
        (lambda: mobilebert(False), "cls.predictions.decoder", {"new_num_tokens": 47}, 47),
        (lambda: llama(False), "lm_head", {"pad_to_multiple_of": 32, "mean_resizing": False}, 64),
    ],
)
def test_a_class_is_given_what_the_caller_gave(make, head, given, rows):
    model = make().eval()
    delta = shake(LoraModel(model, modified_modules=[head]))
    expected = first(model)
    model.resize_token_embeddings(**given)
    assert delta.layers[head].lora_B.shape[0] == rows
    assert first(model).size(-1) == rows
    if given.get("new_num_tokens") != 47:  # mobilebert's other columns change it
        torch.testing.assert_close(first(model)[..., :40], expected)


@pytest.mark.parametrize("cls", [LoraModel, BitFitModel])
def test_an_error_of_the_class_itself_leaves_the_model_as_it_was(cls):
    model = llama(False, Failing).eval()
    shake(cls(model, modified_modules=["lm_head"]))
    expected, kept, config = first(model), opendelta.snapshot(model), model.config.to_dict()
    with pytest.raises(ValueError, match="own"):
        model.resize_token_embeddings(44)
    assert opendelta.snapshot(model) == kept
    assert model.config.to_dict() == config
    assert torch.equal(first(model), expected)
    assert [handle.layers["lm_head"] for handle in opendelta.composition(model)] == [
        *model.lm_head.deltas.values()
    ]


def test_what_is_after_a_table_does_not_depend_on_its_rows():
    model = llama().eval()
    shake(AdapterModel(model, modified_modules=["embed_tokens"], bottleneck_dim=4))
    expected = first(model)
    model.resize_token_embeddings(44)
    torch.testing.assert_close(first(model)[..., :40], expected)
