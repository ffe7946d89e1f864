"""A site on loopback for tests: real sockets, whole answers, and answers that go wrong in every way."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Say = Callable[[socket.socket], None]


@dataclass(slots=True)
class Site:
    """A server that runs; what was asked of it stands in `asked`."""

    port: int
    scheme: str = "http"
    said: dict[str, Say] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    """Set when the site closes, for answers that go on until then."""

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def host(self, host: str = "127.0.0.1", inner: bool = True) -> str:
        """The entry that allows this site."""
        return f"{self.scheme}://{host}:{self.port}" + "+inner" * inner

    def put(self, path: str, body: bytes, kind: str = "text/plain; charset=utf-8", **headers: str) -> str:
        """Answers a path with a page; its URL."""
        return self.say(path, 200, body, **({"Content-Type": kind} if kind else {}), **headers)

    def move(self, path: str, to: str, status: int = 302) -> str:
        """Answers a path with a redirect."""
        return self.say(path, status, b"", Location=to)

    def say(self, path: str, status: int, body: bytes = b"", **headers: str) -> str:
        told = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
        head = "".join(f"{k}: {v}\r\n" for k, v in told.items() if v)
        return self.odd(path, lambda s: s.sendall(f"HTTP/1.1 {status} x\r\n{head}\r\n".encode() + body))

    def odd(self, path: str, say: Say) -> str:
        """Answers a path with whatever is written to the socket."""
        self.said[path] = say
        return self.url(path)

    def drip(self, head: bytes, drop: bytes) -> Say:
        """A beginning, and then a drop of it again and again until nobody listens."""

        def say(sock: socket.socket) -> None:
            sock.sendall(head)
            while not self.over.wait(0.02):
                sock.sendall(drop)

        return say


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextlib.contextmanager
def site(context: ssl.SSLContext | None = None) -> Iterator[Site]:
    """A site, over TLS with a context; closed whatever happens."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # whoever asked has left
                self.request.settimeout(20)
                sock = context.wrap_socket(self.request, server_side=True) if context else self.request
                with contextlib.closing(sock):
                    self.answer(sock)

        def answer(self, sock: socket.socket) -> None:
            head = b""
            while b"\r\n\r\n" not in head and (more := sock.recv(4096)):
                head += more
            if not head:
                return
            told.heads.append(head.decode())
            path = head.split(b" ", 2)[1].decode()
            told.asked.append(path)
            say = told.said.get(path)
            if say is None:
                sock.sendall(b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n")
            else:
                say(sock)

    with _Server(("127.0.0.1", 0), Handler) as server:
        told = Site(server.server_address[1], "https" if context else "http")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield told
        finally:
            told.over.set()
            server.shutdown()
            thread.join()
