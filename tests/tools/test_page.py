"""The page about tools is true: its Python runs, and its links lead to tests."""

import re

import pytest
import test_trl as trl
from datasets import Dataset
from support import ROOT
from support.models import build, token_ids
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig

PRINTED = re.compile(r"^```(python|text)\n(.*?)^```$", re.M | re.S)
PAGE = (ROOT / "docs" / "how-to" / "tools.md").read_text()
pytestmark = pytest.mark.covers("from_pretrained", "optimizer_groups")


def test_the_examples_run_and_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=8).tolist()]
    options = trl.options(tmp_path / "out")
    several = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4}
    names = {
        "model": build("llama"), "rows": Dataset.from_list(rows), "tokenizer": trl.tokenizer(),
        "arguments": TrainingArguments(**options), "dpo_arguments": DPOConfig(**options),
        "grpo_arguments": GRPOConfig(**{**options, **several, "beta": 0.1}), "pairs": trl.PAIRS,
        "prompts": trl.PROMPTS, "reward": lambda completions, **_: [1.0] * len(completions),
    }  # fmt: skip
    printed, compared = "", 0
    for language, code in PRINTED.findall(PAGE):
        if language == "python":
            capsys.readouterr()
            exec(compile(code, "tools.md", "exec"), names)
            printed = capsys.readouterr().out
        else:
            assert code.strip() == printed.strip().splitlines()[-1]
            compared += 1
    assert compared == 3


@pytest.mark.parametrize("page", ["tools", "distributed"])
def test_each_link_to_a_test_leads_there(page):
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    links = re.findall(r"\]\(\.\./\.\./(tests/[\w/.]+)\)", text)
    assert len(links) > 2
    assert all((ROOT / link).is_file() for link in links)
