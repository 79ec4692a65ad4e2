"""Tied weights: the way out of a refusal, and plain models that come out untied."""

import inspect
import types

import pytest
import torch
import transformers
from support.models import build, logits
from support.nets import shake
from torch import nn

from opendelta import BitFitModel, IA3Model, LoraModel, SiteError, TiedWeightWarning, composition
from opendelta._modules.holding import walk

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone")

HEADS = {"gpt2": "lm_head", "t5": "lm_head", "bart": "lm_head"}


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
def test_the_refusal_names_the_ways_out(verb):
    model = build("gpt2")
    LoraModel(model, modified_modules=["lm_head"])
    ways = r"act unmerged; .*modules_to_save=\['lm_head'\]; .*tie_word_embeddings=False"
    with pytest.raises(SiteError, match=ways):
        getattr(composition(model), verb)()


@pytest.mark.filterwarnings("ignore:this plain T5.*:opendelta.TiedWeightWarning")
@pytest.mark.parametrize("name", HEADS)
def test_a_plain_model_that_came_out_untied_is_loaded_as_it_is(name, tmp_path):
    model = build(name)
    assert model.config.tie_word_embeddings
    tied = logits(model)
    delta = LoraModel(model, modules_to_save=[HEADS[name]])
    shake(delta)
    expected = logits(model)
    assert not torch.allclose(expected, tied, atol=1e-3)
    plain = composition(model).to_backbone()
    assert not plain.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    for each in (plain, loaded):
        torch.testing.assert_close(logits(each), expected, atol=1e-5, rtol=1e-5)


T5S = {
    "T5": "lm_head", "LongT5": "lm_head", "MT5": "lm_head", "UMT5": "lm_head", "Udop": "lm_head",
    "SwitchTransformers": "lm_head", "Pop2Piano": "encoder.embed_tokens",
}  # fmt: skip
SMALL = {
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50,
    "decoder_start_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", T5S)
def test_a_config_that_ties_whatever_is_loaded_is_warned_of(name, tmp_path):
    config = getattr(transformers, f"{name}Config")
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    torch.manual_seed(0)
    model = cls(config(**SMALL)).eval()
    shake(LoraModel(model, modules_to_save=[T5S[name]], modified_modules=["q"]))
    rows = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 4]])}
    if name == "Udop":
        rows["bbox"] = torch.rand(1, 3, 4)
    expected = model(**rows).logits.detach()
    ways = rf"its {config.__name__}, once loaded, says .* do not call tie_weights\(\) or resize_"
    with pytest.warns(TiedWeightWarning, match=ways):
        plain = composition(model).to_backbone()
    plain.save_pretrained(tmp_path)
    for each in (plain, cls.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(each(**rows).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_is_tied_inside_another_comes_out_untied(tmp_path):
    vision = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )  # fmt: skip
    text = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True
    )
    cls = transformers.VisionEncoderDecoderModel
    config = transformers.VisionEncoderDecoderConfig
    torch.manual_seed(0)
    model = cls(config.from_encoder_decoder_configs(vision, text)).eval()
    shake(LoraModel(model, modules_to_save=["lm_head"], modified_modules=["c_attn"]))
    rows = {"pixel_values": torch.randn(1, 3, 8, 8), "decoder_input_ids": torch.tensor([[3, 4]])}
    expected = model(**rows).logits.detach()
    plain = composition(model).to_backbone()
    plain.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    for each in (plain, loaded):
        torch.testing.assert_close(each(**rows).logits, expected, atol=1e-5, rtol=1e-5)
        each.tie_weights()
        torch.testing.assert_close(each(**rows).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_plain_model_that_stays_tied_says_so(name):
    model = build(name)
    shake(LoraModel(model))
    assert composition(model).to_backbone().config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
@pytest.mark.parametrize("ran", [False, True])
def test_a_copy_that_nobody_calls_is_not_written(ran):
    model = build("t5")
    shake(LoraModel(model, modules_to_save=["shared"], modified_modules=["q"]))
    if ran:
        expected = logits(model)
    plain = composition(model).to_backbone()
    if not ran:
        expected = logits(model)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert plain.shared.weight is plain.encoder.embed_tokens.weight


class Tied(nn.Module):
    """A head that has the weight of the embeddings, and that no table of the model's has."""

    def __init__(self, keep):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
        head = nn.Linear(8, 20, bias=False)
        head.weight = self.embed.weight
        object.__setattr__(self, "kept", keep(head))

    def forward(self, ids):
        kept = self.kept
        if isinstance(kept, dict | types.SimpleNamespace):
            kept = dict(getattr(kept, "__dict__", kept))["head"]
        head = kept[0] if isinstance(kept, tuple | list) else kept
        x = torch.tanh(self.body(self.embed(ids)))
        return head()(x) if inspect.isfunction(head) else head(x)


def nested(head):
    outer = nn.Module()
    object.__setattr__(outer, "inner", [nn.Sequential(head)])
    return lambda: outer.inner[0]


KEEPERS = {
    "attribute": lambda head: head,
    "list": lambda head: [head],
    "tuple": lambda head: (head,),
    "dict": lambda head: {"head": head},
    "namespace": lambda head: types.SimpleNamespace(head=head),
    "closure": lambda head: lambda: head,
    "method": lambda head: head.forward,
    "nested": nested,
}


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("keep", KEEPERS)
def test_a_module_that_is_not_registered_keeps_a_merge_from_its_weight(keep, verb):
    model, ids = Tied(KEEPERS[keep]), torch.arange(20)[None]
    delta = shake(LoraModel(model, modified_modules=["embed"]))
    before = model(ids)
    ways = r"'embed' \(Embedding\): .*its weight is tied to that of another Linear that the model"
    with pytest.raises(SiteError, match=ways):
        getattr(composition(model), verb)()
    assert torch.equal(model(ids), before)
    delta.detach()
    shake(LoraModel(model, modified_modules=["body"], modules_to_save=["embed"]))
    torch.testing.assert_close(composition(model).to_backbone()(ids), model(ids))


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_a_module_aside_with_weights_of_its_own_hinders_no_merge(verb):
    model, ids = Tied(KEEPERS["list"]), torch.arange(20)[None]
    model.kept[0].weight = nn.Parameter(torch.randn(20, 8))
    shake(LoraModel(model, modified_modules=["embed"]))
    before = model(ids)
    made = getattr(composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(ids), before)


# ------------------------------------------------------------------------ much held beside a model
def test_what_is_held_among_numbers_and_texts_is_found_without_a_look_at_each():
    rows = [(number, str(number)) for number in range(1000)]
    held = [*rows, (1, {"deep": [2, nn.Linear(2, 2)]}), [3, "four"]]
    found = [*walk([held, 5, None])]
    assert sum(isinstance(value, nn.Linear) for value in found) == 1
    assert len(found) == 5
    assert len([*walk([held], simple=True)]) > 2000


class Lazy:
    """It has no value yet, and says so of every name."""

    def __getattr__(self, name):
        raise RuntimeError("not ready")


class LazySlots(Lazy):
    __slots__ = ("empty", "part")


@pytest.mark.parametrize("cls", [Lazy, LazySlots])
def test_an_object_without_a_value_yet_is_not_asked(cls):
    model = nn.Sequential(nn.Linear(4, 4))
    model.held = [cls()]
    shake(LoraModel(model, modified_modules=["0"]))
    x = torch.randn(2, 4)
    expected = model(x)
    composition(model).merge()
    torch.testing.assert_close(model(x), expected)


def test_what_slots_hold_is_found():
    held, part = LazySlots(), nn.Linear(2, 2)
    held.part = part
    assert any(value is part for value in walk([held]))


class Inside(nn.Module):
    """A head in a module."""

    def __init__(self, embedding):
        super().__init__()
        self.proj = nn.Linear(6, 9, bias=False)
        self.proj.weight = embedding.weight

    def forward(self, x):
        return self.proj(x)


class TiedHead(nn.Module):
    def __init__(self, inside=False):
        super().__init__()
        self.emb, self.mid = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = Inside(self.emb)
        if not inside:
            self.head = self.head.proj

    def forward(self, ids):
        return self.head(self.mid(self.emb(ids)))


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_what_is_tied_to_a_module_with_a_copy_is_free_in_a_plain_model(ran, inside):
    torch.manual_seed(0)
    model, ids = TiedHead(inside), torch.arange(9)[None]
    before = model(ids)
    delta = shake(LoraModel(model, modified_modules=["emb"], modules_to_save=["head"]))
    expected = model(ids) if ran else None
    plain = composition(model).to_backbone()
    expected = model(ids) if expected is None else expected
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(plain(ids), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids), expected)
    with pytest.raises(SiteError, match="would change too"):
        composition(model).merge()
    delta.disable()
    torch.testing.assert_close(model(ids), before)


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
def test_a_tied_module_without_an_acting_copy_still_hinders_a_plain_model():
    model = TiedHead()
    LoraModel(model, modified_modules=["emb"], name="own")
    LoraModel(model, modified_modules=["mid"], modules_to_save=["head"], name="copy").disable()
    with pytest.raises(SiteError, match="would change too"):
        composition(model).to_backbone()


def untied_bert():
    """A BERT whose decoder has a weight of its own, and its bias is an attribute around it, too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=20, intermediate_size=24, tie_word_embeddings=False, **sizes
    )
    model = transformers.BertForMaskedLM(config).eval()
    model.resize_token_embeddings(24, mean_resizing=False)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    return model


TIED_BIAS = "its bias is tied to that of 'cls.predictions', which would change too"


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_tied_bias_hinders_no_merge_that_leaves_it_as_it_is(options, verb):
    model, ids = untied_bert(), torch.arange(20)[None]
    bias = model.cls.predictions.bias.detach().normal_().clone()
    shake(LoraModel(model, modified_modules=["decoder"], **options))
    expected = model(ids).logits
    made = getattr(composition(model), verb)()
    made = model if verb == "merge" else made
    torch.testing.assert_close(made(ids).logits, expected)
    assert torch.equal(made.cls.predictions.bias, bias)
    assert torch.equal(made.cls.predictions.decoder.bias, bias)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("method", [BitFitModel, IA3Model])
def test_a_tied_bias_hinders_a_merge_that_changes_it(method, verb):
    model, ids = untied_bert(), torch.arange(20)[None]
    shake(method(model, modified_modules=["decoder"]))
    before = model(ids).logits
    with pytest.raises(SiteError, match=TIED_BIAS):
        getattr(composition(model), verb)()
    assert torch.equal(model(ids).logits, before)


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_two_layers_with_one_bias_warn_and_merge_what_leaves_it():
    model, x = Sharing(), torch.randn(3, 8)
    with pytest.warns(TiedWeightWarning, match="'two' uses too"):
        shake(LoraModel(model, modified_modules=["one"]))
    expected = model(x)
    composition(model).merge()
    torch.testing.assert_close(model(x), expected)
