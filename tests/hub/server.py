"""The hub over HTTP, and beside it, on a port of its own, the store where LFS files lie.

Law of this room: what is written to the wire, and where it goes wrong on order.
The store refuses every request that shows a token: a client must not hand one on.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.hub import answers
from tests.hub.answers import Answer
from tests.hub.faults import Fault, Orders
from tests.hub.repos import Commit, Repo, Repos, Stored

_NAME = r"(?P<repo>[^/]+(?:/(?!revision/|tree/|paths-info/|resolve/)[^/]+)?)"
_API = re.compile(rf"/api/(?P<kind>models|datasets)/{_NAME}(?:/(?P<verb>revision|tree|paths-info)/(?P<rest>.+))?")
_RESOLVE = re.compile(rf"/(?P<kind>datasets/)?{_NAME}/resolve/(?P<rest>.+)")
_LFS = re.compile(r"/lfs/(?P<sha256>[0-9a-f]{64})/[^/]*")
_PIECE = 1 << 16


class Hub:
    """Both servers, started."""

    def __init__(self, repos: Repos, port: int = 0) -> None:
        self.repos = repos
        self.orders = Orders()
        self._servers = [_serve(self, _HubHandler, port), _serve(self, _StoreHandler, 0)]
        self.url, self.store_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    @property
    def port(self) -> int:
        return int(self._servers[0].server_address[1])

    def close(self) -> None:
        """Ends both."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


def _serve(hub: Hub, handler: type[BaseHTTPRequestHandler], port: int) -> _Server:
    server = _Server(("127.0.0.1", port), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    """Sends answers, whole or as a fault wants them."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """The log is kept for tests, not printed."""

    def answer(self) -> Answer:
        """What is to be said."""
        raise AssertionError("said by the two handlers below")

    def do_GET(self) -> None:
        """Answers any request."""
        fault = self.server.hub.orders.take(f"{self.command} {self.path}")
        self.entry: dict[str, Any] = {
            "method": self.command,
            "path": self.path,
            "range": self.headers.get("Range", ""),
            "has_token": "Authorization" in self.headers,
            "status": 0,
            "sent": 0,
        }
        self.server.hub.orders.note(self.entry)
        if fault is not None and self._struck(fault):
            return
        answer = self.answer()
        if answer.file is not None:
            self._send_file(answer, answer.file, fault)
        else:
            self._send_json(answer)

    do_HEAD = do_GET
    do_POST = do_GET

    def _struck(self, fault: Fault) -> bool:
        """Whether the fault is the whole answer."""
        if fault.kind == "drop":
            self._hang_up()
        elif fault.kind == "throttle":
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._send_json(Answer(429, headers, {"error": "Too Many Requests"}))
        elif fault.kind == "status":
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._send_json(Answer(fault.status, headers, {"error": "as ordered"}))
        elif fault.kind == "body":
            self._head(200, {"Content-Type": "application/json"}, len(fault.body.encode()))
            self._write(fault.body.encode())
        else:
            return False
        return True

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.entry["status"] = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_json(self, answer: Answer) -> None:
        body = b"" if answer.told is None else json.dumps(answer.told).encode()
        self._head(answer.status, {**answer.headers, "Content-Type": "application/json"}, len(body))
        if self.command != "HEAD":
            self._write(body)

    def _send_file(self, answer: Answer, file: Stored, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        asked = self.headers.get("Range") if kind != "no_range" else None
        part = answers.span(asked, self.headers.get("If-Range"), file.etag, file.size)
        if part.status == 416:
            self._head(416, {"Content-Range": f"bytes */{file.size}"}, 0)
            return
        headers = dict(answer.headers)
        if part.status == 206:
            headers["Content-Range"] = f"bytes {part.first}-{part.end - 1}/{file.size}"
        self._head(part.status, headers, part.end - part.first)
        if self.command == "HEAD":
            return
        with file.on_disk.open("rb") as f:
            f.seek(part.first)
            left = part.end - part.first
            if fault is not None and kind == "cut":
                self._write(f.read(min(left, fault.after)))
                self._hang_up()
                return
            if kind == "wrong_bytes" and left:
                self._write(bytes([f.read(1)[0] ^ 1]))
                left -= 1
            size = fault.after if fault is not None and kind == "slow" else _PIECE
            while left > 0 and (piece := f.read(min(left, max(1, size)))):
                if fault is not None and kind == "slow":
                    time.sleep(fault.seconds)
                self._write(piece)
                left -= len(piece)

    def _write(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.wfile.flush()
            self.entry["sent"] += len(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away, as it may

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client was faster


class _HubHandler(_Handler):
    """API, files, and the tests' own door under /_control."""

    def answer(self) -> Answer:
        split = urlsplit(self.path)
        path = split.path
        query = dict(parse_qsl(split.query))
        if path.startswith("/_control"):
            return self._control()
        if found := _API.fullmatch(path):
            return self._about(found["kind"], unquote(found["repo"]), found["verb"], found["rest"] or "", query)
        if found := _RESOLVE.fullmatch(path):
            return self._file("datasets" if found["kind"] else "models", unquote(found["repo"]), found["rest"])
        return answers.error(404, "", "Not Found")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _control(self) -> Answer:
        orders = self.server.hub.orders
        if self.command == "POST":
            told = json.loads(self._body())
            if told:
                orders.order(told)
            else:
                orders.clear()
        return Answer(told=orders.told())

    def _known(self, kind: str, name: str) -> tuple[Repo, bool] | Answer:
        """The repository, and whether the caller's token opens it; or that it is not there."""
        repo = self.server.hub.repos.find(kind, name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.is_private and token != repo.token):
            return answers.no_repo(bool(token))
        return repo, not repo.is_gated or token == repo.token

    def _at(self, repo: Repo, revision: str) -> Commit | Answer:
        commit = self.server.hub.repos.commit(repo, revision)
        return commit if commit is not None else answers.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _about(self, kind: str, name: str, verb: str | None, rest: str, query: dict[str, str]) -> Answer:
        known = self._known(kind, name)
        if isinstance(known, Answer):
            return known
        repo, _ = known
        revision, _, below = rest.partition("/")
        if verb == "revision":
            revision, below = rest, ""
        commit = self._at(repo, unquote(revision) or "main")
        if isinstance(commit, Answer):
            return commit
        if verb == "tree":
            return answers.tree(commit, unquote(below), query, f"{self.server.hub.url}{urlsplit(self.path).path}")
        if verb == "paths-info":
            body = self._body().decode()
            is_json = "json" in self.headers.get("Content-Type", "")
            paths = json.loads(body)["paths"] if is_json else [v for k, v in parse_qsl(body) if k == "paths"]
            return Answer(told=[answers.path_info(commit.files[p]) for p in paths if p in commit.files])
        return Answer(told=answers.info(repo, commit, query.get("blobs", "").lower() in ("true", "1")))

    def _file(self, kind: str, name: str, rest: str) -> Answer:
        known = self._known(kind, name)
        if isinstance(known, Answer):
            return known
        repo, is_open = known
        revision, _, path = rest.partition("/")
        commit = self._at(repo, unquote(revision))
        if isinstance(commit, Answer):
            return commit
        if not is_open:
            return answers.gated(repo, "Authorization" in self.headers)
        return answers.resolve(commit, unquote(path), self.server.hub.store_url)


class _StoreHandler(_Handler):
    """Bytes by digest."""

    def answer(self) -> Answer:
        if "Authorization" in self.headers:
            return answers.error(400, "", "a token was handed on to the store")
        found = _LFS.fullmatch(urlsplit(self.path).path)
        path = self.server.hub.repos.by_sha256(found["sha256"]) if found else None
        if found is None or path is None:
            return answers.error(404, "", "Not Found")
        stored = Stored(path.name, path, path.stat().st_size, "", found["sha256"], True)
        return Answer(200, {"ETag": f'"{found["sha256"]}"', "Accept-Ranges": "bytes"}, file=stored)
