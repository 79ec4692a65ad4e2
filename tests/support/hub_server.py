"""A stand-in for the Hugging Face hub on this machine, as far as huggingface_hub asks for it."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "ada", "hf_of_ada"


class Hub(BaseHTTPRequestHandler):
    """Models, and what is in the last commit of each: `repositories[id][path]` is its content."""

    protocol_version = "HTTP/1.1"
    repositories: dict = {}  # noqa: RUF012  one server a test run, which sets it
    private: set = set()  # noqa: RUF012

    def log_message(self, *args):
        """Nothing is printed."""

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "log in first"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if asked.get("visibility") == "private":
                self.private.add(name)
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name}, status)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer({"files": modes})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": path}, 404)

    def commit(self, name, lines):
        files = dict(self.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repositories[name] = files
        url = f"http://{self.headers['Host']}/{name}/commit/{sha(files)}"
        self.answer({"success": True, "commitOid": sha(files), "commitUrl": url})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/.+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        name = (api or file or [None, None])[1]
        if name not in self.repositories:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        files = self.repositories[name]
        if api:
            listed = [
                {"type": "file", "path": f, "size": len(c), "oid": etag(c)}
                for f, c in files.items()
            ]
            siblings = [{"rfilename": f} for f in files]
            facts = {"id": name, "sha": sha(files), "siblings": siblings, "tags": []}
            self.answer(listed if "/tree/" in path else facts)
        elif file[2] in files:
            content = files[file[2]]
            marks = {"X_Repo_Commit": sha(files), "ETag": f'"{etag(content)}"'}
            self.answer(content, **marks)
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


def etag(content):
    return hashlib.sha1(content).hexdigest()


def sha(files):
    """The name of a commit."""
    return etag(b"".join(name.encode() + content for name, content in sorted(files.items())))


@contextlib.contextmanager
def serving():
    """(address of a running hub, its repositories, the names of its private ones)."""
    Hub.repositories, Hub.private = {}, set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Hub.repositories, Hub.private
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
