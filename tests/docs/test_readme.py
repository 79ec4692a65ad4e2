"""README is true: its Python runs, and prints what it says."""

import html
import re

import pytest
from support import ROOT

import opendelta

README = ROOT / "README.md"
TREE = ROOT / "docs" / "assets" / "tree.svg"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks():
    return BLOCK.findall(README.read_text())


@pytest.mark.slow
def test_the_examples_run_and_print_what_the_readme_says(offline, capsys):
    names, shown = {}, []
    for language, code in blocks():
        if language == "python":
            exec(compile(code, str(README), "exec"), names)
            shown.append(capsys.readouterr().out)
        elif language == "text":
            printed = shown.pop()
            tree = printed.find("Trainable Ratio")  # what is above it is in the picture
            assert code == printed[max(tree, 0) :]
    assert not shown


def test_the_picture_is_the_tree_of_the_first_example(offline, capsys):
    names = {}
    exec(compile(blocks()[0][1], str(README), "exec"), names)
    text = TREE.read_text()
    assert str(opendelta.tree(names["model"], to="svg")) == text, "run tools/tree_picture.py"
    lines = re.findall(r"^<text .*?>(.*)</text>$", text, re.M)
    drawn = "\n".join(html.unescape(re.sub("<.*?>", "", line)) for line in lines)
    drawn = drawn.replace("\xa0", " ")
    assert capsys.readouterr().out.startswith(drawn + "\n")


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_its_links_and_pictures_lead_to_files_and_headings():
    for to in re.findall(r"\]\((?!https?:)(.*?)\)", README.read_text()):
        file, _, anchor = to.partition("#")
        headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert (ROOT / file).exists(), to
        assert not anchor or anchor in slugs, to


def test_the_set_up_is_two_commands():
    (commands,) = [code for language, code in blocks() if language == "sh"]
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == [
        "make demo",
        "make test",
    ]


def test_it_credits_its_predecessor_and_says_that_it_shares_no_code():
    text = " ".join(README.read_text().split())
    for fact in ("thunlp/OpenDelta", "2307.03084", "2203.06904", "shares no code"):
        assert fact in text
