"""The site of the documentation: it builds, is whole, loads nothing from elsewhere, and works."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import time
import zlib

import cli_table
import pytest
import site_names
import yaml
from support import ROOT
from support.browser import chromium

import opendelta

API = (ROOT / "docs" / "reference").rglob("*.md")
pytestmark = pytest.mark.slow


def build(folder, *more):
    """What building the site into a folder ends in."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", str(folder), *more],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


# ------------------------------------------------------------------------------------------- whole
def test_it_loads_nothing_from_another_host(site):
    loads = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*?\s(?:src|href)=[\"']?([^\"'\s>]+)"
    )
    pages = [*site.rglob("*.html")]
    assert len(pages) > 25
    for page in pages:
        away = [to for to in loads.findall(page.read_text()) if re.match(r"(https?:)?//", to)]
        assert not away, page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\([\"']?|@import\s+[\"'])(https?:)?//", style.read_text()), style


def test_each_public_name_is_in_the_reference_once(site):
    _, rest = (site / "objects.inv").read_bytes().split(b"zlib.\n")
    built = {line.split()[0] for line in zlib.decompress(rest).decode().splitlines()}
    named = re.findall(r"^::: opendelta\.(\w+)$", "\n".join(p.read_text() for p in API), re.M)
    assert sorted(named) == sorted(opendelta.__all__)
    assert {f"opendelta.{name}" for name in named} <= built
    assert {"opendelta.Delta.attach", "opendelta.Composition.merge"} <= built


@pytest.mark.parametrize("name", opendelta.errors.__all__)
def test_each_error_says_its_cause_and_its_cure(name):
    text = getattr(opendelta, name).__doc__
    assert re.search(r"^ +Cause:\n +\S", text, re.M)
    assert re.search(r"^ +Cure:\n +\S", text, re.M)


def test_the_page_of_the_command_line_has_each_command_and_option():
    text = cli_table.PAGE.read_text()
    assert cli_table.page(text) == text, "run `python tools/cli_table.py`"


def test_a_broken_link_or_anchor_stops_the_build(tmp_path):
    config = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "nav": [{"Start": "index.md"}],
        "hooks": [str(ROOT / "tools" / "site_pages.py")],
        "theme": {"name": "mkdocs", "palette": None, "features": None},
        "plugins": [],
        "extra_css": [],
        "watch": [],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs").mkdir()
    text = "[a](nowhere.md) [b](#no-place) [c](../opendelta/nowhere.py) [d](../README.md) `[e](f)`"
    (tmp_path / "docs" / "index.md").write_text(text)
    done = build(tmp_path / "site", "-f", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1
    for wrong in ("'nowhere.md'", "'#no-place'", "../opendelta/nowhere.py"):
        assert wrong in done.stderr
    assert "README" not in done.stderr


def test_a_public_name_without_a_docstring_is_found():
    import griffe

    code = "__all__ = ['f', 'A']\ndef f(): pass\nclass A:\n    'A.'\n    def m(self): pass\n"
    with griffe.temporary_visited_package("one", {"__init__.py": code}) as package:
        assert [*site_names.undocumented(package)] == ["one.f", "one.A.m"]


# ------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def address(site):
    """Where a server of this machine shows the site."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    opened = chromium()
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def phone():
    opened = chromium(width=390, height=844)
    yield opened
    opened.quit()


def wait(condition, seconds=20):
    """What a condition gives once it holds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page did not come to this"
        time.sleep(0.05)
    return found


def test_the_start_page_has_four_doors_that_lead_to_pages(browser, address):
    browser.get(address)
    doors = browser.find_elements("css selector", ".doors a:not(.headerlink)")
    assert [door.text for door in doors] == ["Tutorials", "How-to", "Reference", "Explanation"]
    for door in [door.get_attribute("href") for door in doors]:
        browser.get(door)
        assert browser.find_element("tag name", "h1").text


def test_the_search_finds_a_class(browser, address):
    browser.get(address)
    browser.execute_script("document.querySelector('.md-search__input').focus()")
    browser.find_element("css selector", ".md-search__input").send_keys("LoraModel")
    links = ".md-search-result__link"
    found = wait(lambda: browser.find_elements("css selector", links))
    assert any("#opendelta.LoraModel" in link.get_attribute("href") for link in found)


def test_a_block_of_code_has_a_button_that_copies_it(browser, address):
    browser.get(address)
    button = "pre [data-md-type=copy], pre .md-clipboard"
    assert wait(lambda: browser.find_elements("css selector", button))


def test_the_switch_turns_the_page_dark_and_back(browser, address):
    browser.get(address)

    def switches():
        labels = browser.find_elements("css selector", "[data-md-component=palette] label")
        return [label for label in labels if label.is_displayed()]

    def scheme():
        return browser.find_element("tag name", "body").get_attribute("data-md-color-scheme")

    for expected in ("slate", "default"):
        wait(switches)[0].click()
        wait(lambda expected=expected: scheme() == expected)


def test_on_a_phone_no_page_scrolls_sideways(phone, address, site):
    pages = sorted(str(page.relative_to(site).parent) for page in site.rglob("index.html"))
    assert len(pages) > 25
    phone.execute_cdp_cmd("Network.enable", {})  # each page would read the index of the search
    phone.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*search*"]})
    for page in pages:
        phone.get(f"{address}/{page}/")
        root = "document.documentElement"
        assert not phone.execute_script(f"return {root}.scrollWidth > {root}.clientWidth"), page
