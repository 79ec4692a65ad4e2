"""`opendelta pick`: the address, what it prints, and its exit codes."""

import json
import re
import signal
import subprocess
import sys
import warnings

import pytest
import transformers
from support.picking import Picking, wire

import opendelta
from opendelta.cli import main

pytestmark = pytest.mark.covers("pick")


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=96, num_hidden_layers=4, **sizes)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def pick(folder, picking, monkeypatch, capsys):
    """Start the command in a thread; the result is its exit code."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def start(*arguments):
        def call():
            try:
                main()
            except SystemExit as stop:
                return stop.code or 0

        monkeypatch.setattr(sys, "argv", ["opendelta", "pick", str(folder), *arguments])
        return picking(call)

    return start


def test_it_prints_the_lines_of_python_and_the_words_that_plan_the_same(pick, folder, capsys):
    page = pick("--delta", "lora", "--option", "lora_r=4", "--at", "attn.q")
    (delta,) = page.ask("open")["deltas"]
    assert delta["places"] == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(4)]
    wrong = {**delta, "options": {"lora_r": 0}}
    assert "must be at least 1" in page.ask("submit", {"deltas": [wrong]})["error"]
    wrong = {**delta, "places": ["bert.embeddings.LayerNorm"]}
    assert "cannot carry 'lora'" in page.ask("submit", {"deltas": [wrong]})["error"]
    assert page.ask("submit", {"deltas": [delta]}) == {}
    assert page.join() == 0
    assert capsys.readouterr().out == (
        "from opendelta import LoraModel\n\n"
        'LoraModel(model, modified_modules=["query"], lora_r=4)\n\n'
        f"# opendelta plan {folder} --delta lora --at query --option lora_r=4\n"
    )


def test_the_words_keep_the_class_that_the_command_was_given(pick, folder, capsys):
    page = pick("--class", "BertModel")
    page.ask("submit", {"deltas": [wire("lora")]})
    assert page.join() == 0
    words = f"# opendelta plan {folder} --class BertModel --delta lora\n"
    assert capsys.readouterr().out.endswith(words)


def test_as_json_it_prints_configs_that_come_back(pick, capsys):
    page = pick("--json")
    page.ask("submit", {"deltas": [wire("lora"), wire("adapter", None, bottleneck_dim=3)]})
    assert page.join() == 0
    found = json.loads(capsys.readouterr().out)
    one, other = map(opendelta.AutoDeltaConfig.from_dict, found["configs"])
    assert one == opendelta.LoraConfig()
    assert other == opendelta.AdapterConfig(bottleneck_dim=3)
    assert found["python"].endswith("LoraModel(model)\nAdapterModel(model, bottleneck_dim=3)")


def test_a_cancelled_page_is_exit_code_1(pick, capsys):
    page = pick()
    page.ask("cancel")
    assert page.join() == 1
    assert capsys.readouterr() == ("", "opendelta: picking was cancelled\n")


@pytest.mark.slow
def test_as_a_process_it_prints_its_address_and_ends_at_ctrl_c(folder):
    arguments = [sys.executable, "-m", "opendelta", "pick", str(folder), "--no-browser"]
    process = subprocess.Popen(arguments, stdout=-1, stderr=-1, text=True)
    line = process.stderr.readline()
    found = re.fullmatch(r"opendelta: pick at (http://127\.0\.0\.1:\d+/.+/) \(Ctrl-C.*\)\n", line)
    assert found, line
    page = Picking.__new__(Picking)
    page.address = found[1]
    assert page.ask("open")["model"] == "BertForMaskedLM"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert errors == "opendelta: picking was cancelled\n"
