"""Serve the page on the loopback address to those who have its token. It knows nothing of models.

Each request is checked: the token in its path, its Host, the Origin and the size of what it posts.
The pages of a browser keep one stream of events open, by which the server knows that one is there.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import re
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import DeltaError

LARGEST = 8 * 2**20  # bytes of a body: 10,000 long names for each of several deltas
BEAT = 0.1  # seconds between two looks at a page that is open
GRACE = 3.0  # seconds for a page that is loaded again, or for another to be opened
PATIENCE = 60.0  # seconds for a connection that broke; ask.js has the same
LAST_WORDS = 2.0  # seconds for the answers that are on their way at the end
PAGE = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Answer = Callable[[str, dict[str, Any]], dict[str, Any]]  # takes a verb and a body


class Refused(Exception):
    """A request that gets no answer: a status of HTTP, the reason, and more headers."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] = HEADERS) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Server(ThreadingHTTPServer):
    """The server of one page; `with` serves in a thread until the block ends.

    Args:
        answer: called in the thread of a request with the verb in its path and its body.
        port: 0: any free port.

    Attributes:
        address: the address of the page, with the token.
        ended: set when the page has done its work; tells each open page.

    Raises:
        DeltaError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise DeltaError(f"port={port} cannot be used for the page: {error}") from None
        self.answer, self.token = answer, secrets.token_urlsafe(32)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/{self.token}/"
        self.files = {path.name: path for path in PAGE.iterdir() if path.suffix in TYPES}
        self.ended, self.end = threading.Event(), ""
        self._lock, self._open, self._busy = threading.Lock(), 0, 0
        self._left, self._until = -math.inf, math.inf

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(BEAT,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        until = time.monotonic() + LAST_WORDS
        while self._busy and time.monotonic() < until:
            time.sleep(BEAT / 10)
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that went away in the middle of an answer."""

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as being answered inside a `with` block."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    @contextlib.contextmanager
    def open_page(self) -> Iterator[None]:
        """Count the pages of a browser as open inside a `with` block."""
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                now = time.monotonic()
                self._until = now + (GRACE if now - self._left < GRACE else PATIENCE)

    def heard(self, leaves: bool = False) -> None:
        """Note that a page has asked for something, or has said that it leaves."""
        with self._lock:
            now = time.monotonic()
            if leaves:
                self._left = now
            if self._until < math.inf:
                self._until = now + GRACE if leaves else max(self._until, now + GRACE)

    def is_alone(self) -> bool:
        """True if all pages were closed, or have been silent for long; False if none was open."""
        with self._lock:
            return not self._open and time.monotonic() > self._until


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = 30  # seconds that a client may be silent in the middle of a request
    server_version, sys_version = "opendelta", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Send a file of the page, or the stream of events."""
        with self._answering():
            name = self._checked()
            if name == "events":
                self._stream()
                return
            file = self.server.files.get(name or "index.html")
            if file is None:
                raise Refused(404, "there is no such page")
            self._send(200, file.read_bytes(), TYPES[file.suffix])

    def do_POST(self) -> None:
        """Answer a question of the page."""
        with self._answering():
            verb = self._checked()
            if self._only("Origin") not in [f"http://{host}" for host in self.server.hosts]:
                raise Refused(403, "this Origin may not ask")
            body = self._body()
            self.server.heard(leaves=verb == "leave")
            answer = {} if verb == "leave" else self.server.answer(verb, body)
            self._send(200, json.dumps(answer).encode(), "application/json")

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        with self.server.answering():
            try:
                yield
            except Refused as refused:
                reason = json.dumps({"error": refused.reason}).encode()
                self._send(refused.status, reason, "application/json", refused.headers)
                self.close_connection = True

    def _only(self, name: str) -> str:
        """Return a header that must stand once."""
        values = self.headers.get_all(name) or []
        return values[0] if len(values) == 1 else ""

    def _checked(self) -> str:
        """Return what the path asks for, behind the token.

        Raises:
            Refused: the Host is another, or the token is, or the address has lost its last slash.
        """
        if self._only("Host") not in self.server.hosts:
            raise Refused(403, "this Host is not served")
        token, slash, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "the token in the address is wrong; open the address as printed")
        if not slash:
            raise Refused(308, "the address ends with a slash", {"Location": f"{token}/"})
        self.server.heard()
        return name

    def _body(self) -> dict[str, Any]:
        length = self._only("Content-Length")
        if self._only("Content-Type").partition(";")[0].strip() != "application/json":
            raise Refused(415, "a question is application/json")
        if not re.fullmatch(r"[0-9]{1,9}", length):
            raise Refused(411, "the length of the body must be given")
        if int(length) > LARGEST:
            raise Refused(413, f"the body is longer than {LARGEST:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        return body

    def _send(self, status: int, body: bytes, kind: str, more: Mapping[str, str] = HEADERS) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **more}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        """Keep a stream open while the page is; at the end tell the page how it ended."""
        self.send_response(200)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        self.wfile.flush()
        with self.server.open_page():
            while not self.server.ended.wait(BEAT):
                if select.select([self.connection], [], [], 0)[0] and not self._is_there():
                    return
        self.wfile.write(f"event: end\ndata: {json.dumps(self.server.end)}\n\n".encode())

    def _is_there(self) -> bool:
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False
