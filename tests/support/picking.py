"""A session of the picker in a thread of its own, and questions to it without a browser."""

import http.client
import json
import threading
from urllib.parse import urlsplit

from opendelta._picker import session


class Picking:
    """A call that opens the page, in a thread; `address` is the page's."""

    def __init__(self, monkeypatch, call):
        self.address, self.result, self.error = "", None, None
        opened = threading.Event()

        def announce(address, browser):
            self.address = address
            opened.set()

        def run():
            try:
                self.result = call()
            except BaseException as error:
                self.error = error
            opened.set()

        monkeypatch.setattr(session, "_announce", announce)
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert opened.wait(20)

    def ask(self, verb, body=None):
        """The answer to a question of the page."""
        status, answer = self.request("POST", verb, body or {})
        assert status == 200, answer
        return answer

    def request(self, method, path, body=None, headers=None, at=None):
        """(status, answer) of a request as the page makes it, with other headers if given."""
        parts = urlsplit(at or self.address)
        connection = http.client.HTTPConnection(parts.netloc, timeout=20)
        given = {"Host": parts.netloc, "Origin": f"http://{parts.netloc}"}
        given |= {"Content-Type": "application/json"} if method == "POST" else {}
        given |= headers or {}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {name: value for name, value in given.items() if value is not None}
        skip = "Host" in (headers or {}) and headers["Host"] is None
        connection.putrequest(method, parts.path + path, skip_host=True, skip_accept_encoding=skip)
        for name, value in given.items():
            for each in value if isinstance(value, list) else [value]:
                connection.putheader(name, each)
        if data is not None and "Content-Length" not in given:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        reply = connection.getresponse()
        self.headers, text = dict(reply.getheaders()), reply.read()
        connection.close()
        return reply.status, json.loads(text) if "json" in reply.headers["Content-Type"] else text

    def join(self):
        """The result, once the session has ended."""
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def wire(delta_type, places=None, **options):
    """A delta as the page sends it."""
    return {"type": delta_type, "options": options, "places": places}
