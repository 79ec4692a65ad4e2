"""Each script in examples/ runs, on little data, and beats its baseline."""

import re
import subprocess
import sys

import nbclient
import nbformat
import pytest
from support import ROOT

EXAMPLES = ROOT / "examples"
SMALL = {  # {script: (arguments, least lead over the baseline)}
    "causal_lm": ("--steps 6", 0.05),
    "classification": ("--train-size 960", 0.3),
    "distributed": ("--steps 150", 0.5),
    "fusion": ("--train-size 480 --few 40", 0.0),
    "mixture": ("--train-size 640", 0.3),
    "multitask": ("--train-size 640", 0.2),
    "seq2seq": ("--steps 200", 0.2),
    "serving": ("--customers 5 --steps 100", 0.2),
    "sweep": ("--trials 2 --train-size 480", 0.0),
    "vision": ("", 0.2),
}


NOTEBOOKS = ["compare_and_interference", "first_look", "mixture_of_experts"]


def test_each_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == {*NOTEBOOKS}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SMALL}
    for path in EXAMPLES.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) < 80, path
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_example_beats_its_baseline(name, tmp_path):
    arguments, lead = SMALL[name]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    start = start if name == "distributed" else [sys.executable]
    command = [*start, str(EXAMPLES / f"{name}.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    score, baseline = scores(done.stdout)
    gain = baseline - score if name == "causal_lm" else score - baseline
    assert gain > lead, done.stdout[-500:]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs_and_beats_its_baseline(name, tmp_path):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they are made anew
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    score, baseline = scores(notebook.cells[-1].outputs[-1].text)
    assert (score < baseline) if name == "mixture_of_experts" else (score > baseline)


def scores(printed):
    """The score and the baseline at the end of what an example prints."""
    found = re.search(r"score ([\d.]+), baseline ([\d.]+)$", printed.strip())
    assert found, printed[-2000:]
    return map(float, found.groups())
