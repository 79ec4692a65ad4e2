"""Folders, links, names and configs that nobody means well with: one error, one line."""

import contextlib
import faulthandler
import functools
import io
import json
import operator
import os
import stat
import sys
import tracemalloc
import warnings

import pytest
import torch
import transformers
from support import corpus
from support.nets import shake
from torch import nn

import opendelta
from opendelta import DeltaLoadError, LoraModel
from opendelta._files import folder as files
from opendelta._files import reading
from opendelta.cli import looking, main, models
from opendelta.interop import legacy, peft

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": 30,
}  # fmt: skip


def net():
    torch.manual_seed(0)
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
    return stop.value.code, "".join(captured.err.strip().splitlines()[-1:])


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


TRAINED = ("--task", "task.csv", "--text", "text", "--label", "label", "--delta", "lora", "--out")


@pytest.mark.parametrize("tokenizer", ["evil.T", ""])
@pytest.mark.parametrize("command", ["tree", "train", "compare"])
def test_the_command_never_runs_code_of_a_folder(command, tokenizer, monkeypatch, capsys, tmp_path):
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    names = {"auto_map": {"AutoTokenizer": [tokenizer, None]}} if tokenizer else {}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T" if tokenizer else "BertTokenizer", **names})
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "task.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 12)
    monkeypatch.chdir(tmp_path)
    folder = config(tmp_path, model_type="evil", auto_map=auto, architectures=["M"])
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    given = (folder,) if command == "tree" else ("--model", folder, *TRAINED, tmp_path / "out")
    code, line = run(monkeypatch, capsys, command, *given)
    assert code == 2
    assert "code of its own, which is never run here" in line
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


# ------------------------------------------------------------------------- pipes and devices
POSIX = pytest.mark.skipif(os.name != "posix", reason="there are pipes and links on POSIX")


@contextlib.contextmanager
def soon():
    """End the process if what is inside waits: an open that blocks knows no other end."""
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def no_files(folder):
    """Things at a path in a new folder that are no files: a pipe, links to devices."""
    for number, put in enumerate([
        os.mkfifo,
        lambda path: os.symlink("/dev/zero", path),
        lambda path: os.symlink("/dev/tty", path),
        os.mkdir,
    ]):  # fmt: skip
        around = folder / str(number)
        around.mkdir()
        yield around, put


def attached():
    delta = shake(LoraModel(net(), modified_modules=["0"]))
    delta.freeze_module()
    return delta


@POSIX
@pytest.mark.parametrize("save", [lambda d, path: d.save_finetuned(path), peft.save])
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "pytorch_model.bin"])
def test_saving_over_a_pipe_or_a_device_neither_waits_nor_removes_it(save, name, tmp_path):
    for around, put in no_files(tmp_path):
        put(around / name)
        before = (around / name).lstat()
        with soon(), contextlib.suppress(opendelta.DeltaError):
            save(attached(), around)
            assert name != "config.json"
        same = os.path.samestat((around / name).lstat(), before)
        assert same or name == "adapter_config.json"


@POSIX
@pytest.mark.parametrize("save", [lambda d, path: d.save_finetuned(path), peft.save])
def test_saving_into_what_is_no_folder_is_refused(save, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path in ("pipe", "link", "file", "loop"):
        with soon(), pytest.raises(opendelta.DeltaError, match=r"is a (?:file|link to)"):
            save(attached(), tmp_path / path)
    with pytest.raises(opendelta.DeltaError, match="cannot write into"):
        save(attached(), tmp_path / ("x" * 300))
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)


@POSIX
@pytest.mark.parametrize("save", [lambda d, path: d.save_finetuned(path), peft.save])
def test_saving_where_nothing_can_be_written_is_refused_in_one_line(save, tmp_path):
    looped, mapped, taken = (tmp_path / name for name in ("looped", "mapped", "taken"))
    for folder in (looped, mapped, taken):
        folder.mkdir()
    for name in ("config.json", "adapter_config.json"):
        (looped / name).symlink_to(looped / name)
        (mapped / name).symlink_to("/proc/self/mem")
    delta = attached()
    if save is not peft.save:
        delta.save_finetuned(tmp_path / "other")
        weights = next((tmp_path / "other").glob("*.safetensors")).name
    else:
        weights = "adapter_model.safetensors"
    (taken / weights / "inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    odd = [tmp_path / "file" / "x", f"{tmp_path}/a\0b", "/proc/x", "/sys/x"]
    odd += [] if save is peft.save else [looped]  # PEFT's config is removed first, as a link too
    for folder in (mapped, taken, *odd):
        with pytest.raises(opendelta.DeltaError) as error:
            save(delta, folder)
        assert "\n" not in str(error.value)
        assert ".tmp" not in str(error.value)
    assert [path.name for path in taken.iterdir()] == [weights]


@POSIX
@pytest.mark.parametrize(
    "name",
    ["config.json", "adapter_config.json", "adapter_model.safetensors", "adapter_setup.json",
     "adapter.safetensors", "pytorch_model.bin", "head_config.json"],
)  # fmt: skip
def test_loading_beside_a_pipe_or_a_device_does_not_wait(name, tmp_path, monkeypatch, capsys):
    for around, put in no_files(tmp_path):
        for other in {"config.json", "adapter_config.json"} - {name}:
            (around / other).write_text('{"delta_type": "lora", "peft_type": "LORA"}')
        put(around / name)
        with soon(), pytest.raises(DeltaLoadError):
            opendelta.load(around, net())
        with soon():
            for command in (["show", around], ["tree", around], ["verify", around, around]):
                assert run(monkeypatch, capsys, *command)[0] in (1, 2)


def test_only_files_that_opendelta_names_so_are_removed(folder):
    theirs = ["delta-of-my-thesis.safetensors", "delta-0123456789abcdeF.safetensors", "delta-1.x"]
    for name in theirs:
        (folder / name).write_bytes(b"precious")
    beneath = folder / "delta-0123456789abcdef.safetensors"
    beneath.mkdir()
    (beneath / "mine").touch()
    (folder / "delta-fedcba9876543210.safetensors").touch()
    attached().save_finetuned(folder)
    left = {path.name for path in folder.iterdir()} - {"config.json", *theirs, beneath.name}
    assert left == {json.loads((folder / "config.json").read_text())["weights"]}
    assert (beneath / "mine").exists()


def test_a_reader_beside_a_writer_reads_the_old_pair_or_the_new(folder, monkeypatch):
    from_file, deltas = torch.UntypedStorage.from_file, [attached() for _ in range(3)]
    for number, delta in enumerate(deltas):
        shake(delta, seed=number + 1)

    def replaced_meanwhile(*args, **options):
        if deltas:
            deltas.pop().save_finetuned(folder)
        return from_file(*args, **options)

    last = deltas[0].state_dict()
    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced_meanwhile)
    model = net()
    opendelta.load(folder, model)
    (read,) = opendelta.composition(model)
    assert not deltas
    assert all(torch.equal(read.state_dict()[key], value) for key, value in last.items())


# ------------------------------------------------------------------- what a JSON must hold exactly
@pytest.mark.parametrize("given", [True, 1.0, "1", None, [1], 2])
def test_the_schema_is_an_integer(folder, given):
    changed(folder, schema_version=given)
    with pytest.raises(DeltaLoadError, match="this version of opendelta reads 1"):
        opendelta.load(folder, net())


@pytest.mark.parametrize(
    "print_",
    [None, {"shape": None, "values": None}, {"shape": [None, None], "values": None},
     {"shape": [True, 8], "values": None}, {"shape": [8.0, 8], "values": None},
     {"shape": [-1], "values": None}, {"shape": [8, 8], "values": "AAAA="},
     {"shape": [8, 8], "values": 3}, {"shape": [8, 8]}],
)  # fmt: skip
def test_a_fingerprint_holds_shapes_and_values(folder, print_):
    changed(folder, fingerprint={"0.weight": print_})
    with pytest.raises(DeltaLoadError, match="fingerprint must hold a shape and values"):
        opendelta.load(folder, net())


def test_a_fingerprint_of_other_values_is_refused(folder):
    for values in ("", "AAAA", "AAAAAA=="):
        changed(folder, fingerprint={"0.weight": {"shape": [8, 8], "values": values}})
        with pytest.raises(DeltaLoadError):
            opendelta.load(folder, net())


# -------------------------------------------------------------------- signs that do not print
ODD = "\x1b[31m\u202e[/b]\n" + "k" * 1_200


def test_no_sign_of_a_file_reaches_a_message_or_a_table_raw(monkeypatch, capsys, tmp_path):
    LoraModel(net(), modified_modules=["0"]).freeze_module()
    theirs = tmp_path / "peft"
    delta = attached()
    peft.save(delta, theirs)
    path = theirs / "adapter_config.json"
    facts = json.loads(path.read_text())
    facts |= {"base_model_name_or_path": ODD, "name": ODD, "target_modules": [ODD, 3], ODD: ODD}
    path.write_text(json.dumps(facts | {"modules_to_save": 7}))
    monkeypatch.setattr(sys, "argv", ["opendelta", "show", str(theirs)])
    main_ends(0)
    shown = capsys.readouterr().out
    assert "\\x1b[31m" in shown
    assert shown.replace("\n", "").isprintable()
    assert len(shown) < 30_000
    with pytest.raises(DeltaLoadError) as caught:
        opendelta.load(theirs, net())
    assert str(caught.value).isprintable()


def texts(value, path=()):
    """The paths of all texts in a JSON value."""
    if isinstance(value, str):
        yield path
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list) else parts
    for key, part in parts:
        yield from texts(part, (*path, key))


@pytest.mark.parametrize("kind", corpus.MAKE)
def test_a_text_of_a_file_makes_no_line_of_its_own(kind, capsys, tmp_path):
    written = corpus.MAKE[kind]()
    name = next(name for name in written if name.endswith(".json"))
    facts = json.loads(written[name])
    facts |= {"opendelta_version": "1", "base_model_name_or_path": "a", "model_name": "a"}
    for path in (*texts(facts), ("new option",)):
        changed = json.loads(json.dumps(facts))
        around = functools.reduce(operator.getitem, path[:-1], changed)
        around[path[-1]] = "a\nopendelta: all is well\r\x1b[31m\u202e"
        for file, content in written.items():
            (tmp_path / file).write_bytes(content)
        (tmp_path / name).write_text(json.dumps(changed))
        for command in (looking.show, lambda folder: looking.diff(folder, folder)):
            try:
                command(str(tmp_path))
            except opendelta.DeltaError as error:
                print(error)
            for line in capsys.readouterr().out.split("\n"):
                assert line.isprintable(), path
                assert not line.strip().startswith("opendelta: all"), path


def main_ends(code):
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code


def test_keys_of_400_000_letters_are_cut_in_messages(tmp_path):
    delta = attached()
    files.write(tmp_path / "long", {}, {"k\x1b" * 200_000: torch.zeros(1)})
    written = json.loads((tmp_path / "long" / "config.json").read_text())
    delta.save_finetuned(tmp_path / "delta")
    (tmp_path / "long" / written["weights"]).rename(tmp_path / "delta" / written["weights"])
    changed(tmp_path / "delta", weights=written["weights"], sha256=written["sha256"])
    with pytest.raises(DeltaLoadError, match="1 unexpected: k") as caught:
        opendelta.load(tmp_path / "delta", net())
    assert len(str(caught.value)) <= 2_000
    assert str(caught.value).isprintable()


def test_a_report_prints_as_one_line(folder):
    changed(folder, backbone_class=ODD[:999])
    report = opendelta.load(folder, net(), strict=False)
    assert report
    assert "saved from a \\x1b[31m" in str(report)
    assert str(report).isprintable()


@pytest.mark.parametrize(
    "facts",
    [{}, {"delta_type": ["lora"]}, {"delta_type": "lora", "modified_modules": 3},
     {"delta_type": "lora", "modified_modules": [None, {}]}, {"delta_type": "prefix"}],
)  # fmt: skip
def test_a_folder_of_0_3_without_its_fields(facts, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(facts))
    torch.save({"0.prefix.reparams.x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    model = net()
    LoraModel(model, modified_modules=["0"])
    for read in (legacy.config_of, lambda path: opendelta.load(path, net())):
        with contextlib.suppress(DeltaLoadError):
            assert read(tmp_path).delta_type == "prefix"
    with pytest.raises(DeltaLoadError):
        legacy.load_state_dict(model, tmp_path / "pytorch_model.bin")
    with pytest.raises(DeltaLoadError, match="No such file"):
        legacy.load_state_dict(model, tmp_path / "missing.bin")


def test_what_may_not_be_read_is_named(folder, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forbidden)
        with pytest.raises(DeltaLoadError, match=r"config.json cannot be read .*Permission denied"):
            opendelta.load(folder, net())
    monkeypatch.setattr(os, "stat", forbidden)
    with pytest.raises(DeltaLoadError, match=r"cannot be read: .*Permission denied"):
        opendelta.load(folder, net())


def test_a_config_that_gives_nothing_is_no_file(folder, monkeypatch):
    class Waits(io.BytesIO):
        def read(self, *_):  # as of /proc/kmsg, before anything is there
            return None

    monkeypatch.setattr(reading, "open_file", lambda path: Waits())
    for step in (lambda: attached().save_finetuned(folder), lambda: opendelta.load(folder, net())):
        with pytest.raises(opendelta.DeltaError, match="cannot be read: it is no file"):
            step()


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_training_into_a_file_is_refused(verb, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    said = said_by(monkeypatch, capsys, verb, "--delta", "lora", "--out", tmp_path / "file")
    assert "file is a file; give a folder" in said


@pytest.mark.parametrize("how", ["old", "cut"])
def test_weights_of_an_old_torch_or_cut_off_say_so(how, tmp_path):
    model, path = net(), tmp_path / "pytorch_model.bin"
    LoraModel(model, modified_modules=["0"])
    torch.save({"weight": torch.ones(9)}, path, _use_new_zipfile_serialization=how != "old")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DeltaLoadError, match=r"is damaged, or in the format of torch before 1\.6"):
        legacy.load_state_dict(model, path)


def test_a_config_as_an_editor_of_windows_saves_it(folder):
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"\n", b"\r\n"))
    model = net()
    opendelta.load(folder, model)
    x = torch.ones(1, 8)
    assert not torch.equal(model(x), net()(x))


def said_by(monkeypatch, capsys, *words):
    """Return what a command prints as it ends with exit code 2, in one line."""
    monkeypatch.setattr(sys, "argv", ["opendelta", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(said.splitlines()) == 1
    return said


def test_a_config_of_more_modules_than_memory_holds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "MOST_MODULES", 1_000)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**BERT, "num_hidden_layers": 200}))
    said = said_by(monkeypatch, capsys, "tree", config)
    assert "its config asks for more than 1,000 modules" in said


COUNTED = {
    "num_hidden_layers": {"model_type": "qwen3"},  # it makes a list as long
    "n_layer": {"model_type": "gpt2"},
    "num_layers": {"model_type": "t5"},
    "encoder_layers": {"model_type": "bart"},
    "num_local_experts": {"model_type": "mixtral"},
    "num_labels": {"model_type": "bert"},
    "depths": {"model_type": "swin"},
}


@pytest.mark.parametrize("key", COUNTED)
def test_a_config_that_counts_without_end_is_refused_at_once(key, tmp_path, capsys, monkeypatch):
    count = [2, 10**12] if key == "depths" else 10**12
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**COUNTED[key], key: count}))
    assert f"its config has {key}=1,000,000,000,000, and no" in said_by(
        monkeypatch, capsys, "tree", path
    )


@pytest.mark.parametrize("verb", ["tree", "plan", "explain", "verify", "merge", "report"])
def test_every_command_refuses_such_a_config(verb, folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    inner = {"text_config": {"model_type": "llama", "num_hidden_layers": 10**12}}
    path.write_text(json.dumps({"model_type": "llava", **inner}))
    model, out = path.parent, tmp_path / "out"
    words = {
        "tree": [model], "plan": [model, "--delta", "lora"], "explain": [folder, model],
        "verify": [folder, model], "merge": [folder, model, out],
        "report": [folder, model],
    }[verb]  # fmt: skip
    said = said_by(monkeypatch, capsys, verb, *words)
    assert "its config has text_config.num_hidden_layers=1,000,000,000,000" in said


def test_a_delta_s_number_of_labels_takes_no_memory_before_its_shapes_are_compared(tmp_path):
    config = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})
    model = transformers.BertForSequenceClassification(config)
    model.requires_grad_(False)
    LoraModel(model, modules_to_save=["classifier"], num_labels=5).save_finetuned(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_labels": 5', '"num_labels": 1000000'))
    fresh = transformers.BertForSequenceClassification(config)
    tracemalloc.start()
    try:
        with pytest.raises(DeltaLoadError, match=r"\[5\] instead of \[1000000\]"):
            opendelta.load(tmp_path, fresh)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_labels_of_a_config_are_no_counts(tmp_path):
    labels = {"layers": 3_000, "experts": 0}
    (tmp_path / "config.json").write_text(json.dumps({**BERT, "label2id": labels}))
    assert models.without_weights(str(tmp_path))


@POSIX
def test_a_folder_of_any_name_is_read_or_refused_in_one_line(monkeypatch, capsys, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\x1b[31m")
    for save in (attached().save_finetuned, lambda path: peft.save(attached(), path)):
        with pytest.raises(opendelta.DeltaError, match="is no UTF-8"):
            save(odd)
    os.makedirs(odd, exist_ok=True)
    for path in (odd, f"{odd}/missing", "a\0b"):
        with contextlib.suppress(DeltaLoadError):
            opendelta.load(path, net())
        code, line = run(monkeypatch, capsys, "show", path) if "\0" not in path else (2, "")
        assert code == 2
        assert line.isprintable()


def test_the_command_ends_in_one_line_whatever_is_raised(monkeypatch, capsys, tmp_path):
    for error in (KeyError("a"), MemoryError(), NotImplementedError("\x1b"), AssertionError()):

        def raised(*_, error=error, **__):
            raise error

        monkeypatch.setattr("opendelta.cli.looking.saved_from", raised)
        code, line = run(monkeypatch, capsys, "explain", tmp_path, tmp_path)
        assert code == 2
        assert line.startswith(f"opendelta: {type(error).__name__}")
        assert line.isprintable()


@pytest.mark.parametrize(
    "content", [b"// mine\n{}", b"precious", b"", b"\xff\xfe", b'{"format": "other"', b"{" * 9000]
)
def test_a_config_of_the_user_that_is_no_json_is_kept(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    model = nn.Sequential(nn.Linear(6, 8))
    delta = LoraModel(model, modified_modules=["0"])
    delta.freeze_module()
    with pytest.raises(opendelta.DeltaError, match=r"a config\.json that is not a delta's"):
        delta.save_finetuned(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == content


def test_the_remains_of_a_damaged_delta_are_saved_over(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8))
    delta = LoraModel(model, modified_modules=["0"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    whole = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(whole[: len(whole) // 2])
    delta.save_finetuned(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == whole
