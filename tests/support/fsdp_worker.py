"""What two processes check of accelerate's and Trainer's FSDP2; `tools/test_fsdp.py` starts them.

On GPUs the tools decide for FSDP by themselves. On CPU they take it for DDP, so they are told; all
that they do then, with gloo, is their own code.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import opendelta
from opendelta import AdapterModel, DeltaError, DeltaLoadError, LoraModel
from opendelta._deltas.registry import METHODS
from opendelta.integrations.trainer import DeltaCallback
from support.models import build, logits, token_ids
from support.nets import shake

ROWS = token_ids(rows=4)
KINDS = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


def use_fsdp(accelerator, plugin):
    """On CPU: let an Accelerator of two processes shard as it does on GPUs."""
    if accelerator.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def accelerator_for(kind="FULL_STATE_DICT", efficient=True):
    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=efficient,
        auto_wrap_policy="transformer_based_wrap",
    )  # fmt: skip
    cpu = not torch.cuda.is_available()
    made = use_fsdp(Accelerator(cpu=cpu, fsdp_plugin=plugin), plugin)
    assert made.is_fsdp2
    assert made.num_processes == 2
    return made


def two_deltas(**options):
    model = build("llama")
    torch.manual_seed(3)
    lora = LoraModel(model)
    AdapterModel(model)
    lora.freeze_module(**options)
    return model


def optimizer_of(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model, optimizer, rows, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return model


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def whole(tensor):
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu()


def state_of(model):
    """The state dict of a model, without shards."""
    return {key: whole(value.detach()).clone() for key, value in model.state_dict().items()}


def assert_close(found, expected, atol=1e-5):
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, atol=atol, rtol=1e-3, msg=key)


def trains_saves_and_resumes(rank, folder, kind, efficient):
    accelerator = accelerator_for(kind, efficient)
    alone = two_deltas()
    model = two_deltas()
    if efficient and rank:  # only the first process has values
        torch.nn.utils.vector_to_parameters(torch.zeros(size_of(model)), model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    mine = ROWS[rank::2].to(accelerator.device)
    train(model, optimizer, mine)
    expected = state_of(train(alone, optimizer_of(alone), ROWS))
    assert_close(state_of(model), expected)

    accelerator.save_state(str(folder / "state"))
    before = state_of(train(model, optimizer, mine, steps=0))
    further = state_of(train(model, optimizer, mine))
    accelerator.load_state(str(folder / "state"))
    assert_close(state_of(model), before, atol=0)
    assert_close(state_of(train(model, optimizer, mine)), further)
    accelerator.load_state(str(folder / "state"))

    taken = accelerator.get_state_dict(model)
    accelerator.save_model(model, str(folder / "model"))
    opendelta.composition(accelerator.unwrap_model(model)).save(folder / "deltas-alone")
    if rank == 0:
        assert_close(taken, expected)
        again = two_deltas()
        again.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        assert_close(state_of(again), expected)
        plain = build("llama")
        opendelta.load(folder / "deltas-alone", plain)
        assert (logits(plain.eval()) - logits(alone.eval())).abs().max() < 1e-4


def all_methods_train(rank, folder):
    def made():
        model = build("llama")
        torch.manual_seed(3)
        deltas = [shake(METHODS[name](model), scale=0.1) for name in sorted(METHODS)]
        deltas[0].freeze_module()
        return model, deltas

    accelerator = accelerator_for()
    alone, others = made()
    alone(input_ids=ROWS, labels=ROWS).loss.backward()
    model, deltas = made()
    model, _ = accelerator.prepare(model, optimizer_of(model))
    mine = ROWS[rank::2].to(accelerator.device)
    model(input_ids=mine, labels=mine).loss.backward()
    found = {name: whole(p.grad) for delta in deltas for name, p in delta.named_parameters()}
    expected = {name: p.grad for delta in others for name, p in delta.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    assert_close(found, expected)


def small_state_is_refused(rank, folder):
    accelerator = accelerator_for()
    model = two_deltas(set_state_dict=True)
    with pytest.raises(DeltaLoadError, match=r"assign=True.*meta device.*with its defaults"):
        accelerator.prepare(model, optimizer_of(model))


class FsdpTrainer(Trainer):
    """A Trainer that shards on CPU too."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        use_fsdp(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


def trained(model, folder, config, resume=None):
    """A Trainer after four steps, with a checkpoint after two."""
    AcceleratorState._reset_state(True)
    arguments = TrainingArguments(
        str(folder), fsdp="full_shard auto_wrap", fsdp_config=dict(config),
        max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        logging_steps=1, use_cpu=not torch.cuda.is_available(), report_to="none",
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ROWS.repeat(4, 1).tolist()]
    trainer = FsdpTrainer(model, arguments, train_dataset=rows)
    DeltaCallback(show=False).add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return trainer


def trainer_saves_and_resumes(rank, folder, kind, efficient, options=None, more=None):
    config = {"state_dict_type": kind, "cpu_ram_efficient_loading": efficient, **(more or {})}
    model = two_deltas(**(options or {}))
    trainer = trained(model, folder / "out", config)
    once = state_of(model)
    if not more:
        again = two_deltas(**(options or {}))
        trained(again, folder / "out", config, resume=str(folder / "out" / "checkpoint-2"))
        assert_close(state_of(again), once)
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    lacks = pytest.raises(DeltaError, match="lacks weights that are spread over processes")
    with lacks if options and rank == 0 else contextlib.nullcontext():
        trainer.save_model(str(folder / "model"))
    dist.barrier()
    assert (folder / "model" / "deltas").exists() != bool(options)
    if rank == 0 and not options:
        found = opendelta.from_pretrained(folder / "model")
        if not more:  # checkpointing gives the weights other names
            assert_close(state_of(found), once)
        plain = build("llama")
        opendelta.load(folder / "out" / "deltas", plain)
        assert torch.equal(logits(plain), logits(found))


CHECKS = {
    "accelerate full, efficient": (trains_saves_and_resumes, KINDS[0], True),
    "accelerate sharded": (trains_saves_and_resumes, KINDS[1], False),
    "accelerate small": (small_state_is_refused,),
    "accelerate methods": (all_methods_train,),
    "Trainer full": (trainer_saves_and_resumes, KINDS[0], False),
    "Trainer sharded, efficient": (trainer_saves_and_resumes, KINDS[1], True),
    "Trainer small": (trainer_saves_and_resumes, KINDS[0], False, {"set_state_dict": True}),
    "Trainer checkpointing": (
        trainer_saves_and_resumes, KINDS[0], False, {}, {"activation_checkpointing": True}
    ),
}  # fmt: skip


def main(rank, folder, names):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the port is not used
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    meet = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=2)
    outcomes = {}
    for name in names:
        check, *arguments = CHECKS[name]
        inside = folder / name.replace(" ", "-")
        inside.mkdir(exist_ok=True)
        outcomes[name] = None
        try:
            check(rank, inside, *arguments)
        except Exception:
            outcomes[name] = traceback.format_exc(limit=-6)
        (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes))
        dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(CHECKS))
