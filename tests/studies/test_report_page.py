"""The page of `opendelta.report` in a real Chromium, on a screen and on a phone, light and dark."""

import json
import re

import pytest
import torch
from support.browser import chromium
from support.nets import shake
from torch import nn

from opendelta import AdapterModel, AverageModel, LoraModel, composition, report
from opendelta.studies.comparison import Comparison, Row

pytestmark = [pytest.mark.slow, pytest.mark.covers("report", "CompositionReport")]
LONG = "a" * 300
RATES = {"long_" + LONG: 0.001}


@pytest.fixture(scope="module", params=["light on a screen", "dark on a phone"])
def browser(request):
    dark = "dark" in request.param
    opened = chromium(390 if dark else 1280, 844, dark)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with long names, a block, many layers, and facts of its training."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(30)]
    model = nn.Sequential(nn.ModuleDict({LONG: nn.Sequential(*blocks)}))
    for seed, name in enumerate(("law", "news")):
        lora = LoraModel(model, modified_modules=[r"[r]\d+\.0"], lora_r=2, name=name)
        shake(lora, seed=seed)
    AverageModel(model, deltas=["law", "news"], name="mix")
    style = AdapterModel(model, modified_modules=["3.2", "7.2"], bottleneck_dim=2, name="style")
    shake(style, seed=3).freeze_module()
    root = tmp_path_factory.mktemp("run")
    composition(model).save(root / "deltas")
    row = Row("law+news " + LONG, [0.5], 0.5, None, 7, 0.25, 1.0, 8, 9, RATES)
    facts = {"train": 3, "test": 4}
    compared = Comparison(LONG, LONG, True, None, facts, "here", [row], [])
    (root / "training.json").write_text(json.dumps({"score": 0.5, "unit": LONG, "rates": RATES}))
    (root / "report.json").write_text(json.dumps(compared.to_dict()))
    for name, found in (
        ("alone", report(root / "deltas")),
        ("both", report(root / "deltas", model)),
        ("live", report(model)),
    ):
        found.save(root / f"{name}.html")
    return root


@pytest.mark.parametrize("name", ["alone", "both", "live"])
def test_it_fits_the_window_loads_nothing_and_follows_the_system_s_colours(browser, folder, name):
    browser.get((folder / f"{name}.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    wide, window = browser.execute_script(
        "for (const each of document.querySelectorAll('details')) each.open = true;"
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert wide <= window
    light = browser.execute_script(
        "const colour = what => getComputedStyle(document.body)[what].match(/\\d+/g).map(Number);"
        "return [Math.max(...colour('backgroundColor')), Math.max(...colour('color'))]"
    )
    assert (light[0] > light[1]) == (window > 390)


def test_bars_are_as_high_as_the_changes(browser, folder):
    browser.get((folder / "both.html").as_uri())
    data = report(folder / "deltas").norms
    style = [each.norm for each in data if each.delta == "style"]
    path = browser.execute_script(
        "const charts = [...document.querySelectorAll('.chart')];"
        "const own = charts.find(chart => chart.innerText.startsWith('style'));"
        "const path = own.querySelector('svg path');"
        "return [path.getAttribute('d'), path.getBoundingClientRect().height]"
    )
    heights = [float(each) for each in re.findall(r"v-([\d.]+)", path[0])]
    assert heights == pytest.approx([40 * each / max(style) for each in style], abs=0.06)
    assert path[1] == pytest.approx(43, abs=1)  # 44 pixels with a line of one beneath
    assert browser.execute_script("return document.querySelectorAll('svg path').length") == 3


def test_a_notebook_shows_it_in_a_frame_of_its_own(browser, folder, tmp_path):
    (tmp_path / "notebook.html").write_text(
        f'<meta charset="utf-8"><h1>mine</h1>{report(folder / "deltas")._repr_html_()}'
    )
    browser.get((tmp_path / "notebook.html").as_uri())
    size = "return getComputedStyle(document.querySelector('h1')).fontSize"
    assert browser.execute_script(size) == "32px"
    browser.switch_to.frame(0)
    assert browser.execute_script("return document.querySelector('h1').textContent").startswith(
        "law"
    )
    browser.switch_to.default_content()
    assert browser.get_log("browser") == []
