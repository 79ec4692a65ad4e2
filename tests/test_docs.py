"""The pages in docs/ are true: their Python runs, and what is generated is up to date."""

import re
from pathlib import Path

import methods_table
import torch
import transformers

import opendelta

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def bert():
    """A BERT of twelve small blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=3000, **sizes)).eval()


def test_the_table_of_methods_is_what_the_script_writes():
    text = methods_table.PAGE.read_text()
    assert methods_table.page(text) == text


def test_every_method_and_option_is_in_the_page_of_methods():
    text = methods_table.PAGE.read_text()
    for method in opendelta.registry.METHODS.values():
        if not method.__module__.startswith("opendelta."):
            continue
        assert f"`{method.__name__}`" in text
        common = opendelta.DeltaConfig.option_names()
        for option in method.config_class.option_names():
            listed = f"`{option}`" in text or "..." in text.split(f"| `{method.__name__}`")[-1]
            assert option in common or listed, (method.__name__, option)


def test_the_examples_in_the_page_of_methods_run():
    names = {"model": bert()}
    for code in BLOCK.findall(methods_table.PAGE.read_text()):
        exec(compile(code, str(methods_table.PAGE), "exec"), names)
    model = names["model"]
    ids = torch.randint(5, 3000, (2, 7))
    assert model(ids).logits.shape == (2, 7, 3000)
    assert len(opendelta.composition(model).names) == 14
    assert opendelta.unreached(model) == []
