"""Tied weights: the way out of a refusal, and plain models that come out untied."""

import pytest
import torch
from support.models import build, logits
from support.nets import shake

from opendelta import LoraModel, SiteError, composition

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
