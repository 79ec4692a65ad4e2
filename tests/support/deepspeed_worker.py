"""Trains deltas on an engine of DeepSpeed in this one process, and says what came of it as JSON."""

import json
import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel, SiteError
from support.models import build, logits, token_ids

stage, when, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def deltas_on(model):
    torch.manual_seed(3)
    lora, adapter = LoraModel(model), AdapterModel(model)
    lora.freeze_module()
    return lora, adapter


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps(run, step):
    ids = token_ids(rows=4)
    for _ in range(3):
        loss = run(input_ids=ids, labels=ids).loss
        step(loss)
        yield loss.item()


def alone():
    """The losses and the model of a plain loop ."""
    model = build("llama")
    deltas_on(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return list(steps(model, step)), model.eval()


where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the port is not used
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **where)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
)
deepspeed.init_distributed("gloo")
expected, plain = alone()
model = build("llama")
if when == "after" and stage == 3:
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert next(model.parameters()).numel() == 0
lora, adapter = deltas_on(model)
optimizer = torch.optim.SGD(trained(model), lr=0.5)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)


def step(loss):
    engine.backward(loss)
    engine.step()


losses = list(steps(engine, step))
c = opendelta.composition(model)
c.save(folder / "deltas-alone")
again = build("llama")
opendelta.load(folder / "deltas-alone", again)
counts, counts_plain = opendelta.statistics(model), opendelta.statistics(plain)
report = opendelta.check(model, token_ids(rows=4))
engine.save_checkpoint(str(folder / "checkpoint"))
before = logits(model.eval())
losses += list(steps(engine, step))
path, _ = engine.load_checkpoint(str(folder / "checkpoint"))
assert path is not None
back = logits(model.eval())
refused = 0
if stage == 3:
    adapter.disable()
    for verb, error in [
        (c.merge, SiteError),
        (c.to_backbone, SiteError),
        (lambda: lora.load_state_dict(lora.state_dict()), DeltaError),
        (lambda: model.save_pretrained(folder / "whole"), DeltaError),
    ]:
        with pytest.raises(error, match=r"sharded|spread over processes"):
            verb()
        refused += 1
json.dump(
    {
        "losses": losses[:3],
        "expected": expected,
        "saved": (logits(again.eval()) - logits(plain)).abs().max().item(),
        "counts": counts == counts_plain,
        "check": bool(report),
        "back": (back - before).abs().max().item(),
        "refused": refused,
        "prints": json.loads((folder / "deltas-alone" / "config.json").read_text())["fingerprint"],
    },
    (folder / "outcome.json").open("w"),
)
