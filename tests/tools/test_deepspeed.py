"""Deltas under DeepSpeed's ZeRO-2 and ZeRO-3, whose parameters are really partitioned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.covers("*Model", "load", "check"), pytest.mark.distributed]
TESTS = Path(__file__).parents[1]
WORKER = TESTS / "support" / "deepspeed_worker.py"


@pytest.mark.parametrize(("stage", "when"), [(2, "before"), (3, "before"), (3, "after")])
def test_an_engine_trains_saves_and_resumes_as_a_plain_loop_does(stage, when, tmp_path):
    paths = os.pathsep.join(map(str, [TESTS, TESTS.parent]))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(stage), when, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["losses"] == pytest.approx(outcome["expected"], abs=1e-4)
    assert outcome["saved"] < 1e-4
    assert outcome["back"] == 0
    assert outcome["counts"]
    assert outcome["check"]
    assert outcome["refused"] == (4 if stage == 3 else 0)
    assert all(facts["values"] for facts in outcome["prints"].values())
    assert outcome["prints"]
