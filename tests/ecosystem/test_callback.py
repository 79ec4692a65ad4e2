"""The callback for transformers' Trainer saves deltas, logs their norms and shows the tree."""

import json

import pytest
import torch
from support.models import build, logits, token_ids
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import opendelta
from opendelta import AdapterModel, LoraModel
from opendelta.integrations.trainer import DeltaCallback

pytestmark = pytest.mark.covers("load")


class Report(TrainerCallback):
    """What a reporter is told."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **_):
        self.rows.append(dict(logs))


class Wrapped(nn.Module):
    """A model of the user's own, whose state dict Trainer saves."""

    def __init__(self):
        super().__init__()
        self.body = build("llama")

    def forward(self, input_ids, labels):
        return self.body(input_ids=input_ids, labels=labels)


def trainer(model, folder, **more):
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=8).tolist()]
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, logging_steps=1, learning_rate=0.05,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, **more)


def prepared(model):
    lora = LoraModel(model)
    AdapterModel(model)
    lora.freeze_module()
    return lora


@pytest.mark.parametrize("make", [lambda: build("bert"), Wrapped])
def test_each_checkpoint_and_the_end_have_the_deltas(make, tmp_path, capsys):
    model = make()
    prepared(model)
    trainer(model, tmp_path, callbacks=[DeltaCallback()]).train()
    body = getattr(model, "body", model)
    last = logits(body.eval())
    for folder, same in (("checkpoint-1", False), ("checkpoint-2", True), ("", True)):
        again = make()
        opendelta.load(tmp_path / folder, again)
        found = logits(getattr(again, "body", again).eval())
        assert torch.equal(found, last) == same
    assert capsys.readouterr().out.count("adapter") > 0


def test_norms_and_the_share_are_logged_for_reporters_and_the_history(tmp_path):
    model = build("bert")
    lora = prepared(model)
    report = Report()
    run = trainer(model, tmp_path, callbacks=[report])
    callback = DeltaCallback(save=False, show=False).add_to(run)
    run.train()
    squares = sum(p.detach().double().square().sum() for p in lora.parameters())
    for rows in (report.rows, run.state.log_history):
        assert rows[1]["deltas/lora/norm"] == pytest.approx(float(squares.sqrt()))
        assert rows[0]["deltas/lora/norm"] != rows[1]["deltas/lora/norm"]
        assert {"deltas/adapter/norm", "deltas/trainable"} <= rows[1].keys()
    counts = opendelta.statistics(model)
    assert callback.share == counts.trainable_parameters / counts.total_parameters
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert "deltas/lora/norm" in state["log_history"][-1]
    assert not (tmp_path / "deltas").exists()


def test_it_does_nothing_where_no_delta_is(tmp_path):
    run = trainer(build("bert"), tmp_path, callbacks=[DeltaCallback(show=False)])
    run.train()
    assert not list(tmp_path.rglob("deltas"))
