"""The command `opendelta`: every subcommand on good and bad input, and as a process."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import ROOT, TESTS
from support.nets import shake

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel
from opendelta._deltas import requests
from opendelta.cli import main, models
from opendelta.cli.requests import gathered
from opendelta.interop import peft

DOCS = ROOT / "docs" / "reference" / "cli.md"
EXAMPLE = re.compile(r"^\$ opendelta (.+)\n((?:(?!\$ |```).*\n)*)", re.M)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small BERT, another one, and checkpoints that fit the first."""
    root = tmp_path_factory.mktemp("cli")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=96, num_hidden_layers=4, **sizes)
    for seed, name in enumerate(("my-model", "another-model")):
        torch.manual_seed(seed)
        transformers.BertForMaskedLM(config).save_pretrained(root / name)
    model = transformers.BertForMaskedLM.from_pretrained(root / "my-model").eval()
    lora = shake(LoraModel(model, lora_r=4))
    lora.freeze_module()
    lora.save_finetuned(root / "my-lora")
    peft.save(lora, root / "my-peft")
    shake(lora, seed=2, scale=0.1).save_finetuned(root / "trained-more")
    style = shake(AdapterModel(model, modified_modules=["output"], name="style"))
    style.disable()
    opendelta.composition(model).save(root / "my-composition")
    shutil.copytree(root / "my-lora", root / "damaged")
    (weights,) = (root / "damaged").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    shutil.copytree(root / "my-lora", root / "nameless")
    path = root / "nameless" / "config.json"
    path.write_text(re.sub(r'  "backbone_path": .*\n', "", path.read_text()))
    (root / "empty").mkdir()
    return root


def process(folder, *arguments):
    """(exit code, standard output, standard error) of a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "opendelta", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "110", "HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """The same without a new process, which takes seconds."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["opendelta", *arguments])
        code = 0
        with warnings.catch_warnings():
            warnings.simplefilter("default", opendelta.DeltaWarning)
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        return code, *capsys.readouterr()

    return call


# ------------------------------------------------------------------------------- good and bad input
GOOD = {
    "tree": (["my-model", "--json"], '"type": "BertForMaskedLM"'),
    "plan": (
        ["my-model", "-d", "lora", "-o", "lora_r=2", "-a", "attn.q"],
        "lora    attn.q   bert.encoder.layer.0-3.attention.self.query ",
    ),
    "explain": (["my-composition", "my-model"], "attention.self.query   y = query(x) + lora(x)"),
    "show": (["my-composition"], "opendelta 1.0"),
    "report": (
        ["my-composition", "my-model", "--html", "composition.html"],
        "composition.html: a report on my-composition\n",
    ),
    "diff": (["my-lora", "my-lora"], "the same: 16 tensors, bit for bit\n"),
    "merge": (["my-lora", "my-model", "merged"], "merged lora into a BertForMaskedLM: merged\n"),
    "convert": (
        ["my-peft", "converted", "--to", "opendelta", "--model", "my-model"],
        "PEFT -> opendelta: lora in converted\n",
    ),
    "verify": (["my-composition", "my-model"], "my-composition fits my-model: lora, style; the we"),
}


def check_good(shown, code, out, errors):
    assert (code, errors) == (0, "")
    assert shown in out


@pytest.mark.parametrize("command", GOOD)
def test_every_command_on_good_input(run, command):
    arguments, shown = GOOD[command]
    check_good(shown, *run(command, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["show", "merge"])
def test_good_input_ends_a_process_alike(folder, tmp_path, command):
    arguments, shown = GOOD[command]
    arguments = [str(tmp_path) if each == "merged" else each for each in arguments]
    check_good(shown.replace("merged\n", f"{tmp_path}\n"), *process(folder, command, *arguments))


BAD = {  # command: arguments, what the error says
    "pick": (["my-model", "--delta", "lorra"], "no method 'lorra'; nearest: lora"),
    "tree": (["empty"], "empty has no config.json, so it is no folder of a model"),
    "plan": (["my-model", "--delta", "lorra"], "no method 'lorra'; nearest: lora"),
    "explain": (["empty", "my-model"], "no delta in 'empty': config.json is missing"),
    "show": (["damaged"], "is damaged: its sha256 is not the one in config.json"),
    "report": (
        ["my-lora", "--html", "my-model/config.json"],
        "path='my-model/config.json' must end in .html, such as report.html",
    ),
    "diff": (["my-lora", "my-peft"], "convert one of them first"),
    "merge": (["my-lora", "my-model", "my-peft"], "my-peft exists and is not empty"),
    "convert": (
        ["nameless", "out", "--to", "peft"],
        "nameless does not name its model: give --model",
    ),
    "verify": (["nowhere", "my-model"], "no such folder: nowhere"),
}


def check_bad(said, code, out, errors):
    assert (code, out) == (2, "")
    assert errors.startswith("opendelta: ")
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", BAD)
def test_every_command_on_bad_input(run, command):
    arguments, said = BAD[command]
    check_bad(said, *run(command, *arguments))


@pytest.mark.slow
def test_bad_input_ends_a_process_alike(folder):
    arguments, said = BAD["show"]
    check_bad(said, *process(folder, "show", *arguments))


MISUSED = {  # arguments: what the error says
    "plan my-model": "give at least one --delta, such as --delta lora",
    "plan": "Missing argument 'MODEL'",
    "show": "Missing argument 'CHECKPOINT'",
    "nope": "No such command 'nope'",
    "show --nope x": "No such option: --nope",
    "convert a b --to x": "'x' is not one of 'opendelta', 'peft'",
    "demo --epochs 0": "Invalid value for '--epochs'",
    "plan my-model --at attn.q": "--at 'attn.q' must stand after a --delta",
    "plan my-model -d lora --at=": "'' names no place: give roles or names",
    "plan my-model -d lora@": "'' names no place: give roles or names",
    "plan my-model -d lora --at attn.q,": "'' names no place: give roles or names",
    "plan my-model -d lora: ": "option '' must be name=value",
    "plan my-model -d lora -o lora_r=100000000000000000000": "no memory holds 100,000,000",
    "plan my-model -d lora -o lora_r=8 -o lora_r=4": "option lora_r=... is given 2 times",
    "plan my-model -d lora:lora_r=8,lora_r=8": "option lora_r=... is given 2 times",
    f"plan my-model -d lora:lora_r={'[' * 100_000}": "lora_r=... has too many brackets inside",
    "merge my-lora my-model my-lora/config.json/x": "config.json is a file; give another folder",
    "convert my-peft my-lora/config.json/x --to opendelta --model my-model": "json is a file",
    "compare -d lora --out my-lora/config.json/x --task none.csv": "config.json/x': my-lora/config",
    "train -d lora --out my-lora/config.json/x": "my-lora/config.json is a file; give another fold",
    **{
        f"{command} -d lora --out x --rate {rate}": f"--rate '{rate}' must be NAME=RATE"
        for command in ("train", "compare")
        for rate in ("lora=nan", "lora=inf", "lora=-1", "lora=0", "=1", "lora")
    },
    **{
        f"{command} -d lora --out x {option} {10**30}": f"Invalid value for '{option}'"
        for command, options in {
            "train": "--epochs --batch-size --seed --save-steps --test-size --max-length",
            "compare": "--epochs --batch-size --seeds --max-steps --sweep --train-size",
        }.items()
        for option in options.split()
    },
    f"demo --epochs {10**30}": "Invalid value for '--epochs'",
    f"demo --seed {10**30}": "Invalid value for '--seed'",
    "merge my-lora my-model /proc/x": "cannot write into '/proc/x': No such file or directory; giv",
    "convert my-peft /proc/x --to opendelta --model my-model": "cannot write into '/proc/x': No su",
    "tree my-model --class BertConfig": "of transformers, but of no model; nearest: BertModel",
    "tree my-model --class Nope": "has no such model; give one such as BertForMaskedLM",
    "tree wrong.json": "Field 'hidden_size' expected int, got str",
    "tree \x1b[31m": r"no model '\x1b[31m': there is no such folder",
}


@pytest.mark.parametrize("words", MISUSED)
def test_a_command_that_is_not_used_right_says_so_in_one_line(run, folder, words):
    config = json.loads((folder / "my-model" / "config.json").read_text())
    (folder / "wrong.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    code, out, errors = run(*words.split())
    assert (code, out) == (2, "")
    assert errors.startswith("opendelta: ")
    assert MISUSED[words] in errors
    assert errors.endswith("\n")
    assert errors[:-1].isprintable()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_output_that_nobody_takes_is_said_by_the_exit_code(folder):
    for command, ends in (
        ("show my-lora | true; exit ${PIPESTATUS[0]}", (141, "")),
        ("show my-lora >&-", (2, "opendelta: standard output is closed, so the")),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m opendelta {command}"],
            capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        assert (done.returncode, done.stderr[:44]) == ends


@pytest.mark.slow
def test_a_name_that_the_hub_cannot_be_asked_for_is_one_line(folder):
    script = "import socket; socket.getaddrinfo = None; from opendelta.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "show", "my/nothing"],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


# --------------------------------------------------------------------------------- what they find
def test_verify_and_diff_fail_where_they_find_something(run):
    code, out, errors = run("verify", "my-lora", "another-model")
    assert (code, errors) == (1, "")
    assert "my-lora does not fit another-model: my-lora was saved from another backbone" in out
    code, out, _ = run("verify", "damaged", "my-model", "--json")
    assert code == 1
    assert json.loads(out)["fits"] is False

    code, out, _ = run("diff", "my-lora", "my-composition")
    assert code == 1
    assert "delta style: only in B\n32 tensors only in B: bert.encoder.layer.0-3.attention" in out
    code, out, _ = run("diff", "my-lora", "trained-more", "--json")
    found = json.loads(out)
    assert code == 1
    assert len(found["values"]) == 16
    assert not any(value for name, value in found.items() if name != "values")
    assert run("diff", "my-peft", "my-peft")[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_diff_tells_values_that_no_distance_measures(run, folder, value):
    shutil.rmtree(folder / "odd", ignore_errors=True)
    shutil.copytree(folder / "my-peft", folder / "odd")
    path = folder / "odd" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other[first].view(-1)[0], tensors[first].view(-1)[0] = value, 0.0
    save_file(other, path)
    shutil.rmtree(folder / "zero", ignore_errors=True)
    shutil.copytree(folder / "my-peft", folder / "zero")
    save_file(tensors, folder / "zero" / "adapter_model.safetensors")
    code, out, _ = run("diff", "zero", "odd", "--json")
    assert (code, list(json.loads(out)["values"])) == (1, [first])
    assert run("diff", "odd", "odd")[0] == 0


def test_verify_says_of_which_weights_it_compared_the_values(run, folder):
    alone = "only names and shapes were compared, and no values of the weights under them\n"
    for checkpoint, model in (("my-lora", "another-model/config.json"), ("my-peft", "my-model")):
        code, out, errors = run("verify", checkpoint, model)
        assert (code, out, errors) == (0, f"{checkpoint} fits {model}: lora; {alone}", "")
    shutil.copytree(folder / "my-lora", folder / "unread")
    path = folder / "unread" / "config.json"
    facts = json.loads(path.read_text())
    first, *others = facts["fingerprint"].values()
    first["values"] = None
    path.write_text(json.dumps(facts))
    some = "7 of 8 weights under them are, by a few values of each, those of the training; of the "
    assert some in run("verify", "unread", "my-model")[1]
    for other in others:
        other["values"] = None
    path.write_text(json.dumps(facts))
    assert run("verify", "unread", "another-model") == (
        0,
        f"unread fits another-model: lora; {alone}",
        "",
    )
    found = json.loads(run("verify", "unread", "another-model", "--json")[1])
    assert (found["weights_compared"], len(found["unread"])) == (False, 8)
    path.write_text(json.dumps({**facts, "fingerprint": {}}))
    assert alone in run("verify", "unread", "another-model")[1]
    found = json.loads(run("verify", "unread", "another-model", "--json")[1])
    assert (found["weights_compared"], len(found["unread"])) == (False, 8)
    first["shape"] = [9, 9]
    path.write_text(json.dumps(facts))
    code, out, _ = run("verify", "unread", "my-model")
    assert (code, "is [32, 32] instead of [9, 9]" in out) == (1, True)


def test_a_merged_model_computes_what_the_deltas_did(run, folder):
    assert run("merge", "my-lora", "my-model", "plain", "--json")[0] == 0
    plain = transformers.BertForMaskedLM.from_pretrained(folder / "plain").eval()
    model = transformers.BertForMaskedLM.from_pretrained(folder / "my-model").eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    opendelta.load(folder / "my-lora", model)
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch.allclose(before, model(ids).logits, atol=1e-2)


def test_a_merge_into_another_backbone_has_to_be_asked_for(run):
    code, _, errors = run("merge", "my-lora", "another-model", "other")
    assert code == 2
    assert "--no-check-backbone" in errors
    assert run("merge", "my-lora", "another-model", "other", "--no-check-backbone")[0] == 0


def test_a_report_tells_more_with_a_model_and_replaces_no_other_page(run, folder):
    assert run("report", "my-composition") == (0, "report.html: a report on my-composition\n", "")
    assert "opendelta report my-composition MODEL" in (folder / "report.html").read_text()
    told = {}
    for model in ([], ["my-model/config.json"], ["my-model"], ["another-model"]):
        code, out, _ = run("report", "my-composition", *model, "--json")
        assert code == 0
        told[" ".join(model)] = json.loads(out)
    assert [each["backbone_check"]["status"] for each in told.values()] == [
        "not compared",
        "not compared",
        "same",
        "differing",
    ]
    assert [bool(each["sites"]) for each in told.values()] == [False, True, True, True]
    (folder / "mine.html").write_text("mine")
    code, _, errors = run("report", "my-lora", "--html", "mine.html")
    assert (code, errors) == (
        2,
        "opendelta: mine.html exists and is no report of opendelta: give another name\n",
    )
    assert (folder / "mine.html").read_text() == "mine"


def test_a_conversion_and_back_changes_nothing(run):
    assert run("convert", "my-lora", "to-peft", "--to", "peft", "--model", "my-model")[0] == 0
    assert run("convert", "to-peft", "back", "--to", "opendelta", "--model", "my-model")[0] == 0
    assert run("diff", "my-lora", "back") == (0, "the same: 16 tensors, bit for bit\n", "")
    code, _, errors = run("convert", "my-composition", "x", "--to", "peft", "--model", "my-model")
    assert code == 2
    assert "'style' cannot be written for PEFT" in errors
    assert not Path("x").exists()


def test_a_conversion_takes_the_model_that_the_folder_names(run, folder):
    assert json.loads(run("show", "my-lora", "--json")[1])["model"] == str(folder / "my-model")
    assert run("convert", "my-lora", "named", "--to", "peft")[0] == 0
    assert run("convert", "named", "named-back", "--to", "opendelta")[0] == 0
    assert run("diff", "my-lora", "named-back") == (0, "the same: 16 tensors, bit for bit\n", "")


def test_a_merge_of_deltas_that_are_all_off_says_so(run, folder):
    shutil.copytree(folder / "my-lora", folder / "off")
    path = folder / "off" / "config.json"
    path.write_text(path.read_text().replace('"active": true', '"active": false'))
    code, out, _ = run("merge", "off", "my-model", "as-before")
    assert code == 0
    assert out.startswith("merged nothing, as no delta is active, into a BertForMaskedLM")


def test_everything_is_data_too(run):
    data = {}
    for command, *arguments in (
        ("plan", "my-model", "--delta", "lora"),
        ("tree", "my-model", "--roles"),
        ("explain", "my-composition", "my-model"),
        ("explain", "my-composition", "my-model", "--module", "layer.0.output"),
        ("show", "my-composition"),
        ("show", "my-peft"),
        ("verify", "my-lora", "my-model"),
    ):
        code, out, errors = run(command, *arguments, "--json")
        assert (code, errors) == (0, "")
        data[(command, *arguments)] = json.loads(out)
    plan, roles, explained, one, shown, foreign, fits = data.values()
    assert plan["added_parameters"] == 2 * 4 * 8 * 64
    assert roles["bert.encoder.layer.0.attention.self.query"] == "attn.q"
    assert len(explained) == 16
    assert one[0]["formula"] == "y = output(x)"
    assert [delta["name"] for delta in shown["deltas"]] == ["lora", "style"]
    assert shown["deltas"][1] | {"modules": 8} == {
        "name": "style", "delta_type": "adapter", "active": False, "scale": 1.0, "frozen": 0,
        "parameters": 8 * (2 * 24 * 32 + 24 + 32), "modules": 8, "modules_to_save": [],
        "options": {},
    }  # fmt: skip
    assert foreign["format"] == "PEFT"
    assert foreign["deltas"][0]["options"] == {"lora_alpha": 16, "r": 4}
    assert fits.pop("unread") == []
    assert fits == {"fits": True, "problem": None, "deltas": ["lora"], "weights_compared": True}


def test_numbers_that_json_does_not_have_are_null(run, folder):
    shutil.copytree(folder / "my-lora", folder / "run" / "deltas")
    facts = {"score": math.nan, "rates": {"lora": math.inf}}
    (folder / "run" / "training.json").write_text(json.dumps(facts))
    code, out, _ = run("report", "run/deltas", "--json")
    told = json.loads(out, parse_constant=pytest.fail)
    assert (code, told["training"]) == (0, {"score": None, "rates": {"lora": None}})


OTHERS = {
    "golden/bert_lora_default/delta": "OpenDelta 0.3, saved from",
    "golden_adapters/llama/compacter_own_rules": "adapters, saved from LlamaForCausalLM",
}


@pytest.mark.parametrize("path", OTHERS)
def test_show_reads_the_folders_of_other_libraries(run, path):
    code, out, errors = run("show", str(TESTS / "interop" / path))
    assert (code, errors) == (0, "")
    assert OTHERS[path] in " ".join(out.split())  # a long path wraps the line


def test_the_class_is_the_config_s_a_checkpoint_s_or_the_one_that_is_asked_for(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for long
    asked = ["--class", "BertForSequenceClassification"]
    assert "classifier (Linear) weight:[2, 32]" in run("tree", "my-model", *asked)[1]
    code, _, errors = run("tree", "my-model", "--class", "BertForMasked")
    assert code == 2
    assert "transformers has no such model; nearest: BertForMaskedLM" in errors
    code, _, errors = run("tree", "nowhere")
    assert code == 2
    assert "no model 'nowhere': there is no such folder or file here, and the hub says" in errors
    code, _, errors = run("merge", "my-lora", "my-model/config.json", "m")
    assert code == 2
    assert "is a config, and the weights are needed: give the folder" in errors
    Path("odd.json").write_text('{"a": 1}')
    assert "no config of a transformers model: it has no model_type" in run("tree", "odd.json")[2]


# -------------------------------------------------------------------------------- what is asked for
SAME = [
    "--delta lora:lora_r=4,init=gaussian@attn.q,attn.v --delta adapter@output",
    "--delta=lora --option lora_r=4 --at=attn.q,attn.v -o init=gaussian -d adapter -a output",
    "-d lora:lora_r=4 -o init=gaussian -a attn.q -a attn.v --delta adapter@output",
]


@pytest.mark.parametrize("words", SAME)
def test_options_and_places_belong_to_the_delta_before_them(words):
    joined = gathered(["model", *words.split(), "--json"])
    assert (joined[0], joined[-1], len(joined)) == ("model", "--json", 6)
    lora, adapter = map(requests.parse, (joined[2], joined[4]))
    assert lora == requests.Request("lora", {"lora_r": 4, "init": "gaussian"}, ["attn.q", "attn.v"])
    assert adapter == requests.Request("adapter", {}, ["output"])


def test_values_and_places_may_hold_commas_in_brackets():
    asked = requests.parse(
        r'lora:rank_pattern={"query": 4, "key": 2},use_dora=True@[r]\d{1,2}\.q,k'
    )
    assert asked.options == {"rank_pattern": {"query": 4, "key": 2}, "use_dora": True}
    assert asked.places == [r"[r]\d{1,2}\.q", "k"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora r=4", "must be TYPE, or TYPE:name=value"),
        ("lora:lora_r", "'lora_r' must be name=value"),
        ("lora:rank=4", "'lora' has no option 'rank'; nearest"),
    ],
)
def test_what_is_not_written_right_is_an_error(text, said):
    with pytest.raises(DeltaError, match=said):
        requests.parse(text)


def test_places_are_roles_patterns_or_both(folder):
    model = transformers.BertForMaskedLM.from_pretrained(folder / "my-model")

    def config(text):
        return requests.config_for(model, requests.parse(text))

    assert config("lora@attn.q,ff.w2").common_structure
    assert config("lora@query").modified_modules == ["query"]
    mixed = opendelta.plan(model, config("lora@attn.q,intermediate.dense"))
    assert len(mixed.deltas[0].modules) == 8
    with pytest.raises(DeltaError, match="pairs need one"):
        config("parallel_adapter@ff.w1,output.dense")
    with pytest.raises(DeltaError, match="not both"):
        config('lora:modified_modules=["key"]@query')
    with pytest.raises(DeltaError, match=r"has the role 'ff.gate': the roles in it are"):
        config("lora@ff.gate")


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub():
    for path in ("/nowhere/at/all", "./nowhere", "a/b/c", "../config.json"):
        with pytest.raises(DeltaError, match=r"there is no such folder or file$"):
            models.without_weights(path)


# --------------------------------------------------------------------------------------- the page
def test_the_examples_in_the_page_print_what_it_says(run):
    examples = EXAMPLE.findall(DOCS.read_text())
    assert {command.split()[0] for command, _ in examples} == set(GOOD)
    for command, said in examples:
        _, out, errors = run(*command.split())
        assert plain(out + errors) == plain(said), command


def plain(text):
    """The lines of a text, without sizes of files and relative norms, which may change."""
    lines = [line.rstrip() for line in re.sub(r"\d[\d.]* KiB|by \d[\d.]*", "", text).splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("to", ["svg", "html"])
def test_a_picture_is_utf_8_on_any_terminal(to, folder, monkeypatch):
    command = ["opendelta", "tree", "my-model", "--deltas", "my-composition", "--to", to]
    written = io.BytesIO()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with contextlib.suppress(SystemExit):
        main()
    sys.stdout.flush()
    built = models.without_weights(str(folder / "my-model"), None, "")
    opendelta.load(folder / "my-composition", built, check_backbone=False)
    assert written.getvalue().decode("utf-8").strip() == opendelta.tree(built, to=to).strip()
