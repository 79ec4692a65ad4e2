"""TRL's trainers train deltas as they train PEFT's, and their reference model takes no memory."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.models import build, token_ids
from support.nets import shake
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.callbacks import SyncRefModelCallback

import opendelta
from opendelta import AdapterModel, LoraModel, UnreachedWarning
from opendelta.integrations.trl import reference, shared_reference

TEXT = "<pad> <s> </s> <unk> the cat sat on a mat and saw one red dog run far away"
WORDS = TEXT.split()
PLACES = ["q_proj", "v_proj"]


def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


ROWS = ["the cat sat on a mat", "one red dog saw the cat", "a dog run far", "the mat saw a cat"]
TEXTS = Dataset.from_dict({"text": ROWS})
PAIRS = Dataset.from_dict(
    {"prompt": ["the cat", "one red"] * 2, "chosen": [" sat on", " dog run"] * 2,
     "rejected": [" far away", " saw a mat"] * 2}
)  # fmt: skip
PROMPTS = Dataset.from_dict({"prompt": ["the cat", "one red dog", "a dog", "the mat"]})


def options(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2,
        "learning_rate": 0.05, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "save_strategy": "no", "dataloader_pin_memory": False,
        "seed": 3, **more,
    }  # fmt: skip


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_lora(model=None, **places):
    model = build("llama") if model is None else model
    lora = LoraModel(model, **{"lora_r": 4, "lora_alpha": 8, "modified_modules": PLACES, **places})
    lora.freeze_module()
    return model, lora


def with_peft(lora, model=None):
    """PEFT's LoRA with the start values of ours."""
    model = build("llama") if model is None else model
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=PLACES))
    for where, layer in lora.layers.items():
        module = model.get_submodule(f"base_model.model.{where}")
        module.lora_A["default"].weight.data.copy_(layer.lora_A)
        module.lora_B["default"].weight.data.copy_(layer.lora_B)
    return model


def sft(model, folder, **more):
    arguments = SFTConfig(**options(folder, **more))
    return SFTTrainer(model, arguments, train_dataset=TEXTS, processing_class=tokenizer())


def test_sft_has_peft_s_losses(tmp_path):
    model, lora = with_lora()
    theirs = with_peft(lora)
    ours = losses(sft(model, tmp_path))
    assert ours == pytest.approx(losses(sft(theirs, tmp_path)), abs=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_sft_has_peft_s_losses_over_a_quantised_model(bits, tmp_path):
    build("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantised = partial(
        LlamaForCausalLM.from_pretrained,
        tmp_path, quantization_config=config, device_map={"": "cpu"},
    )  # fmt: skip
    model, lora = with_lora(quantised())
    theirs = with_peft(lora, quantised())
    ours = losses(sft(model, tmp_path))
    assert ours == pytest.approx(losses(sft(theirs, tmp_path)), abs=1e-3)
    assert ours[-1] < ours[0]


@pytest.mark.covers("UnreachedWarning")
def test_a_head_whose_weight_the_loss_reads_is_warned_of(tmp_path):
    model, _ = with_lora(modules_to_save=["lm_head"])
    with pytest.warns(UnreachedWarning, match=r"lm_head\.deltas\.lora\. .*reads=True"):
        losses(sft(model, tmp_path))


def dpo(model, folder, ref_model=None, **more):
    arguments = DPOConfig(**options(folder, **more))
    return DPOTrainer(
        model, ref_model, arguments, train_dataset=PAIRS, processing_class=tokenizer()
    )  # fmt: skip


def test_dpo_has_peft_s_losses_with_a_reference_without_memory(tmp_path):
    model, lora = with_lora()
    theirs = with_peft(lora)
    twin = reference(model)
    assert {p.data_ptr() for p in twin.parameters()} <= {p.data_ptr() for p in model.parameters()}
    ours = losses(dpo(model, tmp_path, twin))
    assert ours == pytest.approx(losses(dpo(theirs, tmp_path)), abs=1e-5)
    assert ours[-1] < ours[0]
    assert not opendelta.composition(twin).names


def test_a_reference_keeps_the_deltas_that_are_not_trained_and_follows_none_that_are():
    model, first = with_lora()
    shake(first)
    ids = token_ids()
    before = model(ids).logits
    second = AdapterModel(model)
    shake(second)
    twin = reference(model, second)
    assert opendelta.composition(twin).names == ["lora"]
    assert torch.equal(twin(ids).logits, before)
    with torch.no_grad():
        next(second.parameters()).add_(1)
    assert torch.equal(twin(ids).logits, before)
    assert not any(p.requires_grad for p in twin.parameters())
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(opendelta.DeltaError, match="other"):
        reference(model, "other")


def test_grpo_with_beta_takes_the_shared_reference(tmp_path):
    def run(model, beta):
        arguments = GRPOConfig(
            **options(tmp_path, beta=beta, num_generations=2, max_completion_length=4,
                      per_device_train_batch_size=4, use_vllm=False)
        )  # fmt: skip

        def reward(completions, **_):
            return [float(len(set(text.split()))) for text in completions]

        with shared_reference(model) as twin:
            trainer = GRPOTrainer(
                model, reward, arguments, train_dataset=PROMPTS, processing_class=tokenizer()
            )
        assert trainer.accelerator.unwrap_model(trainer.ref_model) is twin
        trainer.train()
        return [row["kl"] for row in trainer.state.log_history if "kl" in row]

    model, lora = with_lora()
    theirs = with_peft(lora)
    kl = run(model, beta=0.5)
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 0
    del theirs


@pytest.mark.parametrize("how", ["trainer", "callback"])
def test_a_reference_that_is_synchronised_is_refused_before_it_is_written(how, tmp_path):
    model, _ = with_lora()
    twin = reference(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def run():
        if how == "callback":
            return SyncRefModelCallback.sync_target_model(model, twin, 0.6)
        return dpo(model, tmp_path, twin, sync_ref_model=True, ref_model_sync_steps=2).train()

    Accelerator(cpu=True)
    with pytest.raises(opendelta.DeltaError, match="sync_ref_model=True writes"):
        run()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_reward_has_peft_s_losses(tmp_path):
    def built():
        torch.manual_seed(0)
        config = build("llama").config
        config.num_labels = 1
        return LlamaForSequenceClassification(config)

    def run(model):
        arguments = RewardConfig(**options(tmp_path))
        return losses(
            RewardTrainer(model, arguments, train_dataset=PAIRS, processing_class=tokenizer())
        )

    model = built()
    lora = LoraModel(model, lora_r=4, lora_alpha=8, modified_modules=PLACES)
    lora.freeze_module()
    theirs = get_peft_model(built(), LoraConfig(r=4, lora_alpha=8, target_modules=PLACES))
    for where, layer in lora.layers.items():
        module = theirs.get_submodule(f"base_model.model.{where}")
        module.lora_A["default"].weight.data.copy_(layer.lora_A)
    ours = run(model)
    assert ours == pytest.approx(run(theirs), abs=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_deltas_on_the_head_act_in_the_chunked_loss(kind, tmp_path):
    def run(**more):
        places = {"modified_modules": ["lm_head"], "reads": True}
        if kind == "copy":
            places = {"modified_modules": ["q_proj"], "modules_to_save": ["lm_head"], "reads": True}
        model, lora = with_lora(**places)
        before = [p.detach().clone() for p in lora.parameters()]
        found = losses(sft(model, tmp_path, **more))
        assert not any(map(torch.equal, before, lora.parameters()))
        return found

    plain = run(loss_type="nll")
    assert run(loss_type="chunked_nll") == pytest.approx(plain, abs=1e-4)
    assert plain[-1] < plain[0]
