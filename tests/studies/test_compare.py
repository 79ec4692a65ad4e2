"""`opendelta.compare`: what it trains, measures, writes, goes on with, and refuses."""

import contextlib
import copy
import csv
import dataclasses
import importlib
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from support.nets import untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, BitFitModel, DeltaError, LoraConfig, LoraModel, Task, Texts
from opendelta._deltas import registry
from opendelta.studies import contenders as spelled

pytestmark = pytest.mark.covers("compare", "Comparison", "Task", "Texts")
X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two classes from four numbers, with dropout."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.drop(self.body(x).relu()))


def net():
    torch.manual_seed(0)
    return Net()


def collate(rows):
    return {"x": torch.stack([row["x"] for row in rows])}


def labels(batch):
    return (batch["x"][:, 0] > 0).long()


def task(**changes):
    rows = [{"x": x} for x in X]
    return Task(**{
        "name": "signs", "train": rows[:64], "test": rows[64:], "collate": collate,
        "measure": lambda output, batch: (output.argmax(-1) == labels(batch)).float(),
        "loss": lambda output, batch: nn.functional.cross_entropy(output, labels(batch)),
        **changes,
    })  # fmt: skip


def compare(model, deltas, **options):
    options = {"progress": False, "epochs": 4, "batch_size": 8, "rates": RATES, **options}
    return opendelta.compare(model, task(), deltas, **options)


RATES = {"lora": 0.1, "adapter": 0.1, "bitfit": 0.1, "ia3": 0.1}


DELTAS = ["lora:lora_r=2@body", "adapter:bottleneck_dim=4@body", "lora@body+bitfit@body"]


def test_each_is_trained_alone_on_the_one_model_which_is_left_as_it_was():
    model = net().eval()
    model.body.requires_grad_(False)
    with untouched(model):
        report = compare(model, DELTAS, seeds=2, epochs=8)
    assert [row.deltas for row in report.rows] == DELTAS
    assert [row.parameters for row in report.rows] == [2 * 12, 8 * 4 * 2 + 4 + 8, 8 * 12 + 8]
    assert [len(row.scores) for row in report.rows] == [2, 2, 2]
    assert report.best.score > 0.8 > compare(model, DELTAS[:1], max_steps=1).best.score


def test_a_training_is_what_it_is_by_hand():
    """The loop, the schedule and the optimizer against torch's own."""
    report = opendelta.compare(
        net(), task(), {"mine": LoraConfig(modified_modules=["body"], lora_r=2)}, batch_size=16,
        epochs=2, rates={"lora": 0.02}, seeds=[7], progress=False,
    )  # fmt: skip
    model = net()
    torch.manual_seed(7)
    delta = LoraModel(model, modified_modules=["body"], lora_r=2)
    delta.freeze_module()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.02, weight_decay=0)
    after = torch.optim.lr_scheduler.LambdaLR
    schedule = after(optimizer, lambda step: min(step + 1, (8 - step) / 7))
    orders, losses = torch.Generator().manual_seed(7), []
    for _ in range(2):
        for rows in torch.randperm(64, generator=orders).split(16):
            loss = nn.functional.cross_entropy(model(X[rows]), (X[rows][:, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(delta.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    (run,) = report.runs
    assert run.losses == pytest.approx(losses, rel=1e-5)
    right = (model.eval()(X[64:]).argmax(-1) == (X[64:, 0] > 0).long()).float().mean()
    assert run.score == pytest.approx(right.item())
    assert run.rates == {"lora": 0.02}


def test_the_same_seed_gives_the_same_numbers_whatever_ran_before():
    one = compare(net(), DELTAS, seeds=2)
    two = compare(net(), DELTAS[::-1], seeds=[1, 0])
    ours = {(run.deltas, run.seed): (run.score, run.losses) for run in one.runs}
    assert ours == {(run.deltas, run.seed): (run.score, run.losses) for run in two.runs}
    assert len({tuple(losses) for _, losses in ours.values()}) == 6


def test_memory_is_what_autograd_keeps_and_what_adamw_holds():
    (run,) = compare(net(), ["bitfit@body"], batch_size=16).runs
    ours = 8 * 4 * 3  # gradients and two moments of the bias
    kept = 4 * 16 * (8 + 8 + 2) + 16 * 8 + 16 * 8  # at least: relu, dropout's mask, log-softmax
    assert ours < run.memory < 10 * kept


def test_a_comparison_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    whole = compare(net(), DELTAS, seeds=2, out=tmp_path / "whole")
    train, calls = torch.optim.AdamW, []

    def stop(*arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    model = net()
    monkeypatch.setattr(torch.optim, "AdamW", stop)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        compare(model, DELTAS, seeds=2, out=tmp_path / "cut")
    with open(tmp_path / "cut" / "runs.jsonl", "a") as file:
        file.write('{"trial": fal')  # a line that a kill cut off
    again = compare(net(), DELTAS, seeds=2, out=tmp_path / "cut")
    assert len(calls) == 4 + 3
    assert [run.score for run in again.runs] == [run.score for run in whole.runs]
    more = compare(net(), [*DELTAS, "ia3@body"], seeds=3, out=tmp_path / "cut")
    assert len(calls) == 4 + 3 + 3 + 3
    assert len(more.rows) == 4


def test_the_folder_has_a_report_and_the_best_composition(tmp_path):
    report = compare(net(), DELTAS, seeds=2, out=tmp_path)
    held = json.loads((tmp_path / "report.json").read_text())
    assert held["best"] == report.best.deltas
    assert [row["score"] for row in held["rows"]] == [row.score for row in report.rows]
    for name in ("report.md", "scores.svg", "losses.svg"):
        assert report.rows[0].deltas.split("@")[0] in (tmp_path / name).read_text()
    model = net().eval()
    opendelta.load(tmp_path / "best", model)
    right = (model(X[64:]).argmax(-1) == (X[64:, 0] > 0).long()).float().mean()
    assert report.best_run.score == pytest.approx(right.item())


def test_other_settings_are_refused_in_the_folder_of_a_comparison(tmp_path):
    compare(net(), DELTAS[:1], out=tmp_path)
    with pytest.raises(DeltaError, match=r"other settings \(epochs: 4 there, 1 now\)"):
        compare(net(), DELTAS[:1], out=tmp_path, epochs=1)
    other = net()
    with torch.no_grad():
        other.body.weight.add_(1)
    with pytest.raises(DeltaError, match=r"other settings \(model: Net"):
        compare(other, DELTAS[:1], out=tmp_path)


def test_a_training_that_diverges_is_shown_and_is_never_the_best(tmp_path):
    def broken(model):
        delta = BitFitModel(model, modified_modules=["body"])
        nn.init.constant_(delta.layers["body"].bias, math.nan)

    report = compare(net(), {"broken": broken, "bitfit": "bitfit@body"}, out=tmp_path / "both")
    assert math.isnan(report.rows[0].score)
    assert report.best is report.rows[1]
    assert "diverged (1 of 1)" in str(report)
    held = json.loads((tmp_path / "both" / "report.json").read_text())
    assert held["rows"][0]["score"] is None
    assert compare(net(), {"broken": broken}, out=tmp_path / "one").best.deltas == "broken"


@pytest.mark.parametrize("trials", [3, 7])
@pytest.mark.parametrize("optuna", [True, False])
def test_a_sweep_takes_the_best_rate_on_examples_that_it_holds_out(trials, optuna, monkeypatch):
    if not optuna:
        monkeypatch.setitem(sys.modules, "optuna", None)
    elif not find_spec("optuna"):
        pytest.skip("needs optuna")
    seen = []

    def measure(output, batch):
        seen.append(len(output))
        return nn.functional.cross_entropy(output, labels(batch), reduction="none")

    low = task(measure=measure, higher_is_better=False)
    options = {"rates": {"lora": 0.01}, "batch_size": 8, "epochs": 4, "progress": False}
    report = opendelta.compare(net(), low, ["lora@body"], sweep=trials, **options)
    (run,) = report.runs
    assert run.factor > 1
    assert run.rates["lora"] == pytest.approx(0.01 * run.factor)
    assert seen == [6] * trials + [32]
    assert run.score < opendelta.compare(net(), low, ["lora@body"], **options).runs[0].score


def test_saved_compositions_functions_and_configs_are_compared_too(tmp_path):
    trained = LoraModel(net(), modified_modules=["body"])
    trained.freeze_module()
    trained.save_finetuned(tmp_path / "start")

    def both(model):
        for name in ("a", "b"):
            LoraModel(model, modified_modules=["body"], name=name)
        opendelta.AverageModel(model, deltas=["a", "b"], learn=True, name="mean")

    report = compare(
        net(),
        {
            "from": str(tmp_path / "start"),
            "mean": both,
            "config": LoraConfig(modified_modules=["body"]),
        },
    )
    assert [row.deltas for row in report.rows] == ["from", "mean", "config"]
    assert list(report.rows[1].rates) == ["a", "b", "mean"]


def test_plus_signs_part_methods_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert spelled.divided("lora+adapter:bottleneck_dim=4@fc+bitfit") == [
        "lora", "adapter:bottleneck_dim=4@fc", "bitfit",
    ]  # fmt: skip
    assert spelled.divided(r"lora@[r]layers\.\d+\.fc+adapter") == [
        r"lora@[r]layers\.\d+\.fc",
        "adapter",
    ]
    assert spelled.divided("saved+lora") == ["saved", "lora"]


def test_a_text_may_begin_with_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    texts = ["mix=lora:lora_r=2@body+ia3@body", "lora:lora_r=2@body", "a=b", "a=b+lora"]
    mix, lora, folder, more = spelled.contenders(texts)
    assert (mix.name, [part.delta_type for part in mix.parts]) == ("mix", ["lora", "ia3"])
    assert lora.name == "lora:lora_r=2@body"
    assert folder.parts == more.parts[:1] == (Path("a=b"),)
    assert len(more.parts) == 2
    (named,) = spelled.contenders({"mine": "lora@body"})
    assert named.name == "mine"
    with pytest.raises(DeltaError, match="'mix' is given twice"):
        spelled.contenders(["mix=lora", "mix=ia3"])


def test_the_table_says_when_nothing_beats_the_largest_class():
    report = compare(net(), ["bitfit@body"])
    assert "; 32 steps; 1 seed" in str(report)
    low = dataclasses.replace(report, baseline=report.best.score)
    words = " ".join(str(low).split())
    assert "no composition beats the largest class alone" in words
    assert "train longer (--epochs)" in low._markdown()
    high = dataclasses.replace(report, baseline=report.best.score - 0.01)
    assert "no composition beats" not in " ".join(str(high).split())


class Words:
    """A tokenizer with a token for each letter."""

    pad_token, eos_token, eos_token_id, padding_side = "0", "1", 1, "right"

    def __call__(self, texts, **_):
        return {"input_ids": [[2 + ord(letter) % 30 for letter in text] for text in texts]}


def rows(count):
    return [{"text": "ab" * (i % 5 + 1), "label": "odd" if i % 2 else "even"} for i in range(count)]


def test_texts_of_files_lists_and_datasets_are_split_without_overlap(tmp_path):
    given = [{**row, "text": row["text"] + str(i)} for i, row in enumerate(rows(50))]
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(given)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, given)))
    (tmp_path / "t.json").write_text(json.dumps(given))
    splits = [Texts(given).splits()] + [
        Texts(tmp_path / f"t.{e}").splits() for e in ("csv", "jsonl", "json")
    ]
    assert all(split == splits[0] for split in splits)
    train, test = splits[0]
    assert (len(train), len(test)) == (40, 10)
    assert sorted(r["text"] for r in train + test) == sorted(r["text"] for r in given)
    assert Texts({"train": given, "validation": given[:3]}).splits()[1] != test
    assert len(Texts(given, train_size=7, test_size=5).splits()[0]) == 7


def test_texts_are_classified_and_the_largest_class_is_the_baseline():
    made = Texts(rows(40)[:31]).task(Words())
    assert (made.labels, made.classes, made.unit) == (2, ["even", "odd"], "accuracy")
    share = sum(each["labels"] for each in made.test) / len(made.test)
    assert made.baseline == max(share, 1 - share)


def lengths_of_batches(made, epochs):
    """The lengths in each batch of 8, in each epoch, as a training collates them."""
    seen = []

    def collated(rows):
        seen.append([len(row["x"]) for row in rows])
        return {"input": torch.stack([row["x"][:1] for row in rows])}

    model = nn.Linear(1, 2)
    loss = lambda output, _: output.square().mean()  # noqa: E731
    measured = dataclasses.replace(made, collate=collated, loss=loss, measure=loss)
    opendelta.compare(
        model, measured, ["bitfit@root"], progress=False, epochs=epochs, batch_size=8, rates=RATES
    )
    per_epoch = math.ceil(len(made.train) / 8)
    seen = seen[-epochs * per_epoch - 1 :][: epochs * per_epoch]  # one batch of tests is the last
    return [seen[at : at + per_epoch] for at in range(0, len(seen), per_epoch)]


def test_batches_hold_examples_of_like_length():
    sizes = torch.randint(1, 60, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [{"x": torch.ones(size)} for size in sizes]
    made = Task("sized", rows, rows[:2], collate, measure=lambda output, _: output)
    grouped = dataclasses.replace(made, length=lambda row: len(row["x"]))
    waste = {}
    for each in (made, grouped):
        epochs = lengths_of_batches(each, 2)
        assert all(sorted(size for batch in e for size in batch) == sorted(sizes) for e in epochs)
        assert epochs[0] != epochs[1]
        assert lengths_of_batches(each, 2) == epochs
        padded = sum(max(batch) * len(batch) for epoch in epochs for batch in epoch)
        waste[each.length is None] = padded / (2 * sum(sizes)) - 1
    first = [max(batch) for batch in epochs[0]]
    assert first != sorted(first)  # long and short ones in turn
    assert waste[False] < waste[True] / 3
    assert made.fingerprint() != grouped.fingerprint()


def test_texts_tell_their_lengths():
    made = Texts(rows(40)).task(Words())
    assert [made.length(each) for each in made.train] == [len(e["input_ids"]) for e in made.train]


def test_texts_to_continue_are_joined_and_cut_and_scored_by_loss():
    made = Texts([{"text": "abcdefg"}] * 20, label=None, max_length=16).task(Words())
    assert made.higher_is_better is False
    assert {len(piece) for piece in made.train} == {16}
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    report = opendelta.compare(model, made, ["lora", "prefix"], progress=False, epochs=2)
    row = report.rows[0]
    fresh = copy.deepcopy(model).eval()
    ids = torch.tensor(made.test)
    with torch.no_grad():
        before = fresh(input_ids=ids, labels=ids).loss.item()
    assert row.score < before
    assert report.baseline is None


WRONG = {
    "nothing.csv": "there is no such file, and the built-in tasks are trec, sms",
    "broken.json": "cannot be read as json",
    "texts.txt": "must end in .csv, .tsv, .json or .jsonl",
    "columns.jsonl": r"row 1 has no value in column 'text'; its columns are \['line', 'label'\]",
    "numbers.jsonl": "write a Task of your own",
    "one.jsonl": "all texts are of the one class 'a'",
    "few.jsonl": "some must be left to learn from",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_task_is_refused(name, tmp_path):
    lines = {
        "columns.jsonl": [{"line": "a", "label": 0}],
        "numbers.jsonl": [{"text": "a", "label": 0.5}] * 9,
        "one.jsonl": [{"text": "a", "label": "a"}] * 9,
        "few.jsonl": [{"text": "a", "label": "a"}],
    }
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "texts.txt").write_text("a")
    for file, held in lines.items():
        (tmp_path / file).write_text("\n".join(map(json.dumps, held)))
    with pytest.raises(DeltaError, match=WRONG[name]):
        Texts(tmp_path / name).task(Words())


REFUSED = {
    "seeds=\\[\\] must be": {"seeds": []},
    "epochs=0 must be a whole number from 1": {"epochs": 0},
    "sweep=-1 must be": {"sweep": -1},
    "rates: 'lora' has 'high'": {"rates": {"lora": "high"}},
    "rates: 'lora' has 1e\\+30": {"rates": {"lora": 1e30}},
    "deltas: give at least one": {"deltas": []},
    "no such method|there is no method|unknown|nearest": {"deltas": ["lroa"]},
    "'lora' is given twice": {"deltas": ["lora", "lora"]},
    "a function needs a name": {"deltas": [print]},
    "no folder": {"deltas": [Path("nowhere")]},
    "the head of this Net is not known": {"task": task(labels=2)},
}


@pytest.mark.parametrize("error", REFUSED)
def test_what_cannot_be_compared_is_refused_before_the_first_training(error):
    given = {"deltas": ["lora@body"], "task": task(), "progress": False, **REFUSED[error]}
    model = net()
    with untouched(model), pytest.raises(DeltaError, match=error):
        opendelta.compare(model, **given)


def test_a_composition_that_cannot_be_made_ends_it_before_the_first_training(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_: pytest.fail("trained"))
    model = net()
    with untouched(model), pytest.raises(DeltaError, match="tail"):
        compare(model, ["lora@body", "lora@tail"])


def test_a_task_without_examples_is_refused():
    with pytest.raises(DeltaError, match="has no examples in test="):
        task(test=[])


def test_a_model_with_deltas_is_refused():
    model = net()
    AdapterModel(model, modified_modules=["body"], name="mine")
    with pytest.raises(DeltaError, match=r"the model carries mine: detach them"):
        compare(model, ["lora@body"])


def lora(rank):
    return LoraConfig(modified_modules=["body"], lora_r=rank)


def test_numbers_of_another_composition_or_code_are_never_given(tmp_path):
    """One name, in one folder: each change of what it means is trained anew, or refused."""
    first = compare(net(), {"mine": lora(1)}, out=tmp_path).runs[0]
    assert compare(net(), {"mine": lora(1)}, out=tmp_path).runs[0] == first
    assert compare(net(), {"mine": lora(2)}, out=tmp_path).runs[0].parameters == 24

    def adapter(model, width=4):
        AdapterModel(model, modified_modules=["body"], bottleneck_dim=width)

    def wider(model, width=6):
        AdapterModel(model, modified_modules=["body"], bottleneck_dim=width)

    sizes = [
        compare(net(), {"mine": put}, out=tmp_path).runs[0].parameters for put in (adapter, wider)
    ]
    assert sizes == [2 * 8 * 4 + 4 + 8, 2 * 8 * 6 + 6 + 8]
    for rank in (1, 2):
        delta = LoraModel(net(), modified_modules=["body"], lora_r=rank)
        delta.freeze_module()
        delta.save_finetuned(tmp_path / "start")
        run = compare(net(), {"mine": str(tmp_path / "start")}, out=tmp_path / "c").runs[0]
        assert run.parameters == 12 * rank


OWN = """
from torch import nn
from opendelta.author import Delta, DeltaConfig, OutputLayer

START = {start}

def put(model):
    NudgeModel(model, modified_modules=["body"])

def moved(h, b):
    return h {sign} b

class NudgeConfig(DeltaConfig):
    pass

class NudgeLayer(OutputLayer):
    def __init__(self, site, config):
        super().__init__()
        self.width = site.out_features
        self.b = nn.init.constant_(site.parameter(self.width), START)

    def change(self, h):
        return {change}

class NudgeModel(Delta):
    delta_type = "nudge"
    config_class, layer_class = NudgeConfig, NudgeLayer
    default_modified_modules = ("body",)
"""
EDITS = [
    {"start": 0.0, "sign": "+", "change": "moved(h, self.b)"},
    {"start": 0.0, "sign": "+", "change": "moved(h, 9 * self.b)"},
    {"start": 0.0, "sign": "-", "change": "moved(h, 9 * self.b)"},
    {"start": 1.0, "sign": "-", "change": "moved(h, 9 * self.b)"},
]


def test_a_method_of_ones_own_whose_code_was_edited_is_trained_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    for count, edit in enumerate(EDITS, 1):
        (tmp_path / "nudging.py").write_text(OWN.format(**edit))
        monkeypatch.delitem(sys.modules, "nudging", raising=False)
        own = importlib.import_module("nudging")
        given = {
            "text": "nudge@body",
            "config": own.NudgeConfig(modified_modules=["body"]),
            "function": own.put,
        }
        for _ in range(2):
            compare(net(), given, epochs=1, out=tmp_path / "out")
            lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
            assert len(lines) == 3 * count, edit


CHANGED = {
    "measure": task(measure=lambda output, batch: (output.argmax(-1) != labels(batch)).float()),
    "loss": task(loss=lambda output, batch: 2 * nn.functional.cross_entropy(output, labels(batch))),
    "collate": task(collate=lambda rows: {"x": 2 * torch.stack([row["x"] for row in rows])}),
    "examples": task(train=[{"x": x + 1} for x in X[:64]]),
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_task_is_refused_in_the_folder(what, tmp_path):
    def run(given):
        return opendelta.compare(net(), given, ["lora@body"], out=tmp_path, progress=False)

    run(task())
    assert run(task()).runs
    with pytest.raises(DeltaError, match=r"other settings \(task: "):
        run(CHANGED[what])


def test_another_dropout_is_another_model(tmp_path):
    compare(net(), DELTAS[:1], out=tmp_path)
    model = net()
    model.drop.p = 0.2
    with pytest.raises(DeltaError, match=r"other settings \(model: "):
        compare(model, DELTAS[:1], out=tmp_path)


def test_names_that_are_alike_in_a_folder_are_kept_apart(tmp_path):
    report = compare(net(), {"a b": lora(1), "a/b": lora(2)}, out=tmp_path)
    model = net().eval()
    (loaded,) = opendelta.load(tmp_path / "best", model)
    best = {"a b": 1, "a/b": 2}[report.best.deltas]
    assert loaded.config.lora_r == best


def merged(model):
    LoraModel(model, modified_modules=["body"])
    opendelta.composition(model).merge()


UNTRAINABLE = {
    "merged": merged,
    "disabled": lambda model: LoraModel(model, modified_modules=["body"]).disable(),
    "frozen": lambda model: LoraModel(model, modified_modules=["body"]).requires_grad_(False),
}


@pytest.mark.parametrize("what", UNTRAINABLE)
def test_deltas_that_cannot_train_are_refused_and_leave_nothing(what):
    model = net()
    with untouched(model), pytest.raises(DeltaError, match=r"lora.* cannot be trained"):
        compare(model, {what: UNTRAINABLE[what]})


def test_modules_that_a_delta_unfreezes_are_trained_and_put_back():
    model = net()
    with untouched(model):
        config = LoraConfig(modified_modules=["body"], unfrozen_modules=["head"])
        report = compare(model, {"with head": config, "without": lora(8)}, epochs=8)
    assert report.rows[0].rates["backbone"] == 1e-3
    assert report.runs[0].losses != report.runs[1].losses


def test_gradients_of_the_user_stay_and_take_no_part():
    model = net()
    model(X[:4]).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    config = LoraConfig(modified_modules=["body"], unfrozen_modules=["head"])
    ours = compare(model, {"with head": config}).runs[0].losses
    assert {n: p.grad for n, p in model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    assert ours == compare(net(), {"with head": config}).runs[0].losses


def test_an_interrupt_anywhere_leaves_nothing():
    """One in each of the first calls of functions of the room."""
    for stop in range(1, 400, 17):
        model, count = net(), 0

        def trace(frame, event, argument, stop=stop):
            nonlocal count
            if event == "call" and "studies" in frame.f_code.co_filename:
                count += 1
                if count == stop:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return None

        with untouched(model), contextlib.suppress(KeyboardInterrupt):
            sys.settrace(trace)
            try:
                compare(model, ["lora@body"], max_steps=2, sweep=1)
            finally:
                sys.settrace(None)
        opendelta.assert_pristine(model)
