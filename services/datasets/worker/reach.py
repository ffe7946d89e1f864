"""A request to a server on the web, and the answer to it: one hop, bounded.

Law of this room: a name is looked up once; every address that it has is judged,
and the connection goes to one of those that were judged, so that nobody can
move the name in between. No proxy, no cookie, no credential. One clock bounds
name, connection, head and body together, whatever the other end does.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, rejected, show
from services.datasets.addresses import INNER, is_open, kind_of
from services.datasets.web_rules import Allowed, Page
from services.datasets.worker.card import unusable

_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 30.0
_TICK_SECONDS = 0.005
"""A timer may ring a little before its time."""
_AGENT = "qlorad (import of a dataset)"

Resolve = Callable[..., list]


def failed(page: Page, why: str, retry_seconds: float = 30.0) -> Fault:
    """UPSTREAM: the server did not do its part, and may do it later."""
    url = page.url_without_query  # what a redirect put behind it may be a secret
    told = f"{show(url, 200)} {why}"
    return Fault(errors_pb2.REASON_UPSTREAM, told, resource=url[:200], retry_seconds=max(1.0, retry_seconds))


def unfit(page: Page, why: str, accepted: str = "the URL of a page that a browser shows") -> Fault:
    """INVALID_ARGUMENT: what the server does will be no better later."""
    return unusable("web.urls", f"{page.url_without_query}, which {why}", accepted)


def late(page: Page, clock: Clock) -> Fault:
    """UPSTREAM: the page took longer than it may."""
    return failed(page, f"did not answer in full within {clock.seconds:g} seconds (--page-seconds)")


def denied(page: Page, why: str, accepted: str) -> Fault:
    """PERMISSION_DENIED: this daemon does not go there."""
    told = f"web.urls: {show(page.url_without_query, 200)} {why}; accepted: {accepted}"
    return Fault(errors_pb2.REASON_PERMISSION_DENIED, told, resource=page.url_without_query[:200])


@dataclass(slots=True)
class Clock:
    """The time that is left for a page. When it is over, what is connected is cut."""

    seconds: float
    _end: float = 0.0
    _timer: threading.Timer | None = None
    _cut: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Clock:
        self._end = time.monotonic() + self.seconds
        self._timer = threading.Timer(self.seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()
        for sock in self._cut:
            sock.close()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end - _TICK_SECONDS

    def _ring(self) -> None:
        for sock in self._cut:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def watch(self, sock: socket.socket) -> None:
        """Has a connection cut when time is over. A second handle of it: the first may become part of a TLS socket."""
        self._cut.append(sock.dup())
        if self.is_over:
            self._ring()

    def left(self, most: float) -> float:
        """Seconds to wait for something, at most so many."""
        return max(0.001, min(most, self._end - time.monotonic()))


@contextlib.contextmanager
def answered(
    page: Page, allowed: Allowed, accept: str, clock: Clock, resolve: Resolve = socket.getaddrinfo
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET of a page whose server is allowed; its head is read, its body is read under `errors_of`."""
    with contextlib.ExitStack() as opened:
        with errors_of(page, clock):
            sock = opened.enter_context(contextlib.closing(_connected(page, allowed, clock, resolve)))
            connection = http.client.HTTPConnection(page.place.host, page.place.port)
            connection.sock, connection.auto_open = sock, 0
            connection.putrequest("GET", page.target, skip_host=True, skip_accept_encoding=True)
            for name, value in (
                ("Host", page.place.authority),
                ("User-Agent", _AGENT),
                ("Accept", accept),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
            ):
                connection.putheader(name, value)
            connection.endheaders()
            response = opened.enter_context(contextlib.closing(connection.getresponse()))
            if clock.is_over:  # a head that was cut looks like one that ended
                raise late(page, clock)
        yield response


@contextlib.contextmanager
def errors_of(page: Page, clock: Clock) -> Iterator[None]:
    """What the network does, as faults."""
    try:
        yield
    except ssl.SSLCertVerificationError as e:
        raise rejected(page.place.authority, f"its certificate does not hold: {e.verify_message}") from None
    except (http.client.HTTPException, OSError, ValueError) as e:
        if clock.is_over:
            raise late(page, clock) from None
        if isinstance(e, TimeoutError):
            raise failed(page, f"says nothing for {_IDLE_SECONDS:g} seconds") from None
        told = f"does not answer as a web server should ({type(e).__name__}: {show(str(e))})"
        is_cut = isinstance(e, OSError | http.client.IncompleteRead)
        if is_cut and (not isinstance(e, ssl.SSLError) or isinstance(e, ssl.SSLEOFError)):
            raise failed(page, told) from None
        raise unfit(page, told) from None


def _connected(page: Page, allowed: Allowed, clock: Clock, resolve: Resolve) -> socket.socket:
    error: OSError = OSError("the name has no address")
    for family, kind, protocol, _, address in _judged(page, allowed, clock, resolve):
        sock = socket.socket(family, kind, protocol)
        try:
            clock.watch(sock)
            sock.settimeout(clock.left(_CONNECT_SECONDS))
            sock.connect(address)
            sock.settimeout(_IDLE_SECONDS)
            return _wrapped(sock, page)
        except ssl.SSLError:
            sock.close()
            raise
        except OSError as e:
            sock.close()
            error = e
    raise error


def _wrapped(sock: socket.socket, page: Page) -> socket.socket:
    if page.place.scheme == "http":
        return sock
    # An end that is none is told: what comes before it would be taken for the whole.
    return ssl.create_default_context().wrap_socket(sock, server_hostname=page.place.host, suppress_ragged_eofs=False)


def _judged(page: Page, allowed: Allowed, clock: Clock, resolve: Resolve) -> list:
    """Every address of the server, none of which is one that is not to be asked."""
    found = _resolved(page, clock, resolve)
    for *_, address in found:
        here = ipaddress.ip_address(address[0].partition("%")[0])
        if not is_open(here, allowed.with_inner):
            host = f"{page.place.scheme}://{page.place.authority}"
            opened = "hosts whose every address is public"
            if kind_of(here) in INNER:
                opened += f", or {host}+inner in --web-hosts"
            raise denied(page, f"leads to a {kind_of(here)} address", opened)
    return found


def _resolved(page: Page, clock: Clock, resolve: Resolve) -> list:
    """The addresses of the name. The system's resolver knows no deadline, so a thread waits for it."""
    found: queue.SimpleQueue = queue.SimpleQueue()

    def look() -> None:
        try:
            found.put(resolve(page.place.host, page.place.port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as e:
            found.put(e)

    threading.Thread(target=look, daemon=True, name="resolve").start()
    try:
        told = found.get(timeout=clock.left(clock.seconds))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(told, socket.gaierror) and told.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        told_so = f"web.urls: {show(page.url_without_query, 200)}: there is no host of this name"
        raise Fault(errors_pb2.REASON_NOT_FOUND, told_so, resource=page.place.host)
    if isinstance(told, Exception):
        raise told
    return told
