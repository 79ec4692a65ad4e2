"""Folders that no loader may take: each ends in its error, quickly, and leaves the backbone be."""

import contextlib
import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch
from support import corpus
from support.nets import IDS, net, shake, untouched

import opendelta
from opendelta import DeltaLoadError, LoraModel

pytestmark = pytest.mark.covers("load", "DeltaLoadError")

HERE = corpus.HERE
INDEX = json.loads((HERE / "index.json").read_text())
SECONDS, BYTES = 1.0, 100e6


@contextlib.contextmanager
def cheap():
    """What is inside takes less than a second of CPU time, and less than 100 MB at any time."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # forget the largest size so far
    before, start = _largest(), time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert _largest() - before < BYTES


def _largest():
    """The largest size of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is imported on the first load is paid before."""
    folder = tmp_path_factory.mktemp("warm")
    write(folder, corpus.ours())
    opendelta.load(folder, net(), check_backbone=False)


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def refused(folder, error):
    """`folder` ends in this error, is cheap, and leaves a backbone with a delta as it is."""
    model = net()
    with untouched(model):
        with cheap(), pytest.raises(DeltaLoadError, match=error) as caught:
            opendelta.load(folder, model)
        assert len(str(caught.value)) < 2000
        report = opendelta.load(folder, model, strict=False)
        assert not report
        assert report.problem == str(caught.value)
    delta = shake(LoraModel(model, modified_modules=["linear"]))
    before, values = model(IDS), [p.clone() for p in delta.parameters()]
    with pytest.raises(DeltaLoadError, match=error):
        opendelta.load(folder, model)
    assert torch.equal(model(IDS), before)
    assert opendelta.composition(model).names == ["lora"]
    assert all(map(torch.equal, values, delta.parameters()))


def test_the_corpus_is_what_its_script_writes(tmp_path):
    corpus.write(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == INDEX
    for name in INDEX:
        assert sorted(os.listdir(tmp_path / name)) == sorted(os.listdir(HERE / name)), name
        for file in (tmp_path / name).glob("*.json"):
            assert file.read_bytes() == (HERE / name / file.name).read_bytes()


@pytest.mark.parametrize("kind", corpus.MAKE)
def test_what_they_were_made_from_is_good(kind, tmp_path):
    files = corpus.MAKE[kind]()
    write(tmp_path, files)
    model = net()
    report = opendelta.load(tmp_path, model, check_backbone=False, strict=False)
    assert report, report.problem
    (delta,) = opendelta.composition(model)
    assert all(map(torch.equal, delta.parameters(), corpus.TENSORS.values()))


@pytest.mark.parametrize("name", INDEX)
def test_each_attack_ends_in_its_error(name):
    refused(HERE / name, INDEX[name])


# ------------------------------------------------------------- too large, or no file, to commit
@pytest.mark.parametrize("kind", corpus.MAKE)
def test_a_json_of_100_mb_is_not_read(kind, tmp_path):
    files = corpus.MAKE[kind]()
    write(tmp_path, files)
    (config,) = tmp_path.glob("*.json")
    with open(config, "ab") as file:
        file.write(b" " * 100_000_000)
    refused(tmp_path, "has more than 16,777,216 bytes")
    config.write_bytes(b'{"peft_type": [' + b"[]," * 5_000_000)
    refused(tmp_path, "items, more than 500,000")


@pytest.mark.parametrize("kind", ["opendelta", "peft"])
def test_a_header_of_100_mb_is_not_read(kind, tmp_path):
    text = json.dumps({corpus.A: corpus.entry()}).encode()
    make = corpus.ours if kind == "opendelta" else corpus.peft
    write(tmp_path, make(weights=corpus.raw(text + b" " * 99_000_000, bytes(64))))
    refused(tmp_path, "is no safetensors file: it has a header of 99,000,0")


def test_nothing_is_read_before_all_is_compared(tmp_path):
    write(tmp_path, corpus.ours())
    size = 16 * 2**30
    header = {
        corpus.A: corpus.entry(),
        "x": corpus.entry(shape=[size // 4], start=64, end=size + 64),
    }
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(corpus.raw(header))
    os.truncate(weights, weights.stat().st_size + size + 64)  # a file of holes: 16 GB that are free
    refused(tmp_path, "1 missing: .*; 1 unexpected: x")


def test_a_seed_is_not_grown_to_matrices_that_no_file_holds(tmp_path):
    rank = 2_000_000
    tensors = {
        "linear.deltas.lora.vera_lambda_d": torch.ones(rank),
        "linear.deltas.lora.vera_lambda_b": torch.ones(8),
    }
    write(tmp_path, corpus.ours(corpus.config("vera", options={"r": rank}), tensors))
    refused(tmp_path, "r=2000000 must be below 65536")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are made so on POSIX")
@pytest.mark.parametrize(
    ("kind", "file"), [("opendelta", "*.safetensors"), ("peft", "*.safetensors"),
                       ("opendelta-0.3", "*.bin"), ("adapters", "*.bin"), ("opendelta", "*.json"),
                       ("peft", "*.json")]
)  # fmt: skip
def test_links_out_of_the_folder_and_things_that_are_no_file(kind, file, tmp_path):
    files = corpus.MAKE[kind]()
    folder = tmp_path / "delta"
    write(folder, files)
    (path,) = folder.glob(file)
    if file != "*.json":
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
        refused(folder, "is a link out of its folder")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(folder, "link out of its folder|it is no file|is missing|was not written|but neither")
    path.unlink()
    os.mkfifo(path)
    refused(folder, "it is no file|is missing|was not written|but neither")
    path.unlink()
    path.mkdir()
    refused(folder, "it is no file|is missing|was not written|but neither")


def test_a_name_that_is_taken_is_not_overwritten(tmp_path):
    write(tmp_path, corpus.ours())
    model = net()
    first = shake(LoraModel(model, modified_modules=["linear"]))
    before = [p.clone() for p in first.parameters()]
    opendelta.load(tmp_path, model, check_backbone=False)
    assert opendelta.composition(model).names == ["lora", "lora_1"]
    assert all(map(torch.equal, before, first.parameters()))
    with pytest.raises(DeltaLoadError, match="has a delta 'lora' already"):
        LoraModel.from_finetuned(tmp_path, model, name="lora")
    write(tmp_path / "long", corpus.ours(corpus.config(delta={"name": "a" * 64}), {
        key.replace(".lora.", f".{'a' * 64}."): value for key, value in corpus.TENSORS.items()
    }))  # fmt: skip
    for _ in range(2):
        opendelta.load(tmp_path / "long", model, check_backbone=False)
    assert opendelta.composition(model).names[2:] == ["a" * 64, "a" * 62 + "_1"]


# ------------------------------------------------------------------ values that are no numbers
def test_a_delta_of_nan_is_neither_saved_nor_loaded_from_memory(tmp_path):
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear"]))
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    expected = model(IDS)
    state = {key: value.clone() for key, value in delta.state_dict().items()}
    state[corpus.B][0, 0] = float("inf")
    with pytest.raises(DeltaLoadError, match="not finite"):
        delta.load_state_dict(state)
    assert torch.equal(model(IDS), expected)
    with torch.no_grad():
        delta.layers["linear"].lora_B[0, 0] = float("nan")
    with pytest.raises(opendelta.DeltaError, match=r"1 tensors hold .* not finite: .*lora_B"):
        delta.save_finetuned(tmp_path)
    fresh = net()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh(IDS), expected)


@pytest.mark.parametrize("where", ["unfrozen_modules", "modules_to_save"])
def test_the_infinities_of_a_mask_that_the_backbone_has_too_are_no_damage(where, tmp_path):
    def masked():
        model = net()
        model.head.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        return model

    model = masked()
    delta = shake(LoraModel(model, modified_modules=["linear"], **{where: ["head"]}), scale=0.1)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    fresh = masked()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh(IDS), model(IDS))
    other = masked()
    other.head.mask.zero_()
    with untouched(other), pytest.raises(DeltaLoadError, match="not finite"):
        opendelta.load(tmp_path, other)
