"""Deltas in sentence-transformers: train, resume, find the best model, save and load."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from support.nets import shake
from transformers import BertConfig, BertModel, BertTokenizer

import opendelta
from opendelta import AdapterModel, LoraModel

WORDS = ["a", "man", "rides", "one", "red", "horse", "over", "hills"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SENTENCES = ["a man rides", "one red horse", "over hills", "a red man"]
pytestmark = pytest.mark.covers("Delta.freeze_module", "load")


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def model_of(folder):
    body = Transformer(folder)
    pooling = Pooling(body.get_embedding_dimension())
    return SentenceTransformer(modules=[body, pooling], device="cpu")


INNER = {"the model": lambda model: model, "its backbone": lambda model: model[0].model}
everywhere = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def with_deltas(folder, inner, acts=True):
    model = model_of(folder)
    lora = LoraModel(inner(model), modified_modules=["query"])
    adapter = AdapterModel(inner(model), modified_modules=["output.dense"])
    for delta in (lora, adapter) if acts else ():
        shake(delta)
    lora.freeze_module()
    return model


def trainer(model, folder, **options):
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=0.05, save_strategy="steps",
        save_steps=1, logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    rows = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES[::-1]})
    loss = losses.MultipleNegativesRankingLoss(model)
    return SentenceTransformerTrainer(model, arguments, rows, rows, loss)


@everywhere
def test_save_gives_the_plain_model_and_load_brings_the_deltas(inner, plain_folder, tmp_path):
    model = with_deltas(plain_folder, inner)
    expected = model.encode(SENTENCES)
    model.save(str(tmp_path))
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert (plain.encode(SENTENCES) == model_of(plain_folder).encode(SENTENCES)).all()
    opendelta.load(tmp_path, inner(plain))
    assert (plain.encode(SENTENCES) == expected).all()


@everywhere
def test_a_run_resumes_and_ends_as_the_one_that_was_not_cut(inner, plain_folder, tmp_path):
    model = with_deltas(plain_folder, inner, acts=False)
    trainer(model, tmp_path, max_steps=4).train()
    expected = model.encode(SENTENCES)
    resumed = with_deltas(plain_folder, inner, acts=False)
    run = trainer(resumed, tmp_path, max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4
    assert (resumed.encode(SENTENCES) == expected).all()


@everywhere
def test_the_best_model_at_the_end_has_the_deltas_of_that_step(inner, plain_folder, tmp_path):
    model = with_deltas(plain_folder, inner, acts=False)
    run = trainer(
        model, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = run.state.best_global_step
    assert best < 3
    found = model.encode(SENTENCES)
    twin = model_of(plain_folder)
    opendelta.load(tmp_path / f"checkpoint-{best}", inner(twin))
    assert (twin.encode(SENTENCES) == found).all()
    assert not (model_of(plain_folder).encode(SENTENCES) == found).all()
