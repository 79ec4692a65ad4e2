"""Trains deltas on an engine of DeepSpeed, alone; `tools/test_deepspeed.py` runs it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel, SiteError
from support.models import build, logits, token_ids


def deltas_on(model):
    torch.manual_seed(3)
    lora, adapter = LoraModel(model), AdapterModel(model)
    lora.freeze_module()
    return lora, adapter


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def losses(run, step):
    """The losses of three steps."""
    ids = token_ids(rows=4)
    for _ in range(3):
        loss = run(input_ids=ids, labels=ids).loss
        step(loss)
        yield loss.item()


def alone():
    """The losses and the model of a plain loop."""
    model = build("llama")
    deltas_on(model)
    optimizer = optimizer_of(model)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return list(losses(model, step)), model.eval()


def refusals(model, lora, adapter, folder):
    """The number of verbs that partitioned parameters refuse."""
    c = opendelta.composition(model)
    adapter.disable()
    verbs = [
        (c.merge, SiteError),
        (c.to_backbone, SiteError),
        (lambda: lora.load_state_dict(lora.state_dict()), DeltaError),
        (lambda: model.save_pretrained(folder / "whole"), DeltaError),
    ]
    for verb, error in verbs:
        with pytest.raises(error, match=r"sharded|spread over processes"):
            verb()
    return len(verbs)


def main(stage, when, folder):
    import deepspeed

    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the port is not used
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **here)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    expected, plain = alone()
    model = build("llama")
    if when == "after":
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        assert next(model.parameters()).numel() == 0
    lora, adapter = deltas_on(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)

    def step(loss):
        engine.backward(loss)
        engine.step()

    with pytest.raises(SiteError, match=r"inside DeepSpeedEngine, .*attach and unfreeze first"):
        LoraModel(model, name="late")
    adapter.detach()
    adapter.attach()  # its parameters are known
    found = list(losses(engine, step))
    opendelta.composition(model).save(folder / "deltas-alone")
    again = build("llama")
    opendelta.load(folder / "deltas-alone", again)
    saved = (logits(again.eval()) - logits(plain)).abs().max().item()
    counts = opendelta.statistics(model) == opendelta.statistics(plain)
    report = opendelta.check(model, token_ids(rows=4))
    engine.save_checkpoint(str(folder / "checkpoint"))
    before = logits(model.eval())
    list(losses(engine, step))
    path, _ = engine.load_checkpoint(str(folder / "checkpoint"))
    assert path is not None
    outcome = {
        "losses": found,
        "expected": expected,
        "saved": saved,
        "counts": counts,
        "check": bool(report),
        "back": (logits(model.eval()) - before).abs().max().item(),
        "refused": refusals(model, lora, adapter, folder) if stage == 3 else 0,
        "prints": json.loads((folder / "deltas-alone" / "config.json").read_text())["fingerprint"],
    }
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
