"""Deltas with several processes of accelerate and Ray, and in sweeps of Optuna and Ray Tune."""

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer
from support.models import build, logits, token_ids

import opendelta
from opendelta import AutoDeltaConfig, AutoDeltaModel, LoraModel

pytestmark = [pytest.mark.covers("*Model", "load"), pytest.mark.distributed]
HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, [HERE, HERE.parent, HERE.parents[1]]))

SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from support.models import build, token_ids
import opendelta
from opendelta import AdapterModel, LoraModel

rank = int(sys.argv[2])
meet = f"file://{sys.argv[1]}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
torch.manual_seed(accelerator.process_index)
model = build("llama")
torch.manual_seed(3)
lora = LoraModel(model)
AdapterModel(model)
lora.freeze_module()
trained = [p for p in model.parameters() if p.requires_grad]
model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.5))
for step in range(3):
    rows = token_ids(rows=4)[accelerator.process_index :: accelerator.num_processes]
    loss = model(input_ids=rows, labels=rows).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
accelerator.save_state(sys.argv[1] + "/state")
accelerator.wait_for_everyone()
accelerator.load_state(sys.argv[1] + "/state")
plain = accelerator.unwrap_model(model)
if accelerator.is_main_process:
    opendelta.composition(plain).save(sys.argv[1] + "/deltas-alone")
accelerator.end_training()
"""


def prepared():
    """A model with the same deltas in each process, and an optimizer of what trains."""
    model = build("llama")
    torch.manual_seed(3)
    lora = LoraModel(model)
    opendelta.AdapterModel(model)
    lora.freeze_module()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(trained, lr=0.5)


def trained_alone():
    """The model that one process trains on all rows."""
    model, optimizer = prepared()
    for _ in range(3):
        rows = token_ids(rows=4)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_accelerate_with_two_processes_trains_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    pair = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    model = build("llama")
    opendelta.load(tmp_path / "deltas-alone", model)
    assert torch.allclose(logits(model.eval()), logits(trained_alone()), atol=1e-4)


@pytest.fixture(scope="module")
def cluster():
    """A local Ray with two workers."""
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


def loop(given):
    """What each worker of Ray Train runs."""
    import ray.train.torch as prepare

    model, optimizer = prepared()
    wrapped = prepare.prepare_model(model)
    context = train.get_context()
    for _ in range(3):
        rows = token_ids(rows=4)[context.get_world_rank() :: context.get_world_size()]
        wrapped(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if context.get_world_rank() == 0:
        opendelta.composition(model).save(given["folder"])
        Path(given["folder"]).with_name("workers").write_text(str(context.get_world_size()))


def test_ray_train_with_two_workers_trains_what_one_process_does(cluster, tmp_path):
    folder = tmp_path / "deltas-alone"
    trainer = TorchTrainer(
        loop,
        train_loop_config={"folder": str(folder)},
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(storage_path=str(tmp_path / "ray"), name="run"),
    )
    trainer.fit()
    assert (tmp_path / "workers").read_text() == "2"
    model = build("llama")
    opendelta.load(folder, model)
    assert torch.allclose(logits(model.eval()), logits(trained_alone()), atol=1e-4)


def loss_of(config, model):
    """The loss on one batch after three steps of a delta, which is detached then."""
    torch.manual_seed(0)
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(config), backbone_model=model)
    delta.freeze_module()
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.05)
    rows = token_ids(rows=4)
    for _ in range(3):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta.detach()
    return loss.item()


def test_an_optuna_sweep_over_methods_and_ranks_keeps_one_backbone():
    model = build("llama")
    before = opendelta.snapshot(model)

    def objective(trial):
        kind = trial.suggest_categorical("method", ["lora", "adapter"])
        size = {"lora": "lora_r", "adapter": "bottleneck_dim"}[kind]
        return loss_of({"delta_type": kind, size: trial.suggest_int("size", 1, 8)}, model)

    optuna.logging.disable_default_handler()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=6)
    opendelta.assert_pristine(model, like=before)
    best = study.best_params
    assert len({json.dumps(trial.params) for trial in study.trials}) > 3
    size = {"lora": "lora_r", "adapter": "bottleneck_dim"}[best["method"]]
    again = loss_of({"delta_type": best["method"], size: best["size"]}, build("llama"))
    assert again == study.best_value


def test_ray_tune_sweeps_over_methods_on_one_backbone_in_memory(cluster, tmp_path):
    from ray import tune

    shared = ray.put(build("llama"))

    def trial(config):
        import copy

        tune.report({"loss": loss_of(config, copy.deepcopy(ray.get(shared)))})

    space = {"delta_type": tune.grid_search(["lora", "adapter"])}
    tuner = tune.Tuner(
        trial, param_space=space, tune_config=tune.TuneConfig(metric="loss", mode="min"),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="sweep", verbose=0),
    )  # fmt: skip
    results = tuner.fit()
    assert not results.errors
    found = {result.config["delta_type"]: result.metrics["loss"] for result in results}
    expected = {kind: loss_of({"delta_type": kind}, build("llama")) for kind in found}
    assert found == pytest.approx(expected)
    assert len(found) == 2
