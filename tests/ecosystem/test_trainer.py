"""Deltas in transformers' Trainer: they alone are trained, and its checkpoints bring them back."""

import copy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.models import FIVE, build, detach, logits, put_deltas, token_ids
from support.nets import shake
from support.quantised import torchao
from transformers import (
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import opendelta
from opendelta import LoraModel

pytestmark = pytest.mark.covers("Delta.freeze_module")

# Warnings are errors, so every run below also shows that Trainer makes opendelta warn of nothing.


def examples():
    """A data set with a column that no model takes."""
    rows = token_ids(rows=8).tolist()
    return [{"input_ids": row, "labels": row, "unused": 1} for row in rows]


def trainer(model, folder, **options):
    """A Trainer of two small steps, with activation checkpointing, that takes `options`."""
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "activation_checkpointing": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples())


def prepared(name="bert", only_trainable=True):
    """A model with deltas on all kinds of modules, the root too, which alone train."""
    model = build(name)
    deltas = put_deltas(model, name)
    deltas[0].freeze_module(set_state_dict=only_trainable)
    return model, deltas


def values(deltas):
    """A copy of all tensors of the deltas by full name."""
    return {key: t.clone() for delta in deltas for key, t in delta.state_dict().items()}


def trained(deltas):
    """The values that a loss reaches: the model computes it before a delta on itself acts."""
    return {key: t for key, t in values(deltas).items() if not key.startswith("deltas.")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", FIVE)
def test_training_changes_all_tensors_of_the_deltas_and_nothing_else(name, tmp_path):
    model, deltas = prepared(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trainer(model, tmp_path).train()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == set(trained(deltas))


def test_a_trained_model_is_pristine_after_detaching(tmp_path):
    model = build("bert")
    before = opendelta.snapshot(model)
    deltas = put_deltas(model, "bert")
    deltas[0].freeze_module()
    trainer(model, tmp_path, activation_checkpointing=False).train()
    detach(deltas)
    opendelta.assert_pristine(model.eval(), like=before)
    assert torch.equal(logits(model.eval()), logits(build("bert")))


def test_unused_columns_are_dropped_though_the_model_itself_is_a_site(tmp_path):
    model, _ = prepared()
    taken = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: taken.append(set(given)), with_kwargs=True
    )
    trainer(model, tmp_path).train()
    assert len(taken) == 2
    for columns in taken:
        assert {"input_ids", "labels"} <= columns
        assert "unused" not in columns


filtered_or_not = pytest.mark.parametrize(
    "only_trainable", [True, False], ids=["filtered", "everything"]
)


@filtered_or_not
def test_resuming_from_a_checkpoint_restores_the_deltas_exactly(only_trainable, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, deltas = prepared(only_trainable=only_trainable)
    trainer(model, tmp_path, **saving).train()
    expected = values(deltas)

    resumed, deltas = prepared(only_trainable=only_trainable)
    run = trainer(resumed, tmp_path, **saving)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4
    assert_same(values(deltas), expected)


@filtered_or_not
def test_resuming_with_deltas_of_other_names_is_refused(only_trainable, tmp_path):
    def made(name):
        model = build("bert")
        opendelta.LoraModel(model, name=name).freeze_module(set_state_dict=only_trainable)
        return trainer(model, tmp_path, save_strategy="steps", save_steps=2)

    made("first").train()
    with pytest.raises(opendelta.DeltaLoadError, match=r"tensors of first: attach .*with name="):
        made("second").train(resume_from_checkpoint=True)


class KeepsValues(TrainerCallback):
    """Keeps the tensors of the deltas at every checkpoint."""

    def __init__(self, deltas):
        self.deltas = deltas
        self.at_step = {}

    def on_save(self, arguments, state, control, **others):
        self.at_step[state.global_step] = values(self.deltas)


@filtered_or_not
def test_the_best_model_at_the_end_has_the_deltas_of_that_step(only_trainable, tmp_path, caplog):
    model, deltas = prepared(only_trainable=only_trainable)
    run = trainer(
        model,
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so that the "best" step is not the last
    )
    kept = KeepsValues(deltas)
    run.add_callback(kept)
    with caplog.at_level("WARNING", logger="transformers.trainer"):
        transformers.logging.enable_propagation()
        run.train()
        transformers.logging.disable_propagation()
    warned = "missing keys" in caplog.text  # a plain BERT's tied head is reported to Trainer, too
    assert warned != only_trainable
    best = run.state.best_global_step
    assert best < 3
    assert_same(values(deltas), kept.at_step[best])
    assert not torch.equal(*(next(iter(kept.at_step[step].values())) for step in (best, 3)))


def test_a_filtered_checkpoint_holds_the_deltas_alone_and_another_one_everything(tmp_path):
    for only_trainable in (True, False):
        folder = tmp_path / str(only_trainable)
        model, deltas = prepared(only_trainable=only_trainable)
        trainer(model, folder, save_strategy="steps", save_steps=2).train()
        saved = load_file(folder / "checkpoint-2" / "model.safetensors")
        expected = values(deltas)
        assert_same({key: saved[key] for key in expected}, expected)
        backbone = saved.keys() - expected.keys()
        assert bool(backbone) != only_trainable


@pytest.mark.covers("load")
def test_a_saved_model_is_the_plain_one_and_has_its_deltas_beside_it(tmp_path):
    model, _ = prepared()
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    plain, report = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(plain.eval()), logits(build("bert")))
    opendelta.load(tmp_path / "saved", plain)
    assert torch.equal(logits(plain.eval()), logits(model.eval()))


@pytest.mark.covers("load")
@filtered_or_not
def test_a_checkpoint_is_read_by_load_and_never_as_a_model_without_its_backbone(
    only_trainable, tmp_path
):
    model, _ = prepared(only_trainable=only_trainable)
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    again = build("bert")
    opendelta.load(folder, again)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    if only_trainable:
        with pytest.raises(OSError, match="the-backbone-is-not-in-this-checkpoint"):
            type(model).from_pretrained(folder)
    else:
        plain = type(model).from_pretrained(folder)
        assert torch.equal(logits(plain.eval()), logits(build("bert")))


def test_training_in_mixed_precision_keeps_float32_deltas_and_lets_them_go(tmp_path):
    model, deltas = prepared()
    before = values(deltas)
    run = trainer(model, tmp_path, bf16=True)
    run.train()
    after = trained(deltas)
    for key, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, before[key]), key
    run.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    detach(deltas)
    opendelta.assert_pristine(model)
    assert torch.equal(logits(model.eval()), logits(build("bert")))


# ------------------------------------------------------------------------------ quantised backbones
QUANTISED = {
    "bitsandbytes 8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bit": BitsAndBytesConfig(load_in_4bit=True),
    "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}


@pytest.fixture(params=QUANTISED)
def quantised(request, tmp_path):
    """A function that gives the same quantised model each time, under a LoRA.

    On some CPUs bitsandbytes needs rows of whole blocks of 64 values.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(build("llama").config)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")

    def make():
        model = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "plain",
            quantization_config=QUANTISED[request.param],
            device_map={"": "cpu"},
        )
        torch.manual_seed(0)
        LoraModel(model).freeze_module()
        return model

    return make


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_a_quantised_model_trains_and_resumes(quantised, tmp_path):
    whole, model = quantised(), quantised()
    trainer(whole, tmp_path / "whole").train()
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(model, tmp_path, **options).train()
    again = quantised()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not torch.equal(logits(whole), logits(quantised()))
    assert torch.equal(logits(again), logits(whole))


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_only_trainer_takes_a_quantised_model_for_one_with_adapters(quantised, tmp_path):
    model = quantised()
    trainer(copy.deepcopy(model), tmp_path)
    shake(next(iter(opendelta.composition(model))))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    with pytest.warns(opendelta.UncheckedWarning):
        opendelta.load(tmp_path / "saved", again)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()
    next(iter(opendelta.composition(model))).detach()
    opendelta.assert_pristine(model)
    assert "_hf_peft_config_loaded" not in vars(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    LoraModel(model).detach()
    trainer(model, tmp_path)
