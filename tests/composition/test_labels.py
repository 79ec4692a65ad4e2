"""Tasks side by side: heads for other numbers of labels than the backbone's, and their losses."""

import copy
import itertools
import pickle

import pytest
import torch
import transformers
from support.models import FAMILIES, token_ids
from support.nets import COPIES, IDS, copied, net, shake, untouched

import opendelta
from opendelta import AutoDeltaModel, LoraModel, SiteError

pytestmark = pytest.mark.covers("DeltaConfig.num_labels")

MODELS = {
    "bert": (transformers.BertForSequenceClassification, "classifier"),
    "roberta": (transformers.RobertaForSequenceClassification, "classifier"),
    "gpt2": (transformers.GPT2ForSequenceClassification, "score"),
    "llama": (transformers.LlamaForSequenceClassification, "score"),
    "bart": (transformers.BartForSequenceClassification, "classification_head"),
    "t5": (transformers.T5ForSequenceClassification, "classification_head"),
}
BATCH = {"input_ids": token_ids().index_fill(1, torch.tensor([6]), 3)}


def build(name, labels=2):
    """A small classifier of one of the families; its sequences end with a 3."""
    config = copy.deepcopy(FAMILIES[name].config)
    config.num_labels, config.eos_token_id = labels, 3
    if name == "t5":
        config.classifier_dropout = 0.0
    torch.manual_seed(0)
    return MODELS[name][0](config).eval().requires_grad_(False)


def put(model, name, labels, task):
    """A task with a head of its own."""
    delta = LoraModel(model, modules_to_save=[MODELS[name][1]], num_labels=labels, name=task)
    return shake(delta, seed=labels)


@pytest.mark.parametrize("name", MODELS)
def test_switching_the_task_switches_head_loss_and_config(name):
    model = build(name)
    plain, config = model(**BATCH).logits, model.config
    with untouched(model):
        tasks = {labels: put(model, name, labels, f"task{labels}") for labels in (3, 5)}
        c = opendelta.composition(model)
        for labels, task in tasks.items():
            with c.only(task):
                wanted = torch.tensor([0, labels - 1])
                out = model(**BATCH, labels=wanted)
                assert out.logits.shape == (2, labels)
                expected = torch.nn.functional.cross_entropy(out.logits, wanted)
                assert torch.allclose(out.loss, expected)
                assert model.config.num_labels == len(model.config.id2label) == labels
                assert model.config.hidden_size == config.hidden_size
                assert getattr(model, "num_labels", labels) == labels
        with c.only():
            assert torch.equal(model(**BATCH).logits, plain)
            assert model.config is config
        for task in tasks.values():
            task.detach()


def test_one_label_is_a_regression_and_the_backbones_kind_of_problem_stays():
    model = build("bert")
    model(**BATCH, labels=torch.tensor([0, 1]))
    assert model.config.problem_type == "single_label_classification"
    task = put(model, "bert", 1, "score")
    wanted = torch.tensor([0.5, -0.5])
    out = model(**BATCH, labels=wanted)
    assert torch.allclose(out.loss, (out.logits.squeeze() - wanted).pow(2).mean())
    assert model.config.problem_type == "regression"
    with task.disabled():
        assert model.config.problem_type == "single_label_classification"
        model(**BATCH, labels=torch.tensor([0, 1]))


def test_what_is_set_on_the_config_while_a_task_acts_stays():
    model = build("bert")
    task = put(model, "bert", 5, "five")
    model.config.pad_token_id = 4
    task.detach()
    assert model.config.pad_token_id == 4


def test_tasks_of_different_label_counts_come_back_bit_for_bit(tmp_path):
    model = build("bert")
    tasks = [put(model, "bert", labels, f"task{labels}") for labels in (3, 2)]
    c, expected = opendelta.composition(model), {}
    for task in tasks:
        with c.only(task):
            expected[task.name] = model(**BATCH).logits
        task.save_finetuned(tmp_path / task.name)
    c.save(tmp_path / "both")
    for folders in (["task2", "task3"], ["both"]):
        fresh = build("bert", labels=7)  # the head that a task brings does not stand on this one
        fresh.bert.load_state_dict(build("bert").bert.state_dict())
        with untouched(fresh):
            for folder in folders:
                opendelta.load(tmp_path / folder, fresh)
            loaded = opendelta.composition(fresh)
            for name, logits in expected.items():
                with loaded.only(name):
                    assert torch.equal(fresh(**BATCH).logits, logits)
            for delta in loaded:
                delta.detach()


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_model_keeps_the_labels_of_the_task(how):
    model = build("bert")
    put(model, "bert", 5, "five")
    expected = model(**BATCH, labels=torch.tensor([4, 0])).loss
    twin = copied(model, how)
    assert torch.equal(twin(**BATCH, labels=torch.tensor([4, 0])).loss, expected)
    assert twin.config.num_labels == 5
    opendelta.composition(twin)["five"].detach()
    assert twin.config.num_labels == 2
    assert type(twin.config) is transformers.BertConfig


def test_the_config_that_a_task_shows_can_be_copied_and_saved(tmp_path):
    model = build("bert")
    put(model, "bert", 5, "five")
    for shown in (
        model.config,
        copy.deepcopy(model.config),
        pickle.loads(pickle.dumps(model.config)),
    ):
        assert shown.num_labels == 5
        shown.save_pretrained(tmp_path)
        assert transformers.AutoConfig.from_pretrained(tmp_path).num_labels == 5


def test_a_task_with_its_own_labels_compiles_into_one_graph():
    model = build("bert")
    put(model, "bert", 5, "five")
    expected = model(**BATCH, labels=torch.tensor([4, 0])).loss
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**BATCH, labels=torch.tensor([4, 0])).loss, expected)


@pytest.mark.covers("Composition.to_backbone")
def test_the_plain_backbone_of_a_task_has_its_labels(tmp_path):
    model = build("bert")
    put(model, "bert", 5, "five")
    expected = model(**BATCH).logits
    plain = opendelta.composition(model).to_backbone()
    plain.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.allclose(again(**BATCH).logits, expected, atol=1e-5)
    assert again.num_labels == 5
    assert model.__dict__["config"].num_labels == 2


NAMES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


@pytest.mark.covers("from_pretrained")
@pytest.mark.parametrize("tasks", [[5], [5, 3]], ids=["one", "several"])
def test_a_saved_model_has_the_config_of_its_own_head(tasks, tmp_path):
    model = build("bert")
    model.config.update({**NAMES, "problem_type": "single_label_classification"})
    model.config.to_json_file(tmp_path / "before.json")
    for labels in tasks:
        put(model, "bert", labels, f"task{labels}")
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    for key in (*NAMES, "problem_type"):
        before = transformers.BertConfig.from_json_file(tmp_path / "before.json")
        assert getattr(plain.config, key) == getattr(before, key)
    with opendelta.composition(model).only():
        assert torch.equal(plain.eval()(**BATCH).logits, model(**BATCH).logits)
    again = opendelta.from_pretrained(tmp_path)
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    assert again.config.num_labels == tasks[-1]


@pytest.mark.parametrize("whole", [True, False])
def test_trainer_writes_the_config_of_the_models_own_head(whole, tmp_path):
    config = copy.deepcopy(FAMILIES["bert"].config)
    model = transformers.BertForTokenClassification(config)
    task = LoraModel(model, modules_to_save=["classifier"], num_labels=5)
    task.freeze_module(set_state_dict=False if whole else None)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row.clamp(max=4)} for row in token_ids(rows=2)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    for folder in ("saved", "checkpoint-1"):
        assert transformers.AutoConfig.from_pretrained(tmp_path / folder).num_labels == 2
    for folder in ("saved", "checkpoint-1") if whole else ("saved",):
        again = opendelta.from_pretrained(tmp_path / folder)
        assert torch.equal(again(**BATCH).logits, model.eval()(**BATCH).logits)


def test_labels_without_a_head_to_replace_are_refused():
    model = build("bert")
    with untouched(model):
        with pytest.raises(opendelta.OptionError, match=r"num_labels=5.*name the classifier in it"):
            LoraModel(model, num_labels=5)
        with pytest.raises(opendelta.OptionError, match=r"num_labels=5.*name the classifier in it"):
            LoraModel(model, num_labels=5, modules_to_save=["pooler"])
        with pytest.raises(opendelta.OptionError, match=r"num_labels=0 must be at least 1"):
            LoraModel(model, num_labels=0, modules_to_save=["classifier"])
    plain = net()
    with (
        untouched(plain),
        pytest.raises(opendelta.OptionError, match="Net has no config"),
    ):
        LoraModel(plain, modified_modules=["linear"], modules_to_save=["head"], num_labels=5)
    assert plain(IDS).shape[-1] == 3


def test_as_many_labels_as_the_backbone_has_is_a_copy_of_its_head():
    model = build("bert")
    plain = model(**BATCH).logits
    LoraModel(model, modules_to_save=["classifier"], num_labels=2)
    assert torch.equal(model(**BATCH).logits, plain)


def test_trainer_trains_each_task_with_its_own_labels(tmp_path):
    model = build("bert")
    generator = torch.Generator().manual_seed(0)
    for labels in (5, 3):
        task = put(model, "bert", labels, f"task{labels}")
        task.freeze_module()
        with opendelta.composition(model).only(task):
            wanted = torch.randint(labels, (16,), generator=generator).tolist()
            ids = token_ids(rows=16).tolist()
            data = [{"input_ids": i, "labels": w} for i, w in zip(ids, wanted, strict=True)]
            arguments = transformers.TrainingArguments(
                str(tmp_path), num_train_epochs=12, learning_rate=2e-2, report_to=[],
                disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
                dataloader_pin_memory=False, per_device_train_batch_size=16,
            )  # fmt: skip
            trainer = transformers.Trainer(model, arguments, train_dataset=data)
            before = trainer.evaluate(data)["eval_loss"]
            trainer.train()
            assert trainer.evaluate(data)["eval_loss"] < 0.9 * before
            found = trainer.predict(data).predictions
            assert found.shape == (16, labels)


def test_from_finetuned_brings_the_head_of_another_label_count(tmp_path):
    model = build("bert")
    put(model, "bert", 5, "five").save_finetuned(tmp_path)
    fresh = build("bert")
    delta = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert delta.config.num_labels == 5
    assert torch.equal(fresh(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.covers("LoadReport")
def test_what_is_other_in_the_backbones_config_is_reported_and_not_refused(tmp_path):
    model = build("bert")
    put(model, "bert", 5, "five").save_finetuned(tmp_path)
    config = copy.deepcopy(FAMILIES["bert"].config)
    config.hidden_dropout_prob = 0.5
    torch.manual_seed(0)
    fresh = transformers.BertForMaskedLM(config)
    fresh.bert.load_state_dict(build("bert").bert.state_dict(), strict=False)
    fresh.classifier = torch.nn.Linear(32, 2)
    report = opendelta.load(tmp_path, fresh.eval(), strict=False)
    assert report.other_config == {"hidden_dropout_prob": (0.0, 0.5)}
    assert str(report) == (
        "loaded five, saved from a BertForSequenceClassification with hidden_dropout_prob=0.0 "
        "(here 0.5)"
    )


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "olora"}])
@pytest.mark.parametrize("first", ["copy", "lora"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_delta_on_a_head_beside_a_copy_with_other_labels_is_refused(name, first, lora):
    model = build(name)
    head = MODELS[name][1] if name == "bert" else "classifier.out_proj"
    options = {"modules_to_save": [MODELS[name][1]], "num_labels": 5, "name": "task"}
    rank = 8 if first == "copy" and name == "bert" else 2

    def on_the_head():
        return LoraModel(model, lora_r=rank, modified_modules=[head], name="other", **lora)

    make = [lambda: LoraModel(model, **options), on_the_head]
    make = make if first == "copy" else make[::-1]
    make[0]()
    there = opendelta.composition(model).names
    says = r"its place, with other sizes \(num_labels\)" if name == "bert" else "inside"
    with pytest.raises(SiteError, match=f"'classifier.*{says}"):
        make[1]()
    assert opendelta.composition(model).names == there


def test_a_delta_on_a_head_beside_a_copy_with_as_many_labels_acts():
    model = build("bert")
    shake(LoraModel(model, modules_to_save=["classifier"], name="task"))
    before = model(**BATCH).logits
    shake(LoraModel(model, modified_modules=["classifier"], name="other"))
    assert not torch.allclose(model(**BATCH).logits, before)


@pytest.mark.parametrize("order", [*itertools.permutations([2, 3, 5])])
def test_the_last_head_that_acts_says_the_number_of_labels_the_backbones_own_too(order):
    """2 is the number of the backbone: such a delta alone changes no labels."""
    model = build("bert")
    for labels in (2, 3, 5):
        put(model, "bert", labels, f"task{labels}")
    composition = opendelta.composition(model)
    composition.reorder([f"task{labels}" for labels in order])
    names = list(composition.names)
    for count in (3, 2, 1, 0):
        with composition.only(*names[:count]):
            wanted = order[count - 1] if count else 2
            found = model(**BATCH, labels=torch.zeros(len(BATCH["input_ids"]), dtype=torch.long))
            assert found.logits.shape[-1] == model.num_labels == model.config.num_labels == wanted
    composition["task2"].disable()
    assert model.num_labels == model(**BATCH).logits.shape[-1] != 2


def two_heads():
    """Models of transformers that average the logits of two heads."""
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    levit = {"hidden_sizes": [16, 16, 16], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
             "num_attention_heads": [2, 2, 2], "image_size": 64}  # fmt: skip
    swift = {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 8, 8]}
    t = transformers
    return {
        "deit": lambda: t.DeiTForImageClassificationWithTeacher(
            t.DeiTConfig(**vit, intermediate_size=32, patch_size=8)
        ),
        "levit": lambda: t.LevitForImageClassificationWithTeacher(t.LevitConfig(**levit)),
        "swiftformer": lambda: t.SwiftFormerForImageClassification(t.SwiftFormerConfig(**swift)),
    }


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit", ["cls_classifier", "distillation_classifier"]),
        ("levit", ["classifier", "classifier_distill"]),
        ("swiftformer", ["dist_head", "head"]),
    ],
)
def test_heads_that_a_model_averages_change_their_size_together(name, heads):
    model = two_heads()[name]().eval()
    images = torch.randn(2, 3, *[64 if name == "levit" else 32] * 2)
    before = opendelta.snapshot(model)
    for one, other in (heads, heads[::-1]):
        wanted = f"{type(model).__name__} averages .*{other!r}.*: copy both"
        with pytest.raises(opendelta.OptionError, match=wanted):
            opendelta.BitFitModel(model, modules_to_save=[f"[r]^{one}$"], num_labels=5)
    opendelta.assert_pristine(model, like=before)
    one_head = opendelta.BitFitModel(model, modules_to_save=[f"[r]^{heads[0]}$"])
    assert model(pixel_values=images).logits.shape == (2, 2)
    one_head.detach()
    opendelta.BitFitModel(model, modules_to_save=[f"[r]^{each}$" for each in heads], num_labels=5)
    assert model(pixel_values=images).logits.shape == (2, 5)


class TwoHeads(torch.nn.Module):
    """Two heads of one size that are two outputs."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(num_labels=2)
        self.body = torch.nn.Linear(4, 4)
        self.head, self.dist_head = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x)), self.dist_head(self.body(x))


def test_two_heads_of_a_model_of_ones_own_may_have_two_sizes():
    model = TwoHeads()
    LoraModel(model, modified_modules=["body"], modules_to_save=["[r]^head$"], num_labels=5)
    assert [out.shape[-1] for out in model(torch.randn(3, 4))] == [5, 2]
