"""`resize_token_embeddings` after attaching: deltas on the head follow, or it is refused before."""

import copy
import pickle

import pytest
import torch
import transformers
from support.nets import shake

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    DeltaError,
    IA3Model,
    LoraModel,
    LoReftModel,
    VeraModel,
)

IDS = torch.tensor([[5, 6, 7, 8]])


def build(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (LoraModel, {}),
        (LoraModel, {"use_dora": True}),
        (LoraModel, {"freeze_A": True}),
        (LoraModel, {"freeze_A": True, "use_dora": True}),
        (LoraModel, {"gate": True, "dtype": "float64"}),
        (LoraModel, {"reads": True}),
        (BitFitModel, {}),
        (IA3Model, {"feedforward_modules": []}),
        (IA3Model, {"feedforward_modules": ["lm_head"]}),
    ],
)
def test_deltas_on_an_untied_head_grow_with_it(cls, options):
    model = build()
    delta = shake(cls(model, modified_modules=["lm_head"], **options))
    other = shake(LoraModel(model, modified_modules=["lm_head"], name="other"), seed=1)
    delta.freeze_module()
    with torch.no_grad():
        before = model(IDS).logits
    model.resize_token_embeddings(56, mean_resizing=False)
    out = model(IDS, labels=IDS)
    assert out.logits.shape == (1, 4, 56)
    assert torch.allclose(out.logits[..., :50], before, atol=1e-6)
    new = {name: p for name, p in delta.named_parameters() if p.size(0) == 56}
    assert new or "feedforward_modules" in options or "gate" in options
    out.loss.backward()
    assert all(p.grad is not None for p in delta.parameters())
    assert {id(p) for p in delta.parameters()} <= {id(p) for p in model.parameters()}
    assert not opendelta.unreached(model)
    assert opendelta.check(model, {"input_ids": IDS, "labels": IDS})

    for each in (delta, other):
        each.disable()
    with torch.no_grad():
        bare = model(IDS).logits[..., 50:]
    if options.get("feedforward_modules") != ["lm_head"]:  # there the input changes
        assert torch.allclose(bare, out.logits[..., 50:], atol=1e-5)
    for each in (delta, other):
        each.enable()
    model.resize_token_embeddings(40, mean_resizing=False)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, before[..., :40], atol=1e-6)
    for each in (delta, other):
        each.detach()
    opendelta.assert_pristine(model)


def test_what_was_resized_is_saved_copied_and_merged(tmp_path):
    model = build()
    delta = shake(LoraModel(model, modified_modules=["lm_head"]))
    delta.freeze_module()
    model.resize_token_embeddings(56, mean_resizing=False)
    wanted = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, wanted)
        twin.resize_token_embeddings(57, mean_resizing=False)
        assert torch.allclose(twin(IDS).logits[..., :56], wanted, atol=1e-6)
    delta.save_finetuned(tmp_path)
    plain = opendelta.composition(model).to_backbone()
    assert torch.allclose(plain(IDS).logits, wanted, atol=1e-5)
    delta.detach()
    again = opendelta.load(tmp_path, model)
    assert torch.equal(model(IDS).logits, wanted)
    assert len(again.names) == 1
    model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.allclose(model(IDS).logits[..., :56], wanted, atol=1e-6)


CANNOT = {
    "tied head": (True, LoraModel, {"modified_modules": ["lm_head"]}, r"'lm_head' is tied"),
    "tied input": (True, LoraModel, {"modified_modules": ["embed_tokens"]}, "in place"),
    "input": (False, LoraModel, {"modified_modules": ["embed_tokens"]}, "in place"),
    "own input": (False, LoraModel, {"modified_modules": ["q_proj"],
                                     "modules_to_save": ["embed_tokens"]}, "in place"),
    "own head": (False, LoraModel, {"modified_modules": ["q_proj"],
                                    "modules_to_save": ["lm_head"]}, "cannot grow"),
    "adapter": (False, opendelta.AdapterModel, {"modified_modules": ["lm_head"]}, "cannot grow"),
    "pissa": (False, LoraModel, {"modified_modules": ["lm_head"], "init": "pissa"}, "cannot grow"),
    "vera": (False, VeraModel, {"modified_modules": ["q_proj", "lm_head"], "r": 4}, "cannot grow"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::opendelta.errors.TiedWeightWarning")
@pytest.mark.parametrize("name", CANNOT)
def test_others_refuse_the_resize_before_it_happens(name):
    tied, cls, options, says = CANNOT[name]
    model = build(tied)
    shake(cls(model, **options))
    with torch.no_grad():
        before = model(IDS).logits
    for arguments in ((56,), (None, 64), (40,)):
        with pytest.raises(DeltaError, match=f"resize_token_embeddings: .*{says}.*Resize first"):
            model.resize_token_embeddings(*arguments)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, before)
        assert model.config.vocab_size == 50
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(50)
    for delta in opendelta.composition(model):
        delta.detach()
    model.resize_token_embeddings(56, mean_resizing=False)
    assert model(IDS).logits.size(-1) == 56


def test_a_merged_or_routed_head_is_refused_until_it_is_neither():
    model = build()
    shake(LoraModel(model, modified_modules=["lm_head"]))
    before = model(IDS).logits
    opendelta.composition(model).merge()
    with pytest.raises(DeltaError, match=r"'lora' on 'lm_head' is merged, .* unmerge\(\) first"):
        model.resize_token_embeddings(56)
    opendelta.composition(model).unmerge()
    with (
        opendelta.route(model, ["lora"]),
        pytest.raises(DeltaError, match=r"'lora' on 'lm_head' is routed, .* outside of route\(\)"),
    ):
        model.resize_token_embeddings(56)
    model.resize_token_embeddings(56, mean_resizing=False)
    assert torch.allclose(model(IDS).logits[..., :50], before)


def test_deltas_elsewhere_do_not_care():
    model = build(tied=True)
    delta = shake(LoraModel(model, modified_modules=["q_proj"]))
    assert list(delta.layers) == ["model.layers.0.self_attn.q_proj"]
    model.resize_token_embeddings(56, mean_resizing=False)
    assert model(IDS).logits.size(-1) == 56


def test_what_watches_over_a_resize_is_not_shown():
    model = build()
    delta = LoraModel(model, modified_modules=["lm_head"])
    assert "1 modules" in repr(delta)
    assert "RootLayer" not in str(opendelta.tree(model))
    plan = opendelta.plan(build(), opendelta.LoraConfig(modified_modules=["lm_head"]))
    assert [module.name for module in plan.deltas[0].modules] == ["lm_head"]
    report = opendelta.composition(model).merge()
    assert (list(report.merged), report.left) == (["lm_head"], {})


RETURNS = {
    "lora": (LoraModel, {"modified_modules": ["lm_head"]}),
    "lora on the input": (LoraModel, {"modified_modules": ["embed_tokens"]}),
    "bitfit": (BitFitModel, {"modified_modules": ["lm_head"]}),
    "adapter": (AdapterModel, {"modified_modules": ["lm_head"]}),
    "compacter": (CompacterModel, {"modified_modules": ["lm_head"], "hypercomplex_division": 2}),
    "loreft": (LoReftModel, {"modified_modules": ["lm_head"]}),
    "copy": (LoraModel, {"modified_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "copy of the input": (LoraModel, {"modified_modules": ["q_proj"],
                                      "modules_to_save": ["embed_tokens"]}),
    "copy around it": (LoraModel, {"modified_modules": ["lm_head"], "modules_to_save": ["model"]}),
}  # fmt: skip


@pytest.mark.covers("Delta.attach")
@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("size", [40, 110])
def test_a_detached_delta_does_not_return_to_another_size(name, size):
    model = build()
    cls, options = RETURNS[name]
    delta = cls(model, **options)
    delta.detach()
    model.resize_token_embeddings(size)
    with pytest.raises(opendelta.SiteError, match=rf": the module has other sizes.*{size}"):
        delta.attach()
    opendelta.assert_pristine(model)
    model.resize_token_embeddings(50)
    delta.attach()


@pytest.mark.covers("Delta.attach")
@pytest.mark.parametrize("cls", [AdapterModel, CompacterModel, LoReftModel])
def test_what_depends_on_the_width_of_embeddings_alone_returns(cls):
    model = build()
    delta = shake(cls(model, modified_modules=["embed_tokens"]))
    before = model(IDS).logits
    delta.detach()
    model.resize_token_embeddings(56, mean_resizing=False)
    delta.attach()
    assert torch.allclose(model(IDS).logits[..., :50], before, atol=1e-6)


@pytest.mark.covers("Delta.attach")
def test_a_layer_that_grew_returns_to_its_new_size():
    model = build()
    delta = LoraModel(model, modified_modules=["lm_head"])
    model.resize_token_embeddings(56)
    delta.detach()
    delta.attach()
    assert model(IDS).logits.size(-1) == 56


SEQ2SEQ = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
SHARING = {
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=50, d_model=16, pad_token_id=0, **SEQ2SEQ)
    ),
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(vocab_size=50, d_model=16, pad_token_id=0, **SEQ2SEQ)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("name", SHARING)
def test_a_module_that_shares_the_embeddings_refuses_a_resize(name, copied, side):
    model = SHARING[name]().eval()
    places = [f"{side}.embed_tokens"]
    options = {"modified_modules": ["q" if name == "t5" else "q_proj"], "modules_to_save": places}
    delta = shake(LoraModel(model, **(options if copied else {"modified_modules": places})))
    run = {"input_ids": IDS, "decoder_input_ids": IDS}
    before, kept = model(**run).logits, opendelta.snapshot(model)
    for size in (56, 50):  # with the old size it would put in its own module, too
        with pytest.raises(DeltaError, match=rf"'lora' on '\S*{side}.embed_tokens' is tied"):
            model.resize_token_embeddings(size)
    assert opendelta.snapshot(model) == kept
    assert torch.equal(model(**run).logits, before)
    delta.detach()
    model.resize_token_embeddings(56)


BERT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip
AROUND = {
    "copy of the head": (lambda m: LoraModel(m, modules_to_save=["cls"]), "'cls' holds a copy"),
    "copy of the embeddings": (
        lambda m: LoraModel(m, modules_to_save=["embeddings"]), "'bert.embeddings' holds a copy"
    ),
    "adapter": (lambda m: AdapterModel(m, modified_modules=["cls"]), "'cls' has the size of the v"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("name", AROUND)
def test_deltas_around_the_head_or_the_embeddings_refuse_a_resize(name):
    put, why = AROUND[name]
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    put(model)
    before = model(IDS).logits
    with pytest.raises(DeltaError, match=why):
        model.resize_token_embeddings(70)
    assert torch.equal(model(IDS).logits, before)
    assert model.config.vocab_size == 60


def test_deltas_on_a_table_of_positions_refuse_its_resize():
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=20
    )
    model = transformers.DistilBertForMaskedLM(config).eval()
    delta = shake(LoraModel(model, modified_modules=["position_embeddings"]))
    before = model(IDS).logits
    with pytest.raises(
        DeltaError, match=r"_position_embeddings: 'lora' on .* is on what it changes"
    ):
        model.resize_position_embeddings(30)
    assert torch.equal(model(IDS).logits, before)
    delta.detach()
    shake(LoraModel(model, modified_modules=["q_lin"]))
    model.resize_position_embeddings(30)
    assert model.distilbert.embeddings.position_embeddings.num_embeddings == 30
