"""The page's server answers nobody but its own page: token, Host, Origin, sizes, headers."""

import http.client
import re
import socket
import time
from urllib.parse import urlsplit

import pytest
from support.nets import net
from support.picking import wire

import opendelta
from opendelta._picker import server, session

pytestmark = pytest.mark.covers("pick")


@pytest.fixture
def page(picking):
    return picking(lambda: session.pick(net(), [opendelta.BitFitConfig()]))


def test_the_address_is_of_this_machine_alone_and_has_a_secret(page):
    parts = urlsplit(page.address)
    assert parts.hostname == "127.0.0.1"
    assert parts.port not in (80, 8888)
    assert len(parts.path.strip("/")) >= 40
    outside = socket.socket()
    outside.settimeout(1)
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        assert outside.connect_ex((own, parts.port)) != 0
    outside.close()


@pytest.mark.parametrize("name", ["", "picker.js", "picker.css", "tree.js", "icon.svg"])
def test_a_file_of_the_page_comes_with_strict_headers(page, name):
    status, text = page.request("GET", name)
    assert (status, bool(text)) == (200, True)
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"


def test_no_file_of_the_page_names_another_address():
    for path in server.PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, path
        assert "https:" not in text, path
        assert "innerHTML" not in text, path
        assert path.suffix != ".html" or "style=" not in text, path


@pytest.mark.parametrize("token", ["", "wrong", "%C3%A9", "a" * 43])
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "events"), ("POST", "open")])
def test_a_wrong_token_gets_nothing(page, token, method, path):
    at = f"http://{urlsplit(page.address).netloc}/{token}/"
    body = {} if method == "POST" else None
    status, answer = page.request(method, path, body, at=at)
    assert status == 403
    assert answer == {"error": "the token in the address is wrong; open the address as printed"}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "", None, "twice"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_host_gets_nothing(page, host, method):
    given = [urlsplit(page.address).netloc] * 2 if host == "twice" else host
    body = {} if method == "POST" else None
    path = "open" if body == {} else ""
    status, answer = page.request(method, path, body, {"Host": given})
    assert (status, answer) == (403, {"error": "this Host is not served"})


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", None])
@pytest.mark.parametrize("verb", ["open", "submit", "cancel"])
def test_another_origin_may_not_ask(page, origin, verb):
    status, answer = page.request("POST", verb, {}, {"Origin": origin})
    assert (status, answer) == (403, {"error": "this Origin may not ask"})
    assert page.thread.is_alive()


def test_the_name_localhost_is_served_too(page):
    port = urlsplit(page.address).port
    headers = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert page.request("POST", "open", {}, headers)[0] == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Type": None}, 415),
        (None, {}, 411),
        (b"{}", {"Content-Length": "-1"}, 411),
        (b"", {"Content-Length": str(server.LARGEST + 1)}, 413),
        (b"", {"Content-Length": "9" * 30}, 411),
        (b"{", {}, 400),
        (b"\xff", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"[]", {}, 400),
        (b"7", {}, 400),
    ],
)
def test_a_body_that_is_no_question_is_refused(page, body, headers, status):
    assert page.request("POST", "open", body, headers)[0] == status
    assert page.request("POST", "open", {})[0] == 200


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("nothing", {}), ("__init__", {}), ("plan", {}), ("plan", {"deltas": 3}),
        ("plan", {"deltas": [{}]}), ("plan", {"deltas": ["x"]}), ("fits", {"names": []}),
        ("submit", {}), ("search", {}), ("explain", {"name": ["x"]}), ("alike", {"names": [3]}),
        ("submit", {"deltas": 3}), ("submit", {"deltas": [{"type": "lora"}]}),
        ("submit", {"deltas": [wire("lora", 3)]}), ("submit", {"deltas": [wire("lora", [3])]}),
        ("submit", {"deltas": [wire("lora", [["linear"]])]}), ("submit", {"deltas": [wire(["x"])]}),
        ("submit", {"deltas": [wire("parallel_adapter", ["linear"])]}),
        ("submit", {"deltas": [{"type": "lora", "options": [], "places": None}]}),
        ("submit", {"deltas": [wire("lora", ["linear"], interactive_modify=True)]}),
    ],
)  # fmt: skip
def test_a_question_of_another_form_is_an_error_on_the_page(page, verb, body):
    answer = page.ask(verb, body)
    assert answer["error"]
    assert not re.match("[A-Z][A-Za-z]*Error", answer["error"])
    assert page.ask("open")["model"] == "Net"


def test_the_address_works_without_its_last_slash_and_with_a_query(page):
    at = page.address.removesuffix("/")
    status, _ = page.request("GET", "", at=at)
    token = at.rpartition("/")[2]
    assert (status, page.headers["Location"]) == (308, f"{token}/")
    for path in ("?x", "?a=b/c", "picker.js?1"):
        assert page.request("GET", path)[0] == 200


@pytest.mark.parametrize("path", ["../server.py", "%2e%2e/server.py", "page/index.html", "x"])
def test_no_other_file_is_served(page, path):
    assert page.request("GET", path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD"])
def test_other_methods_are_not_served(page, method):
    connection = http.client.HTTPConnection(urlsplit(page.address).netloc, timeout=20)
    connection.request(method, urlsplit(page.address).path)
    assert connection.getresponse().status == 501
    connection.close()


def test_a_client_that_sends_half_a_question_stops_no_other(page):
    parts = urlsplit(page.address)
    with socket.create_connection((parts.hostname, parts.port)) as half:
        half.sendall(f"POST {parts.path}open HTTP/1.1\r\nHost: ".encode())
        assert page.ask("open")["model"] == "Net"
        started = time.monotonic()
        page.ask("cancel")
        assert page.join() is None
        assert time.monotonic() - started < server.LAST_WORDS + 1


def test_a_port_that_is_taken_is_an_error_of_ours(page):
    port = urlsplit(page.address).port
    with pytest.raises(opendelta.DeltaError, match=rf"port={port} cannot be used"):
        opendelta.pick(net(), port=port)
