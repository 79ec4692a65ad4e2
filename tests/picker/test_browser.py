"""The page in a real Chromium: picking, searching, the order, the end, keys, and large models."""

import time

import pytest
import torch
import transformers
from support.browser import chromium
from support.nets import net
from torch import nn

import opendelta
from opendelta import AdapterConfig, LoraConfig

pytestmark = [pytest.mark.covers("pick"), pytest.mark.slow]


@pytest.fixture(scope="module")
def browser():
    opened = chromium()
    yield opened
    opened.quit()


class Page:
    """The page in a browser."""

    def __init__(self, browser, address):
        self.browser = browser
        started = time.monotonic()
        browser.get(address)
        self.wait(lambda: self.all(".row") and self.text("#figures"))
        self.opened_in = time.monotonic() - started

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.one(selector).text

    def wait(self, condition, seconds=15):
        """Wait until a condition holds on a page that redraws itself meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < end, "the page did not come to this"
            time.sleep(0.03)

    def rows(self):
        """{text of a row's name: the attributes of the row}, in one look at the page."""
        return self.browser.execute_script(
            "return Object.fromEntries([...document.querySelectorAll('.row')].map(row => "
            "[row.querySelector('.name').textContent, {checked: row.getAttribute('aria-checked'), "
            "expanded: row.getAttribute('aria-expanded'), title: row.title, "
            "level: row.getAttribute('aria-level'), text: row.textContent, "
            "label: row.getAttribute('aria-label'), at: row.classList.contains('at')}]))"
        )

    def click(self, name, part="name", shift=False):
        """Click on a part of a row as a user does."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        self.wait(lambda: name in self.rows())
        if part == "box":
            self.wait(lambda: self.rows()[name]["checked"])
        path = f"//*[@class='name' and text()='{name}']/ancestor::*[@role='treeitem']"

        def act():
            row = self.browser.find_element("xpath", path).find_element("class name", part)
            actions = ActionChains(self.browser)
            if shift:
                actions.key_down(Keys.SHIFT)
            actions.click(row)
            if shift:
                actions.key_up(Keys.SHIFT)
            actions.perform()
            return True

        self.wait(act)

    def press(self, *keys):
        self.one("#tree").send_keys(*keys)

    def enter(self, label):
        """Press Enter on a button."""
        from selenium.webdriver.common.action_chains import ActionChains

        script = (
            "for (const each of document.querySelectorAll('button'))"
            " if ([each.textContent, each.ariaLabel].includes(arguments[0]))"
            " return each.focus(), document.activeElement === each"
        )
        self.wait(lambda: self.browser.execute_script(script, label))
        ActionChains(self.browser).send_keys("\ue007").perform()

    def focus(self):
        """What has the focus: its text or its id."""
        active = self.browser.switch_to.active_element
        return active.text or active.get_attribute("id")

    def names(self):
        """The deltas on the page, in their order."""
        return [e.text for e in self.all("#deltas strong")]

    def python(self, line):
        self.wait(lambda: line in self.text("#text"))


@pytest.fixture
def page(browser, picking):
    """Open the page for a call that picks; `.picking` is the session."""

    def opened(call):
        running = picking(call)
        page = Page(browser, running.address)
        page.picking = running
        return page

    yield opened
    noise = [entry for entry in browser.get_log("browser") if entry["source"] != "network"]
    assert not noise


def bert(blocks=4):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=96, num_hidden_layers=blocks, **sizes)
    with torch.device("meta"):
        return transformers.BertForMaskedLM(config)


def queries(*blocks):
    return [f"bert.encoder.layer.{block}.attention.self.query" for block in blocks]


def test_the_default_places_are_shown_with_their_plan_and_submitted(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model))
    rows = shown.rows()
    assert {name for name, row in rows.items() if row["checked"] == "true"} == {"query", "value"}
    assert rows["0-3"]["text"].startswith("0-3× 4BertLayer")
    assert rows["query"]["label"].startswith("query, Linear, 4 modules, role attn.q, 32 to 32")
    assert "4,096" in shown.text("#figures")
    shown.python("LoraModel(model)")
    shown.wait(lambda: shown.text("#formula") == "y = query(x) + lora(x)")
    shown.one("#submit").click()
    (delta,) = shown.picking.join()
    assert len(delta.modified_modules) == 8
    shown.wait(lambda: "Done" in shown.text("#ended"))


def test_clicks_select_and_a_shift_click_selects_what_fits_in_between(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model, LoraConfig(modified_modules=["query"])))
    shown.click("query", "box")
    shown.click("key", "box")
    shown.python('LoraModel(model, modified_modules=["key"])')
    shown.click("value", shift=True)  # from the key to the value
    shown.python('LoraModel(model, modified_modules=["key", "value"])')
    shown.click("query")
    shown.click("dropout", shift=True)  # to a module on which no LoRA goes
    shown.python('LoraModel(model, modified_modules=["query", "key", "value"])')
    assert shown.rows()["dropout"]["checked"] is None
    assert "cannot carry 'lora'" in shown.rows()["dropout"]["title"]
    shown.one("#submit").click()
    (delta,) = shown.picking.join()
    assert len(delta.modified_modules) == 12


def test_one_block_and_then_the_same_in_all_blocks(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model, LoraConfig(modified_modules=["key"])))
    shown.click("key", "box")
    shown.click("0-3")
    shown.press("u")
    shown.click("2", "twist")
    shown.click("attention", "twist")
    shown.click("self", "twist")
    shown.click("query", "box")
    shown.python('LoraModel(model, modified_modules=["layer.2.attention.self.query"])')
    button = "//button[text()='Select the same in all blocks']"
    shown.wait(lambda: shown.browser.find_elements("xpath", button))
    shown.browser.find_element("xpath", button).click()
    shown.python('LoraModel(model, modified_modules=["query"])')
    shown.one("#submit").click()
    assert shown.picking.join()[0].modified_modules == queries(0, 1, 2, 3)


def test_blocks_that_were_taken_apart_are_folded_from_one_of_them(page):
    shown = page(lambda: opendelta.pick(bert(), LoraConfig(modified_modules=["query"])))
    shown.click("0-3")
    shown.press("U")
    shown.wait(lambda: "2" in shown.rows())
    shown.click("2")
    assert shown.text("#module").endswith("Fold these blocks")
    shown.press("u")
    rows = shown.rows()
    assert "2" not in rows
    assert rows["0-3"]["at"]
    shown.click("key")
    shown.wait(lambda: shown.rows()["key"]["checked"])
    shown.press("A")
    shown.python('["query", "key"]')


@pytest.mark.parametrize("part", ["name", "box", "twist"])
def test_a_row_that_is_drawn_anew_under_the_pointer_is_clicked_on(page, part):
    from selenium.webdriver.common.action_chains import ActionChains

    shown = page(lambda: opendelta.pick(bert(), LoraConfig(modified_modules=["value"])))
    shown.wait(lambda: shown.rows()["query"]["checked"])
    name = "0-3" if part == "twist" else "query"
    path = f"//*[@class='name' and text()='{name}']/ancestor::*[@role='treeitem']"

    def hold():
        row = shown.browser.find_element("xpath", path).find_element("class name", part)
        ActionChains(shown.browser).click_and_hold(row).perform()
        return True

    shown.wait(hold)
    shown.browser.execute_script(
        "document.getElementById('tree').dispatchEvent(new Event('scroll'))"
    )
    ActionChains(shown.browser).release().perform()
    shown.wait(lambda: shown.rows()[name]["at"])
    if part == "box":
        shown.python("LoraModel(model)")  # query and value are the default
    if part == "twist":
        shown.wait(lambda: shown.rows()[name]["expanded"] == "false")


def test_the_focus_stays_where_one_works(page):
    start = [LoraConfig(modified_modules=["query"]), AdapterConfig(modified_modules=["query"])]
    shown = page(lambda: opendelta.pick(bert(), start))
    shown.click("key")
    shown.enter("Select")
    shown.python('["query", "key"]')
    shown.wait(lambda: shown.focus() == "Take out")
    shown.enter("Take out")
    shown.wait(lambda: shown.focus() == "Select")
    for name in ("Default places", "Select none"):
        shown.enter(name)
        shown.wait(lambda name=name: shown.focus() == name)
    shown.enter("Move down lora")
    shown.wait(lambda: shown.focus().startswith("lora"))
    shown.enter("Remove lora")
    shown.wait(lambda: shown.focus().startswith("adapter"))
    shown.enter("Remove adapter")
    shown.wait(lambda: shown.focus() == "Add")
    shown.enter("Add")
    shown.wait(lambda: shown.text("#deltas"))
    shown.click("0-3")
    shown.wait(lambda: shown.rows()["0-3"]["at"])
    shown.press("u")
    shown.enter("Fold these blocks")
    shown.wait(lambda: shown.focus() == "Show blocks one by one")


def test_the_tree_works_by_keys_alone(page):
    from selenium.webdriver.common.keys import Keys

    model = bert()
    shown = page(lambda: opendelta.pick(model, LoraConfig(modified_modules=["query"])))
    at = lambda: next(n for n, row in shown.rows().items() if row["at"])  # noqa: E731
    shown.press(Keys.ARROW_DOWN)
    assert at() == "key"
    shown.wait(lambda: shown.rows()["key"]["checked"] == "false")
    shown.press(Keys.SPACE)
    shown.python('["query", "key"]')
    shown.press(Keys.SHIFT, Keys.ARROW_DOWN)
    shown.python('["query", "key", "value"]')
    shown.press(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ENTER)
    shown.python('["key", "value"]')
    shown.press(Keys.ARROW_LEFT)
    assert at() == "self"
    shown.press(Keys.ARROW_LEFT)
    assert shown.rows()["self"]["expanded"] == "false"
    assert "query" not in shown.rows()
    shown.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert at() == "query"
    shown.press(Keys.HOME)
    assert at() == "root"
    level = shown.browser.execute_script(  # in one step, as the page may draw its rows anew
        "const at = document.querySelector('#tree').getAttribute('aria-activedescendant');"
        "return document.getElementById(at).getAttribute('aria-level')"
    )
    assert level == "1"
    shown.press("/")
    assert shown.browser.switch_to.active_element.get_attribute("id") == "search"


def test_a_search_shows_its_pattern_and_selects_what_it_finds(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model, AdapterConfig(modified_modules=["query"])))
    field = shown.one("#search")
    field.send_keys("attn.k")
    shown.wait(lambda: 'modified_modules=["attn.k"], common_structure=True' in shown.text("#found"))
    assert "value" not in shown.rows()
    assert shown.rows()["key"]["at"]
    shown.one("#found button").click()
    shown.python('modified_modules=["query", "key"]')
    field.clear()
    field.send_keys(r"[r]layer\.[01]\.output")
    shown.wait(lambda: r"layer\\.[01]\\.output" in shown.text("#found"))
    shown.one("#found button").click()
    shown.python(r'"[r]layer\.[01]\.output"')
    field.clear()
    field.send_keys("qeury")
    shown.wait(lambda: "nearest: 'query' (4 modules)" in shown.text("#found"))
    field.clear()
    field.send_keys("uer")
    shown.wait(lambda: "part of a name" in shown.text("#ways"))
    field.send_keys("\ue00c")  # Escape
    shown.wait(lambda: "value" in shown.rows())
    assert shown.one("#search").get_attribute("value") == ""


def test_deltas_are_added_changed_moved_and_removed(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    model = bert()
    start = [LoraConfig(modified_modules=["query"]), AdapterConfig(modified_modules=["query"])]
    shown = page(lambda: opendelta.pick(model, start))
    shown.wait(lambda: shown.text("#formula") == "y = adapter(query(x) + lora(x))")
    grips = shown.all(".grip")
    actions = ActionChains(shown.browser).click_and_hold(grips[0])
    actions.move_to_element(grips[1]).move_by_offset(2, 3).release().perform()
    shown.wait(lambda: shown.names() == ["adapter", "lora"])
    shown.wait(lambda: shown.text("#formula") == "y = adapter(query(x)) + lora(x)")
    chosen = shown.all(".choose")[1]
    ActionChains(shown.browser).click(chosen).perform()
    shown.wait(lambda: shown.all("#deltas li")[1].get_attribute("aria-current") == "true")
    active = shown.browser.switch_to.active_element
    assert "lora" in active.text
    ActionChains(shown.browser).key_down(Keys.ALT).send_keys(Keys.ARROW_UP).key_up(
        Keys.ALT
    ).perform()
    shown.wait(lambda: shown.names() == ["lora", "adapter"])
    shown.one("#new").send_keys("ia3")
    shown.one("#add-delta").click()
    shown.wait(lambda: shown.names() == ["lora", "adapter", "ia3"])
    shown.python("IA3Model(model)")
    shown.one('[aria-label="Remove adapter"]').click()
    shown.wait(lambda: shown.names() == ["lora", "ia3"])
    shown.one('[aria-label="Move up ia3"]').click()
    shown.wait(lambda: shown.names() == ["ia3", "lora"])
    shown.one("#submit").click()
    assert [delta.name for delta in shown.picking.join()] == ["ia3", "lora"]


def test_options_have_inputs_by_type_and_change_the_plan(page):
    from selenium.webdriver.support.select import Select

    model = bert()
    shown = page(lambda: opendelta.pick(model, LoraConfig(modified_modules=["query"])))
    assert "rank of the change." in shown.text("#option-lora_r-meaning")
    rank = shown.one("#option-lora_r")
    rank.clear()
    rank.send_keys("2")
    shown.python("lora_r=2)")
    shown.wait(lambda: "512" in shown.text("#figures"))
    rank.clear()
    rank.send_keys("0")
    shown.wait(lambda: "lora_r=0 must be at least 1" in shown.text("#option-lora_r-error"))
    assert "lora_r=0 must be at least 1" in shown.text("#said")
    assert rank.get_attribute("aria-describedby").split()[0] == "option-lora_r-error"
    assert rank.get_attribute("aria-invalid") == "true"
    rank.clear()
    rank.send_keys("4")
    shown.one("#option-use_dora").click()
    Select(shown.one("#option-init")).select_by_visible_text("gaussian")
    pattern = shown.one("#option-rank_pattern")
    pattern.send_keys('{"layer.0.attention.self.query"')
    shown.wait(lambda: "is no JSON" in shown.text("#option-rank_pattern-error"))
    assert rank.get_attribute("aria-invalid") == "false"
    pattern.send_keys(": 1}")
    shown.wait(lambda: pattern.get_attribute("aria-invalid") == "false")
    shown.one("#form summary").click()
    shown.one("#option-name").send_keys("mine")
    shown.wait(lambda: shown.names() == ["mine"])
    shown.one("#submit").click()
    (delta,) = shown.picking.join()
    config = delta.config
    assert (config.lora_r, config.use_dora, config.init) == (4, True, "gaussian")
    assert (delta.name, config.rank_pattern) == ("mine", {queries(0)[0]: 1})


def test_what_cannot_be_read_is_said_at_its_field_and_is_not_submitted(page):
    model = bert()
    start = [LoraConfig(modified_modules=["query"]), AdapterConfig(modified_modules=["query"])]
    shown = page(lambda: opendelta.pick(model, start))
    shown.one("#option-lora_r").clear()
    shown.one("#option-lora_r").send_keys("1e")
    shown.wait(lambda: "lora_r='1e' is no number" in shown.text("#option-lora_r-error"))
    shown.all(".choose")[1].click()
    shown.one("#submit").click()  # while another delta is shown
    shown.wait(lambda: "lora_r='1e' is no number" in shown.text("#problem"))
    shown.browser.refresh()
    shown.wait(lambda: shown.all(".row") and "1e" in shown.text("#option-lora_r-error"))
    assert shown.one("#option-lora_r").get_attribute("value") == "1e"
    shown.one("#option-lora_r").send_keys("\ue003" * 2, "3")  # Backspace
    shown.python("lora_r=3")
    shown.one("#submit").click()
    assert [getattr(delta.config, "lora_r", 0) for delta in shown.picking.join()] == [3, 0]


def test_the_default_places_stay_picked_while_an_option_is_wrong(page):
    shown = page(lambda: opendelta.pick(bert()))
    shown.python("LoraModel(model)")
    dropout = shown.one("#option-lora_dropout")
    dropout.clear()
    dropout.send_keys("1")
    shown.wait(lambda: "must be below 1" in shown.text("#option-lora_dropout-error"))
    assert shown.rows()["query"]["checked"] == "true"
    shown.click("key", "box")
    dropout.send_keys("\ue003", "0.1")
    shown.python('modified_modules=["query", "key", "value"], lora_dropout=0.1')
    shown.browser.refresh()
    shown.python('["query", "key", "value"]')


def test_no_default_place_is_lost_where_they_were_never_known(page):
    shown = page(lambda: opendelta.pick(bert()))
    shown.one("#option-lora_r").clear()
    shown.one("#option-lora_r").send_keys("0")
    shown.wait(lambda: "at least 1" in shown.text("#option-lora_r-error"))
    shown.browser.refresh()
    shown.wait(lambda: shown.all(".row") and "at least 1" in shown.text("#option-lora_r-error"))
    shown.one("#search").send_keys("key")
    shown.wait(lambda: shown.all("#found button"))
    shown.one("#found button").click()
    shown.wait(lambda: "The default places are not known yet" in shown.text("#said"))
    shown.one("#option-lora_r").send_keys("\ue003", "4")
    shown.python("LoraModel(model, lora_r=4)")


def test_a_search_whose_modules_do_not_fit_says_so(page):
    shown = page(lambda: opendelta.pick(bert()))
    shown.one("#search").send_keys("LayerNorm")
    shown.wait(lambda: shown.all("#found button"))
    shown.one("#found button").click()
    shown.wait(lambda: shown.text("#unfit") == "lora goes on none of these")
    shown.python("LoraModel(model)")
    shown.one("#option-lora_r").send_keys("e")
    shown.wait(lambda: "is no number" in shown.text("#option-lora_r-error"))
    shown.one("#search").clear()
    shown.one("#search").send_keys("decoder")
    shown.wait(lambda: shown.all("#found button") and "decoder" in shown.text("#found"))
    shown.one("#found button").click()
    shown.wait(lambda: "Where lora goes is not known yet" in shown.text("#unfit"))


def test_each_choice_is_spelt_out_and_the_one_that_was_given_is_chosen(page):
    from selenium.webdriver.support.select import Select

    config = opendelta.SoftPromptConfig(other_expand_ids={"attention_mask": 1}, token_init=False)
    shown = page(lambda: opendelta.pick(bert(), config))
    choices = Select(shown.one("#option-other_expand_ids"))
    spelt = ["none", "{}", '{"attention_mask":1}', '{"attention_mask":1,"token_type_ids":0}']
    assert [each.text for each in choices.options] == spelt
    assert choices.first_selected_option.text == spelt[2]


def test_an_error_of_submit_is_shown_and_the_page_goes_on(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model, LoraConfig(modified_modules=["query"])))
    shown.click("query", "box")
    shown.wait(lambda: "no module is selected" in shown.text("#remarks"))
    shown.one("#submit").click()
    shown.wait(lambda: "no module is selected" in shown.text("#problem"))
    shown.click("query", "box")
    shown.python('["query"]')
    shown.one("#submit").click()
    assert [delta.name for delta in shown.picking.join()] == ["lora"]


def test_cancel_ends_the_page(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model))
    shown.one("#cancel").click()
    assert shown.picking.join() == []
    shown.wait(lambda: "cancelled" in shown.text("#ended"))
    assert shown.one("main").get_attribute("inert")
    opendelta.assert_pristine(model)


def test_a_page_that_is_loaded_again_keeps_its_picks_and_a_closed_one_cancels(page):
    model = bert()
    shown = page(lambda: opendelta.pick(model))
    shown.click("query", "box")
    shown.python('["value"]')
    shown.browser.refresh()
    shown.wait(lambda: shown.all(".row"))
    shown.python('["value"]')
    shown.browser.get("about:blank")
    assert shown.picking.join() == []


def test_two_pages_at_once_and_the_first_that_submits_wins(page, browser):
    model = bert()
    shown = page(lambda: opendelta.pick(model))
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    other = Page(browser, shown.picking.address)
    other.click("query", "box")
    other.python('["value"]')
    browser.switch_to.window(first)
    shown.click("value")  # its formula is that of its own page
    shown.click("query")
    shown.wait(lambda: shown.text("#formula") == "y = query(x) + lora(x)")
    browser.switch_to.window(browser.window_handles[1])
    other.one("#submit").click()
    (delta,) = shown.picking.join()
    assert [name.rpartition(".")[2] for name in delta.modified_modules] == ["value"] * 4
    browser.close()
    browser.switch_to.window(first)
    shown.wait(lambda: "Done" in shown.text("#ended"))


def test_eight_pages_at_once_all_work(page, browser):
    shown = page(lambda: opendelta.pick(bert()))
    first = browser.current_window_handle
    for _ in range(7):
        browser.switch_to.new_window("tab")
        other = Page(browser, shown.picking.address)
    other.click("query", "box")
    other.python('["value"]')
    while len(browser.window_handles) > 2:
        browser.close()
        browser.switch_to.window(browser.window_handles[-1])
    assert shown.picking.thread.is_alive()
    browser.close()
    browser.switch_to.window(first)
    shown.one("#submit").click()
    assert len(shown.picking.join()) == 1


def test_a_wrong_token_shows_no_page(browser, picking):
    running = picking(lambda: opendelta.pick(net()))
    browser.get(running.address.rstrip("/") + "x/")
    assert "token in the address is wrong" in browser.page_source
    browser.get_log("browser")


def test_another_site_in_the_same_browser_can_do_nothing(page, browser):
    model = bert()
    shown = page(lambda: opendelta.pick(model))
    address = shown.picking.address
    shown.one("#submit")
    browser.switch_to.new_window("tab")
    browser.get("data:text/html,<p>another site</p>")
    tried = browser.execute_async_script(
        "const [address, done] = arguments; const told = [];"
        "const body = JSON.stringify({deltas: []});"
        "const say = (what) => told.push(what);"
        "const post = (type, mode) => fetch(address + 'cancel',"
        "  {method: 'POST', body, mode, headers: {'Content-Type': type}});"
        "Promise.allSettled([post('text/plain', 'no-cors').then((r) => say(r.type)),"
        "  post('application/json', 'cors').then(() => say('read'), () => say('refused'))])"
        ".then(() => done(told))",
        address,
    )
    assert "read" not in tried
    assert shown.picking.thread.is_alive()
    browser.get_log("browser")
    browser.close()
    browser.switch_to.window(browser.window_handles[0])


def test_names_of_a_foreign_model_are_only_text(page):
    evil = type("<img src=x onerror=alert(1)>", (nn.Linear,), {})
    model = nn.ModuleDict({"<b onclick=alert(2)>": evil(4, 4), "a": nn.Linear(4, 4)})
    start = LoraConfig(modified_modules=["a"], name="x")
    shown = page(lambda: opendelta.pick(model, start))
    assert "<b onclick=alert(2)>" in shown.rows()
    shown.click("<b onclick=alert(2)>", "box")
    shown.python("<b onclick=alert(2)>")
    assert not shown.all("#tree img, #tree b, #module img, #module b")
    assert "<img src=x" in shown.text("#tree")


def test_a_branch_may_end_at_another_module_of_its_block(page):
    from selenium.webdriver.support.select import Select

    model = bert()
    config = opendelta.ParallelAdapterConfig(modified_modules=["intermediate", "intermediate"])
    shown = page(lambda: opendelta.pick(model, config))
    ending = lambda: Select(shown.one("#ending")).first_selected_option.text  # noqa: E731
    shown.wait(lambda: shown.all("#ending") and ending() == "intermediate")
    shown.wait(lambda: Select(shown.one("#ending")).select_by_visible_text("output") is None)
    shown.python('modified_modules=["intermediate", r"[r]layer\\.[0-3]\\.output"]')
    shown.one("#submit").click()
    (delta,) = shown.picking.join()
    layers = [f"bert.encoder.layer.{i}" for i in range(4)]
    pairs = [f"{layer}.{part}" for layer in layers for part in ("intermediate", "output")]
    assert delta.modified_modules == pairs


def contrast(browser, selector):
    """The contrast of the border of a part with its own ground."""
    colours = browser.execute_script(
        "const style = getComputedStyle(document.querySelector(arguments[0]));"
        "return [style.borderTopColor, style.backgroundColor]",
        selector,
    )
    light = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


def test_windows_of_any_size_and_a_dark_one_show_all_that_matters(picking):
    for width, height, dark in ((390, 844, False), (910, 430, False), (1280, 844, True)):
        browser = chromium(width, height, dark)
        try:
            running = picking(lambda: opendelta.pick(bert()))
            shown = Page(browser, running.address)
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width
            for part in ("#search", "#tree", "#deltas", "#form", "#figures", "#text", "#submit"):
                assert shown.one(part).is_displayed(), part
            assert shown.one("#tree").size["height"] >= 140
            for part in ("#search", "#option-lora_r", "#option-init", "#copy"):
                assert contrast(browser, part) >= 3, part
            style = "return getComputedStyle(document.body).backgroundColor"
            ground = browser.execute_script(style)
            assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark
            browser.get("about:blank")
            assert running.join() == []
        finally:
            browser.quit()


def test_a_model_of_seventy_billion_parameters_opens_in_two_seconds(page):
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shown = page(lambda: opendelta.pick(model))
    again = (Page(shown.browser, shown.picking.address).opened_in for _ in range(2))
    assert min(shown.opened_in, *again) < 2  # other tests may run beside one of them
    assert "70,553,706,496 parameters" in shown.text("#model")
    assert shown.rows()["q_proj"]["text"].startswith("q_proj× 80Linear")


def test_a_thousand_modules_that_differ_are_drawn_only_where_one_looks(page):
    from selenium.webdriver.common.keys import Keys

    blocks = {f"block_{i}": nn.Linear(4, 4 + i % 7) for i in range(1000)}
    with torch.device("meta"):
        model = nn.ModuleDict({name: nn.Sequential(each) for name, each in blocks.items()})
    shown = page(lambda: opendelta.pick(model, LoraConfig(modified_modules=["block_0.0"])))
    assert len(shown.all(".row")) < 60
    shown.press(Keys.END)
    shown.wait(lambda: "block_999" in shown.rows())
    assert len(shown.all(".row")) < 60
    assert shown.rows()["block_999"]["at"]
    shown.one("#search").send_keys("block_500.0")
    shown.wait(lambda: shown.all("#found button"))
    shown.one("#found button").click()
    shown.python('["block_0.0", "block_500.0"]')
