"""FSDP2 as accelerate and transformers' Trainer set it up, with two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import fsdp_worker as worker

pytestmark = [
    pytest.mark.covers("*Model", "load", "from_pretrained", "Composition.save"),
    pytest.mark.distributed,
]
TESTS = Path(__file__).parents[1]
GROUPS = sorted({name.partition(" ")[0] for name in worker.CHECKS})


def problems(folder, group, **environment):
    """{check: what went wrong} in two processes that run all checks of a group."""
    paths = os.pathsep.join(map(str, [TESTS, TESTS.parent]))
    names = [name for name in worker.CHECKS if name.partition(" ")[0] == group]
    environment = {**os.environ, **environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pair = []
    for rank in range(2):
        with (folder / f"log{rank}").open("w") as log:
            command = [sys.executable, worker.__file__, str(rank), str(folder), *names]
            pair.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=400) for process in pair]
    finally:
        for process in pair:
            process.kill()
    found = {}
    for rank, code in enumerate(codes):
        path = folder / f"outcomes{rank}.json"
        outcomes = json.loads(path.read_text()) if path.exists() else {}
        found |= {f"{name}, {rank}": text for name, text in outcomes.items() if text}
        if code:
            found[f"process {rank}"] = (folder / f"log{rank}").read_text()[-2000:]
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_two_processes_train_save_and_resume_what_one_does(group, tmp_path):
    found = problems(tmp_path, group, CUDA_VISIBLE_DEVICES="")
    assert not found, "\n".join(found.values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("group", GROUPS)
def test_two_gpus_train_save_and_resume_what_one_process_does(group, tmp_path):
    found = problems(tmp_path, group)
    assert not found, "\n".join(found.values())
