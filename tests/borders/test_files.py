"""Folders, links, names and configs that nobody means well with: one error, one line."""

import json
import os
import sys
import warnings

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import DeltaLoadError, LoraModel
from opendelta.cli import main

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": 30,
}  # fmt: skip


def net():
    return nn.Sequential(nn.Linear(8, 8))


@pytest.fixture
def folder(tmp_path):
    delta = shake(LoraModel(net(), modified_modules=["0"]))
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "delta")
    return tmp_path / "delta"


def changed(folder, **facts):
    """Change the JSON of a folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_name_that_is_too_long(folder):
    changed(folder, weights="x" * 300 + ".safetensors")
    with pytest.raises(DeltaLoadError, match="cannot be read"):
        opendelta.load(folder, net())
    with pytest.raises(DeltaLoadError, match=r"^'x{100,200}\.\.\. cannot be read"):
        opendelta.load("x" * 300, net())


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_a_link_that_leads_to_itself(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    weights.symlink_to(weights.name)
    with pytest.raises(DeltaLoadError, match="cannot be read"):
        opendelta.load(folder, net())


def test_a_dtype_that_nothing_can_be_made_of(folder):
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for key, entry in header.items():
        if key.endswith("lora_A"):
            entry["dtype"], entry["shape"] = "F4", [8, 64]
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(DeltaLoadError):
        opendelta.load(folder, net())


def run(monkeypatch, capsys, *arguments):
    """The exit code and the last line of the command's errors."""
    monkeypatch.setattr(sys, "argv", ["opendelta", *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return stop.value.code, captured.err.strip().splitlines()[-1]


def config(tmp_path, **facts):
    (tmp_path / "config.json").write_text(json.dumps({**BERT, **facts}))
    return tmp_path


@pytest.mark.parametrize(
    "facts", [{"num_attention_heads": 0}, {"hidden_size": "16"}, {"dtype": "x"}]
)
def test_the_command_refuses_a_config_in_one_line(facts, monkeypatch, capsys, tmp_path):
    code, line = run(monkeypatch, capsys, "tree", config(tmp_path, **facts))
    assert code == 2
    assert line.startswith("opendelta: no model")


def test_the_command_refuses_what_cannot_be_computed_in_one_line(monkeypatch, capsys, tmp_path):
    lora = f"lora:lora_r={2**62}"
    code, line = run(monkeypatch, capsys, "plan", config(tmp_path), "--delta", lora)
    assert code == 2
    assert line.startswith("opendelta: ")
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert run(monkeypatch, capsys, "tree", deep)[0] == 2
    assert run(monkeypatch, capsys, "verify", "x" * 300, tmp_path)[0] == 2


def test_the_command_reads_no_config_of_any_size(monkeypatch, capsys, tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(2**32)
    code, line = run(monkeypatch, capsys, "tree", path)
    assert (code, "more than 16,777,216" in line) == (2, True)


def test_the_command_never_runs_code_of_a_folder(monkeypatch, capsys, tmp_path):
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    folder = config(tmp_path, model_type="evil", auto_map=auto, architectures=["M"])
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code, line = run(monkeypatch, capsys, "tree", folder)
    assert code == 2
    assert "code of its own, which the command never runs" in line
    assert not (tmp_path / "RAN").exists()


def test_tensors_of_a_good_folder_are_read(folder):
    model = net()
    opendelta.load(folder, model, check_backbone=False)
    assert torch.isfinite(model(torch.ones(1, 8))).all()


def test_a_folder_that_is_refused_gives_no_warning_beside_its_error(tmp_path):
    model = net()
    with pytest.warns(opendelta.UnsavedWarning):
        LoraModel(model, modified_modules=["0"]).save_finetuned(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    (print_,) = facts["fingerprint"].values()
    print_["values"] = None
    changed(tmp_path, fingerprint=facts["fingerprint"], sha256="0" * 64)
    fresh = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DeltaLoadError, match="is damaged: its sha256"):
            opendelta.load(tmp_path, fresh)
        changed(tmp_path, sha256=facts["sha256"])
        with pytest.raises(opendelta.UncheckedWarning):
            opendelta.load(tmp_path, fresh)
    opendelta.assert_pristine(fresh)
    with pytest.warns(opendelta.UncheckedWarning, match="1 of 1 weights"):
        opendelta.load(tmp_path, fresh)


@pytest.mark.covers("Delta.state_dict")
def test_the_name_in_full_names_must_be_a_name():
    delta = LoraModel(net(), modified_modules=["0"])
    assert sorted(delta.state_dict("b")) == ["0.deltas.b.lora_A", "0.deltas.b.lora_B"]
    for name in (3, "", "a.b", b"b", ["b"]):
        with pytest.raises(opendelta.DeltaError, match="is no name for a delta"):
            delta.state_dict(named=name)
