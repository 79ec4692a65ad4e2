"""`resize_token_embeddings` of another model than the one that carries the deltas."""

import pytest
import torch
import transformers
from support.models import RESIZED
from torch import nn

import opendelta
from opendelta import DeltaError, LoraModel, SiteError

pytestmark = pytest.mark.covers("Delta.attach", "DeltaError", "SiteError")

IDS = torch.tensor([[3, 4, 5]])


def llama():
    config = transformers.LlamaConfig(**RESIZED, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


class Policy(nn.Module):
    """A language model with a value head."""

    def __init__(self):
        super().__init__()
        self.lm, self.value = llama(), nn.Linear(16, 1)

    def forward(self, input_ids):
        return self.lm(input_ids=input_ids).logits


def pair():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**RESIZED),
        transformers.BertConfig(
            **RESIZED, is_decoder=True, add_cross_attention=True, tie_word_embeddings=False
        ),
    )
    return transformers.EncoderDecoderModel(config).eval()


def bert():
    config = transformers.BertConfig(**RESIZED)
    return transformers.BertForSequenceClassification(config).eval()


WRAPPED = {  # {name: (the model, the one inside, the head, its logits)}
    "own": (Policy, "lm", "lm_head", lambda m: m(IDS)),
    "pair": (
        pair,
        "decoder",
        "decoder.cls.predictions.decoder",
        lambda m: m(input_ids=IDS, decoder_input_ids=IDS).logits,
    ),
}


def drawn(delta):
    with torch.no_grad():
        for number, parameter in enumerate(delta.parameters()):
            parameter.copy_(
                torch.linspace(-0.5, 0.5 + number, parameter.numel()).view_as(parameter)
            )
    return delta


@pytest.mark.parametrize("size", [44, 36])
@pytest.mark.parametrize("which", WRAPPED)
def test_deltas_on_the_head_of_a_model_inside_grow_with_it(which, size):
    make, inner, head, call = WRAPPED[which]
    model = make()
    delta = drawn(LoraModel(model, modified_modules=[head]))
    rest = min(size, 40)
    with torch.no_grad():
        expected = call(model)[..., :rest]
        model.get_submodule(inner).resize_token_embeddings(size)
        assert opendelta.composition(model).names == ["lora"]
        assert call(model).size(-1) == size
        torch.testing.assert_close(call(model)[..., :rest], expected)
        for parameter in delta.parameters():  # those of the handle act
            parameter.zero_()
        with delta.disabled():
            plain = call(model)
        torch.testing.assert_close(call(model), plain)
        assert not torch.allclose(plain[..., :rest], expected)
        delta.detach()
    opendelta.assert_pristine(model)


def test_a_copy_of_the_head_of_a_model_inside_refuses_its_resize():
    model = Policy().eval()
    LoraModel(model, modified_modules=["q_proj"], modules_to_save=["lm_head"])
    expected = model(IDS)
    with pytest.raises(DeltaError, match=r"on 'lm_head' .* cannot grow.*Resize first, then attach"):
        model.lm.resize_token_embeddings(44)
    torch.testing.assert_close(model(IDS), expected)


@pytest.mark.parametrize("kind", ["lora", "copy"])
@pytest.mark.parametrize("which", ["own", "own, the base", "bert", "attached inside"])
def test_deltas_on_embeddings_refuse_a_resize_of_any_model_around(which, kind):
    if which == "bert":
        model = carries = bert()
        resized, name = model.bert, "word_embeddings"
    elif which == "attached inside":
        model = resized = llama()
        carries, name = model.model, "embed_tokens"
    else:
        model = carries = Policy().eval()
        resized, name = model.lm.model if "base" in which else model.lm, "embed_tokens"
    if kind == "lora":
        drawn(LoraModel(carries, modified_modules=[name]))
    else:
        query = "query" if which == "bert" else "q_proj"
        LoraModel(carries, modified_modules=[query], modules_to_save=[name])
    before = model(IDS)
    before = before if isinstance(before, torch.Tensor) else before.logits
    keys = {key: tensor.shape for key, tensor in model.state_dict().items()}
    with pytest.raises(DeltaError, match=r"[Rr]esize first, then attach"):
        resized.resize_token_embeddings(44)
    after = model(IDS)
    torch.testing.assert_close(after if isinstance(after, torch.Tensor) else after.logits, before)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == keys


def test_a_table_that_nothing_depends_on_takes_other_rows():
    model = nn.Sequential(nn.Embedding(40, 8))
    delta = opendelta.AdapterModel(model, modified_modules=["0"])
    model[0].weight = nn.Parameter(torch.randn(44, 8))
    model[0].num_embeddings = 44
    assert model(torch.tensor([[42]])).shape == (1, 1, 8)
    delta.detach()
    assert model[0].num_embeddings == 44
    drawn(LoraModel(model, modified_modules=["0"]))
    for size in (40, 50):
        with pytest.raises(SiteError, match=f"lora on this Embedding .* of {size} rows in the pl"):
            model[0].weight = nn.Parameter(torch.randn(size, 8))
    assert len(model[0].weight) == model[0].num_embeddings == 44


def marian(tied):
    sizes = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (("layers", 1), ("ffn_dim", 16), ("attention_heads", 2))
    }
    config = transformers.MarianConfig(
        d_model=16, vocab_size=40, decoder_vocab_size=40, pad_token_id=0, tie_word_embeddings=tied,
        share_encoder_decoder_embeddings=False, **sizes,
    )  # fmt: skip
    return transformers.MarianMTModel(config).eval()


def lxmert():
    layers = {f"{which}_layers": 1 for which in "lxr"}
    sizes = {**RESIZED, **layers, "num_qa_labels": 5, "visual_feat_dim": 8}
    return transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**sizes)).eval()


OTHERS = {  # {verb: (the model, what it changes, what it leaves)}
    "resize_decoder_token_embeddings": (lambda: marian(False), "lm_head", "q_proj"),
    "resize_num_qa_labels": (lxmert, "answer_head.logit_fc.3", "query"),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("verb", OTHERS)
def test_a_resize_of_a_part_is_refused_where_a_delta_is_on_it(verb, copied):
    make, changed, left = OTHERS[verb]
    model = make()
    on = {"modules_to_save": [changed]} if copied else {}
    delta = LoraModel(model, modified_modules=[left if copied else changed], **on)
    keys = {key: tensor.shape for key, tensor in model.state_dict().items()}
    with pytest.raises(DeltaError, match=f"{verb}: 'lora' on {changed!r} is on what it changes"):
        getattr(model, verb)(44)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == keys
    delta.detach()
    LoraModel(model, modified_modules=[left])
    assert getattr(model, verb)(44).weight.size(0) == 44


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
def test_a_tied_decoder_is_not_resized_under_a_delta_on_its_head():
    model = marian(True)
    LoraModel(model, modified_modules=["lm_head"])
    with pytest.raises(DeltaError, match="is on what it changes"):
        model.resize_decoder_token_embeddings(44)
