"""What a new method's author may forget: each place is named here, with what to do."""

from pathlib import Path

import methods_table
import pytest

from opendelta._deltas.registry import METHODS

ROOT = Path(__file__).parents[2]
PAGE = methods_table.PAGE.relative_to(ROOT)
OWN = {n: m for n, m in sorted(METHODS.items()) if m.__module__.startswith("opendelta.")}
# Checked against a reference elsewhere than in test_equations.py.
ELSEWHERE = {
    "bitfit": "against the backbone's own bias",
    "fourierft": "against PEFT",
    "ln_tuning": "against the backbone's own norm",
    "prefix": "against attention in float64",
}


@pytest.mark.parametrize("name", OWN)
def test_a_method_is_in_its_places(name):
    model = OWN[name]
    file, cls = f"opendelta/methods/{name}.py", model.__name__
    assert (ROOT / file).exists(), f"{cls}: its delta_type is {name!r}, so its file must be {file}"
    page = methods_table.PAGE.read_text(encoding="utf-8")
    row = f"| `{name}` | `{cls}` |"
    assert row in page, f"{cls} has no row in {PAGE}: run `python tools/methods_table.py`"
    assert page.count(f"`{cls}`") > 1, f"{PAGE} says nothing of {cls}: write a line there"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cls in readme, f"README.md lists the methods: add {cls} there"
    (equations,) = ROOT.glob("tests/**/test_equations.py")
    known = cls in equations.read_text(encoding="utf-8") or name in ELSEWHERE
    assert known, f"{cls} is compared with no reference: write its equation in {equations}"
    example = "Example:" in (model.__doc__ or "") and ">>>" in (model.__doc__ or "")
    assert example, f"the docstring of {cls} has no `Example:` that begins with >>>: write one"


def test_every_file_is_a_method_that_is_known():
    for file in sorted((ROOT / "opendelta/methods").glob("[a-z]*.py")):
        known = file.stem in METHODS
        assert known, f"{file.name}: no method of that name: import it in methods/__init__.py"


def test_the_readme_counts_the_methods():
    words = {17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty", 21: "twenty-one"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    heading = f"## {words[len(OWN)].capitalize()} methods"
    assert heading in readme, f"README.md: the heading above the list must be {heading!r}"


def test_the_table_of_methods_is_written():
    text = methods_table.PAGE.read_text(encoding="utf-8")
    message = "a method changed: run `python tools/methods_table.py`"
    assert methods_table.page(text) == text, message
