"""One composition trained with Trainer into a folder: what it goes on after, what it refuses."""

import json
import warnings

import pytest
import torch
import transformers

from opendelta import DeltaError, Task
from opendelta.studies import door


def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def right(output, batch):
    return (output.logits.argmax(-1) == batch["labels"]).float()


def train(out, rates=None, deltas="lora", seed=0, batch=4, size=12, **arguments):
    rows = [{"input_ids": [i % 12, 1], "labels": i % 2} for i in range(size)]
    task = Task("odd", rows[:8], rows[8:], collate, right, labels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return door.train(
            model(), task, deltas, out, rates=rates or {}, seed=seed,
            per_device_train_batch_size=batch, num_train_epochs=1, **arguments,
        )  # fmt: skip


def test_a_training_goes_on_after_its_last_whole_checkpoint(tmp_path):
    first = train(tmp_path)
    assert (first["steps"], first["resumed_from"]) == (2, None)
    (tmp_path / "checkpoint-9").mkdir()  # left by a training that ended while it saved
    (tmp_path / "checkpoint-x").mkdir()
    assert train(tmp_path)["resumed_from"] == "checkpoint-2"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rates": {"lora": 0.5}}, r"rates: {'lora': 0.003} there, {'lora': 0.5} now"),
        ({"deltas": "lora:lora_r=2"}, "deltas: "),
        ({"deltas": "adapter"}, "deltas: "),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"batch": 2}, "batch_size: 4 there, 2 now"),
        ({"size": 11}, "task: odd "),
    ],
)
def test_checkpoints_of_other_settings_are_refused(tmp_path, other, said):
    train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    end = r".*: give another out= \(--out\), or delete it"
    with pytest.raises(DeltaError, match=r"other settings \(.*" + said + end):
        train(tmp_path, **other)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_training_that_diverged_leaves_no_checkpoint_to_go_on_after(tmp_path, monkeypatch):
    real = door.groups_of

    def diverging(made, rates):
        groups = real(made, rates)
        groups[0]["lr"] = float("nan")
        return groups

    with monkeypatch.context() as patch:
        patch.setattr(door, "groups_of", diverging)
        with pytest.raises(DeltaError, match=r"diverged\. Nothing was saved"):
            train(tmp_path)
    assert train(tmp_path)["resumed_from"] is None
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 2
