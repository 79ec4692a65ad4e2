"""Write the table into docs/reference/methods.md; `--check` only says whether it is true."""

import re
import sys
from pathlib import Path

import torch
import transformers
from marked import replaced

import opendelta
from opendelta._deltas.registry import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "methods.md"
KINDS = {
    "linear": "linear",
    "embedding": "embedding",
    "conv2d": "Conv2d",
    "norm": "norm",
    "other": "any with hidden states",
    "attention": "attention",
    "stack": "model that embeds tokens",
}


def paper(method: type[opendelta.Delta]) -> str:
    """The arXiv number in a method's docstring."""
    module = sys.modules[method.__module__]
    found = re.search(r"arXiv:(\d{4}\.\d{5})", module.__doc__ or "")
    assert found, f"{method.__module__} names no paper"
    return found[1]


def row(name: str, method: type[opendelta.Delta]) -> str:
    """One line of the table."""
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig())
    delta = method(model)
    count = sum(p.numel() for p in delta.parameters())
    modules = len(delta.modified_modules)
    layers = [delta.layers[n] for n in delta.modified_modules if n in delta.layers]
    number = paper(method)
    folds = "yes" if all(layer.folds for layer in layers) else "no"
    kinds = ", ".join(KINDS[kind] for kind in method.layer_class.kinds)
    return (
        f"| `{name}` | `{method.__name__}` | [{number}](https://arxiv.org/abs/{number}) | "
        f"{count:,} | {modules} | {folds} | {method.default_learning_rate:g} | {kinds} |\n"
    )


def table() -> str:
    """The whole table."""
    head = (
        "| type | class | paper | parameters on bert-base | modules | folds | rate | goes on |\n"
        "|---|---|---|--:|--:|---|--:|---|\n"
    )
    own = {n: m for n, m in sorted(METHODS.items()) if m.__module__.startswith("opendelta.")}
    return head + "".join(row(name, method) for name, method in own.items())


def page(text: str) -> str:
    """The page with the table as it should be."""
    return replaced(text, "table", table())


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(page(text) != text)
    PAGE.write_text(page(text), encoding="utf-8")
