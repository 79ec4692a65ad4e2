"""From the page back to Python: deltas in their order, cancelling, errors, `interactive_modify`."""

import os
import signal
import socket
import threading
import time
import webbrowser
from urllib.parse import urlsplit

import pytest
import torch
from support.nets import net, untouched
from support.picking import wire
from torch import nn

import opendelta
from opendelta import AdapterConfig, AdapterModel, LoraConfig, LoraModel, OptionError
from opendelta._picker import server, session

pytestmark = pytest.mark.covers("pick", "DeltaConfig.interactive_modify")


def open_page(page):
    """The socket of a page that is open, as a browser holds it."""
    parts = urlsplit(page.address)
    held = socket.create_connection((parts.hostname, parts.port), timeout=20)
    held.sendall(f"GET {parts.path}events HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    assert held.recv(12).endswith(b"200")
    return held


def told(held):
    """All that a page is told until the server closes the stream."""
    text = b""
    while more := held.recv(4096):
        text += more
    held.close()
    return text.decode()


def test_the_picked_deltas_are_attached_in_their_order(picking):
    model = net()
    page = picking(lambda: opendelta.pick(model))
    (start,) = page.ask("open")["deltas"]
    assert (start["type"], start["places"]) == ("lora", None)
    deltas = [wire("adapter", ["linear"], bottleneck_dim=3), wire("lora", ["linear", "bare"])]
    assert page.ask("submit", {"deltas": deltas}) == {}
    made = page.join()
    assert [type(delta) for delta in made] == [AdapterModel, LoraModel]
    assert made[0].config.bottleneck_dim == 3
    assert made[1].modified_modules == ["linear", "bare"]
    assert opendelta.composition(model).names == ["adapter", "lora"]


def test_a_cancelled_page_gives_no_delta_and_changes_nothing(picking):
    model = net()
    with untouched(model):
        page = picking(lambda: opendelta.pick(model, LoraConfig(modified_modules=["linear"])))
        page.ask("plan", {"deltas": page.ask("open")["deltas"]})
        page.ask("cancel")
        assert page.join() == []
    opendelta.assert_pristine(model)


def test_an_error_is_shown_on_the_page_and_the_session_goes_on(picking):
    model = net()
    page = picking(lambda: opendelta.pick(model, [LoraConfig(modified_modules=["linear"])]))
    wrong = [wire("lora", ["linear"]), wire("lora", ["norm"])]
    assert "cannot carry 'lora'" in page.ask("submit", {"deltas": wrong})["error"]
    opendelta.assert_pristine(model)
    assert "there is no delta" in page.ask("submit", {"deltas": []})["error"]
    twice = [wire("lora", ["linear"], name="a"), wire("lora", ["bare"], name="a")]
    assert "has a delta 'a' already" in page.ask("submit", {"deltas": twice})["error"]
    opendelta.assert_pristine(model)
    assert page.ask("submit", {"deltas": wrong[:1]}) == {}
    assert [delta.name for delta in page.join()] == ["lora"]


def test_an_error_of_the_callers_own_code_is_shown_too(picking):
    def refuse(configs):
        raise RuntimeError("not now")

    page = picking(lambda: session.pick(net(), [], refuse))
    given = {"deltas": [wire("lora", ["linear"])]}
    assert page.ask("submit", given) == {"error": "RuntimeError: not now"}
    assert page.thread.is_alive()


def test_of_two_pages_the_first_that_submits_wins_and_the_other_is_told(picking):
    model = net()
    page = picking(lambda: opendelta.pick(model))
    one, other = open_page(page), open_page(page)
    assert page.ask("submit", {"deltas": [wire("lora", ["linear"])]}) == {}
    for held in (one, other):
        assert 'event: end\ndata: "submitted"' in told(held)
    assert [delta.name for delta in page.join()] == ["lora"]
    with pytest.raises(OSError, match="refused"):
        page.request("POST", "submit", {"deltas": []})


def test_when_the_last_page_is_closed_picking_is_cancelled(picking, monkeypatch):
    monkeypatch.setattr(server, "GRACE", 0.5)
    page = picking(lambda: opendelta.pick(net()))
    time.sleep(0.8)  # before the first page is opened nothing is cancelled
    one, other = open_page(page), open_page(page)
    page.ask("leave")
    one.close()
    time.sleep(0.8)
    assert page.thread.is_alive()
    page.ask("leave")
    other.close()
    again = open_page(page)  # loaded again within the grace
    time.sleep(0.8)
    assert page.thread.is_alive()
    again.close()
    page.ask("leave")
    assert page.join() == []


def test_a_connection_that_breaks_ends_nothing_until_it_is_broken_for_long(picking, monkeypatch):
    monkeypatch.setattr(server, "GRACE", 0.2)
    monkeypatch.setattr(server, "PATIENCE", 2.0)
    page = picking(lambda: opendelta.pick(net()))
    open_page(page).close()
    time.sleep(1)
    again = open_page(page)
    time.sleep(2.5)
    assert page.ask("open")["model"] == "Net"
    again.close()
    assert page.join() == []


def test_a_page_that_is_open_is_told_when_picking_is_cancelled(picking):
    page = picking(lambda: opendelta.pick(net()))
    held = open_page(page)
    page.ask("cancel")
    assert 'data: "cancelled"' in told(held)
    assert page.join() == []


def test_ctrl_c_cancels(monkeypatch):
    model = net()

    def stop(address, browser):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(session, "_announce", stop)
    assert opendelta.pick(model) == []
    opendelta.assert_pristine(model)


def test_the_address_is_printed_and_opened_in_a_browser_with_a_window(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    for browser, window, expected in ((True, True, 1), (True, False, 0), (False, True, 0)):
        kind = webbrowser.BackgroundBrowser if window else webbrowser.GenericBrowser
        monkeypatch.setattr(webbrowser, "get", lambda kind=kind: kind("x"))
        opened.clear()
        session._announce("http://127.0.0.1:1/a/", browser)
        assert opened == ["http://127.0.0.1:1/a/"] * expected
        assert "pick at http://127.0.0.1:1/a/" in capsys.readouterr().err


def test_deltas_that_are_there_stay_beneath(picking):
    model = net()
    first = LoraModel(model, modified_modules=["linear"])
    page = picking(lambda: opendelta.pick(model, []))
    assert page.ask("open")["carries"] == ["lora"]
    deltas = [wire("lora", ["linear"])]
    assert page.ask("plan", {"deltas": deltas})["deltas"][0]["name"] == "lora_1"
    formula = page.ask("explain", {"name": "linear", "deltas": deltas})["formula"]
    assert formula == "y = linear(x) + lora(x) + lora_1(x)"
    page.ask("submit", {"deltas": deltas})
    assert [delta.name for delta in page.join()] == ["lora_1"]
    assert opendelta.composition(model).names == [first.name, "lora_1"]


def test_a_model_that_is_none_and_a_wrong_start_are_refused():
    with pytest.raises(OptionError, match=r"must be a torch.nn.Module"):
        opendelta.pick("roberta-base")
    with pytest.raises(opendelta.AddressError, match="no module matches 'lienar'"):
        opendelta.pick(net(), LoraConfig(modified_modules=["lienar"]))


@pytest.mark.parametrize(
    "configs", ["lora", LoraConfig, LoraModel, 0, [1], [LoraConfig], {"delta_type": "lora"}, net()]
)
def test_configs_of_another_kind_are_refused_before_a_page_is_opened(configs):
    with pytest.raises(OptionError, match=r"pick takes configs such as LoraConfig\(...\), not"):
        opendelta.pick(net(), configs)


@pytest.mark.parametrize("port", [-1, 2**16, 70_000, "8888", 1.5, True, None])
def test_a_port_of_another_kind_is_refused(port):
    with pytest.raises(OptionError, match="must be a whole number from 0 to 65535"):
        opendelta.pick(net(), port=port)


def test_a_page_for_one_delta_takes_one_of_its_method(picking):
    page = picking(lambda: LoraModel(net(), interactive_modify=True))
    for deltas in ([wire("adapter", ["linear"])], [wire("lora", ["linear"])] * 2):
        error = page.ask("submit", {"deltas": deltas})["error"]
        assert error == "this page is for one delta, of the method 'lora'"
    assert page.ask("submit", {"deltas": [wire("lora", ["linear"])]}) == {}
    assert page.join().modified_modules == ["linear"]


# -------------------------------------------------------------------------- interactive_modify
@pytest.mark.parametrize("name", [n for n in opendelta.methods.__all__ if n.endswith("Model")])
def test_every_constructor_opens_the_page_and_is_the_delta_that_is_picked(picking, name):
    method = getattr(opendelta, name)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    site = "1" if method.delta_type == "ln_tuning" else "0"
    if method.delta_type in ("prefix", "soft_prompt"):
        model, site = net(), "attention" if method.delta_type == "prefix" else ""
    places = [site] * (2 if method.layer_class.paired else 1)
    page = picking(lambda: method(model, interactive_modify=True, name="mine"))
    opened = page.ask("open")
    assert opened["only"]
    assert [delta["type"] for delta in opened["deltas"]] == [method.delta_type]
    (delta,) = opened["deltas"]
    assert page.ask("submit", {"deltas": [{**delta, "places": places}]}) == {}
    made = page.join()
    assert isinstance(made, method)
    assert (made.name, made.modified_modules) == ("mine", places)
    assert made.config.interactive_modify is False


def test_the_page_of_a_constructor_starts_with_its_options(picking):
    model = net()
    page = picking(lambda: LoraModel(model, 4, exclude_modules=["linear"], interactive_modify=True))
    (delta,) = page.ask("open")["deltas"]
    assert "linear" not in delta["places"]
    assert delta["options"]["lora_r"] == "4"
    page.ask("submit", {"deltas": [{**delta, "places": ["bare"]}]})
    made = page.join()
    assert made.modified_modules == ["bare"]
    out = model(torch.zeros(1, 3, dtype=torch.long))
    assert out.shape == (1, 3, 3)


def test_places_and_the_page_to_pick_them_on_exclude_each_other():
    model = net()
    with pytest.raises(OptionError, match=r"interactive_modify=True .* give one of the two"):
        LoraModel(model, modified_modules=["linear"], interactive_modify=True)
    opendelta.assert_pristine(model)


def test_a_cancelled_constructor_raises_and_attaches_nothing(picking):
    model = net()
    page = picking(lambda: AdapterModel(model, interactive_modify=True))
    page.ask("cancel")
    with pytest.raises(opendelta.DeltaError, match="picking was cancelled"):
        page.join()
    opendelta.assert_pristine(model)


def test_a_number_is_the_port(picking):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = picking(lambda: AdapterModel(net(), interactive_modify=port))
    assert urlsplit(page.address).port == port
    for wrong in (-1, 2**16, "8888"):
        with pytest.raises(OptionError, match="interactive_modify="):
            AdapterConfig(interactive_modify=wrong)


def test_a_dry_run_opens_no_page():
    with pytest.raises(OptionError, match="interactive_modify=True opens a page"):
        opendelta.plan(net(), LoraConfig(interactive_modify=True))


def test_a_config_that_asks_for_the_page_opens_it(picking):
    model, config = net(), LoraConfig(lora_r=2, interactive_modify=True)
    page = picking(lambda: opendelta.AutoDeltaModel.from_config(config, model))
    (delta,) = page.ask("open")["deltas"]
    page.ask("submit", {"deltas": [{**delta, "places": ["linear"]}]})
    assert (page.join().modified_modules, page.result.config.lora_r) == (["linear"], 2)
