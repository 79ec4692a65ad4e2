"""The pages in docs/ are true: their Python runs, and what is generated is up to date."""

import base64
import json
import re
import threading

import methods_table
import numpy as np
import pytest
import torch
import transformers
from support import ROOT
from support.picking import Picking

import opendelta
from opendelta._picker import session

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SCORE = re.compile(r"\b[01]\.\d\d\b")  # of a training, which differs a little between machines
PRINTED = re.compile(r"^```(python|text)\n(.*?)^```$", re.M | re.S)


def bert():
    """A BERT of twelve small blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=3000, **sizes)).eval()


# Pages whose code needs more than a model, and the test file that runs them.
ELSEWHERE = {
    "how-to/distributed.md": "tests/support/distributed_worker.py",
    "how-to/picker.md": "tests/docs/test_docs.py",
    "how-to/recipes.md": "tests/examples/test_recipes.py",
    "how-to/tools.md": "tests/tools/test_page.py",
    "reference/cli.md": "tests/package/test_cli.py",
    "reference/format.md": "tests/docs/test_docs.py",
}
TEXTS = {str(p.relative_to(DOCS)): p.read_text() for p in sorted(DOCS.rglob("*.md"))}
FENCES = {
    page: re.findall(r"^ *(?:```|~~~) *(.*)$", text, re.M)[::2] for page, text in TEXTS.items()
}
RUNNING = [page for page, words in FENCES.items() if {"python", "console"} & {*words}]


def test_every_block_says_in_a_word_that_is_known_what_it_holds():
    for page, words in FENCES.items():
        assert {*words} <= {"python", "text", "console", "sh", "json"}, page


@pytest.mark.parametrize("page", ELSEWHERE)
def test_a_page_that_is_run_elsewhere_is_named_there(page):
    assert page in RUNNING
    assert page.rpartition("/")[2] in (ROOT / ELSEWHERE[page]).read_text()


@pytest.mark.parametrize("page", [page for page in RUNNING if page not in ELSEWHERE])
def test_the_examples_run_and_print_what_the_page_says(page, tmp_path, offline, capsys):
    assert "console" not in FENCES[page], "say in ELSEWHERE what runs it"
    (tmp_path / "their-work").symlink_to(ROOT / "tests" / "interop" / "golden_adapters" / "bert")
    names = {"model": bert(), "fresh": bert(), "folder": tmp_path / "folder"}
    printed = ""
    for language, code in PRINTED.findall(TEXTS[page]):
        if language == "python":
            assert not printed, f"the page does not show this: {printed}"
            exec(compile(code, page, "exec"), names)
            printed = capsys.readouterr().out
        else:
            assert SCORE.sub("_", code.strip()) == SCORE.sub("_", printed.strip())
            shown, scores = ([*map(float, SCORE.findall(text))] for text in (code, printed))
            assert scores == pytest.approx(shown, abs=0.05)
            printed = ""
    assert not printed, f"the page does not show this: {printed}"


def test_the_examples_in_the_page_of_the_picker_run_and_submit_what_the_page_shows(
    monkeypatch, capsys
):
    def submit(address, browser):
        page = Picking.__new__(Picking)
        page.address = address
        submitting = lambda: page.ask("submit", {"deltas": page.ask("open")["deltas"]})  # noqa: E731
        threading.Thread(target=submitting, daemon=True).start()

    monkeypatch.setattr(session, "_announce", submit)
    names, printed = {"model": bert()}, []
    for language, code in PRINTED.findall((DOCS / "how-to" / "picker.md").read_text()):
        if language == "python":
            exec(compile(code, "picker.md", "exec"), names)
            printed.append(capsys.readouterr().out)
        else:
            assert code == printed.pop()
    assert not printed


def test_the_table_of_methods_is_what_the_script_writes():
    text = methods_table.PAGE.read_text()
    assert methods_table.page(text) == text


def test_every_method_and_option_is_in_the_page_of_methods():
    text = methods_table.PAGE.read_text()
    for method in opendelta._deltas.registry.METHODS.values():
        if not method.__module__.startswith("opendelta."):
            continue
        assert f"`{method.__name__}`" in text
        common = opendelta.DeltaConfig.option_names()
        for option in method.config_class.option_names():
            listed = f"`{option}`" in text or "..." in text.split(f"| `{method.__name__}`")[-1]
            assert option in common or listed, (method.__name__, option)


def test_the_methods_of_the_page_act_together_on_one_model():
    names = {"model": bert()}
    for code in BLOCK.findall(methods_table.PAGE.read_text()):
        exec(compile(code, str(methods_table.PAGE), "exec"), names)
    model = names["model"]
    ids = torch.randint(5, 3000, (2, 7))
    assert model(ids).logits.shape == (2, 7, 3000)
    assert len(opendelta.composition(model).names) == 15
    assert opendelta.unreached(model) == []


# ------------------------------------------------------------------ docs/reference/format.md
FORMAT = (DOCS / "reference" / "format.md").read_text()


def test_the_page_of_the_format_names_every_key(tmp_path):
    model = bert()
    model.config._name_or_path, model.config.num_labels = "user/name", 3
    delta = opendelta.LoraModel(model)
    delta.freeze_module()
    delta.scale = 0.5
    delta.save_finetuned(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (fact,) = config["deltas"]
    keys = re.findall(r"^\| `(\w+)` \|", FORMAT, re.M)
    assert keys == [*config, *fact]
    assert f"is\nschema {config['schema_version']}" in FORMAT
    limits, deltas = opendelta._files.reading, opendelta._checkpoint.source.MOST_DELTAS
    sizes = f"{limits.LARGEST // 2**20} MiB, {limits.MOST_ITEMS:,} items and {deltas:,} deltas"
    assert f"at most {sizes}" in FORMAT
    assert f"is at most {opendelta._checkpoint.fingerprint.TOLERANCE}" in FORMAT.replace("\n", " ")
    assert f"{opendelta._checkpoint.fingerprint.SAMPLES} values" in FORMAT.replace("\n", " ")


def test_the_places_of_the_fingerprint_are_as_the_page_says(tmp_path):
    model = bert()
    delta = opendelta.LoraModel(model)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    prints = json.loads((tmp_path / "config.json").read_text())["fingerprint"]
    (places,) = re.findall(r"`(sorted\(.*\))`", FORMAT)
    for name, facts in prints.items():
        flat = model.get_parameter(name).detach().flatten()
        values = flat[eval(places, {"n": flat.numel()})]
        given = np.frombuffer(base64.b64decode(facts["values"]), "<f4")
        assert given.tolist() == values.tolist()


def test_the_format_is_read_without_opendelta_as_the_page_does(tmp_path, monkeypatch, capsys):
    model = bert()
    opendelta.LoraModel(model, lora_r=2)
    opendelta.AdapterModel(model, name="style", modules_to_save=["cls"]).freeze_module()
    opendelta.composition(model).save(tmp_path / "my-delta")
    monkeypatch.chdir(tmp_path)
    (code,) = BLOCK.findall(FORMAT)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(code, "format.md", "exec"), names)
    own = {k: t for d in opendelta.composition(model) for k, t in d.state_dict().items()}
    assert names["tensors"].keys() == own.keys()
    assert all(torch.equal(names["tensors"][key], tensor) for key, tensor in own.items())
    assert capsys.readouterr().out.startswith("lora lora ['bert.encoder.layer.0.attention")
