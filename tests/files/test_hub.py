"""Deltas on the hub, against a stand-in of its HTTP API on this machine."""

import json
import os
import re
import subprocess
import sys

import pytest
from support import TESTS
from support.hub_server import TOKEN, serving
from support.nets import net

import opendelta
from opendelta import AdapterModel, AutoDeltaModel, LoraModel
from opendelta._checkpoint import hub

pytestmark = pytest.mark.covers("Delta.push_to_hub", "Composition.push_to_hub", "load")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the client saw, the repositories by then, and which are private."""
    root = tmp_path_factory.mktemp("hub")
    with serving() as (address, repositories, private):
        done = subprocess.run(
            [sys.executable, "-m", "support.hub_client", str(root)],
            cwd=TESTS,
            capture_output=True,
            text=True,
            check=False,
            env={
                **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
                "HF_ENDPOINT": address,
                "HF_HOME": str(root / "home"),
                "HF_TOKEN": TOKEN,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1]), repositories, private, address


def test_what_is_pushed_loads_by_its_name(pushed):
    seen, _, private, address = pushed
    assert seen["address"] == f"{address}/ada/german"
    assert private == {"ada/german"}
    assert [seen[key] for key in seen if key.startswith("equal")] == [True] * 6
    assert seen["rank"] == 2


def test_a_composition_replaces_what_was_pushed_before(pushed):
    seen, repositories, *_ = pushed
    assert seen["names"] == ["lora", "style"]
    assert seen["both equal"]
    config = json.loads(repositories["ada/german"]["config.json"])
    assert sorted(repositories["ada/german"]) == ["README.md", "config.json", config["weights"]]


def test_saving_pushes_too_under_a_name_or_that_of_the_folder(pushed):
    _, repositories, *_ = pushed
    assert {"ada/german", "ada/by-its-folder", "ada/by-name"} <= set(repositories)
    assert (
        b'opendelta.load("ada/by-its-folder", model)'
        in (repositories["ada/by-its-folder"]["README.md"])
    )


def test_the_hubs_refusals_are_told(pushed):
    seen, *_ = pushed
    assert "no delta in 'ada/nothing'" in seen["no such name"]
    assert "the hub says: 404" in seen["no such name"]
    assert seen["wrong token"] == "HfHubHTTPError"


def test_the_card_shows_the_tree_the_figures_and_how_to_load(pushed):
    _, repositories, *_ = pushed
    text = repositories["ada/german"]["README.md"].decode()
    assert text.startswith("---\nlibrary_name: opendelta\ntags: [opendelta, lora, adapter]\n---\n")
    assert "2 deltas saved by opendelta" in text
    assert "lora (lora, 32 parameters), style (adapter, 416 parameters)" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert 'opendelta.load("ada/german", model)' in code
    (tree,) = re.findall(r"```text\n(.*?)```", text, re.S)
    assert "linear" in tree
    assert "style" in tree


def test_the_card_names_the_backbone_and_its_code_runs(tmp_path):
    model = net()
    model.config = type("Config", (), {"_name_or_path": "org/base"})()
    delta = LoraModel(model, modified_modules=["linear"])
    delta.freeze_module()
    AdapterModel(model, modified_modules=["bare"])
    text = hub.card(list(opendelta.composition(model)), str(tmp_path / "delta"))
    assert "tags: [opendelta, lora, adapter]\nbase_model: org/base\n---\n" in text
    opendelta.composition(model).save(tmp_path / "delta")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    fresh = net()
    exec(code, {"model": fresh})
    assert opendelta.composition(fresh).names == ["lora", "adapter"]


def test_the_hub_is_said_to_be_out_of_reach():
    with pytest.raises(opendelta.DeltaLoadError, match=r"no such folder here, and the hub says"):
        AutoDeltaModel.from_finetuned("Delta/mrpc", backbone_model=net(), local_files_only=True)


def test_nothing_is_not_pushed():
    with pytest.raises(opendelta.DeltaError, match="no delta is attached to"):
        opendelta.composition(net()).push_to_hub("ada/nothing")
