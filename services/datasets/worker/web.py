"""Pages by URL: fetched hop by hop, bounded, and laid down as files that readers of files take.

Law of this room: only hosts that the order allows are asked, each hop anew. A
body is counted while it comes and while it is unpacked; a kind that no reader
takes is refused by name. Text becomes UTF-8 here, where its charset is known.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import pathlib
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, show, too_large
from services.common.frames.v1 import ingest_pb2
from services.datasets import web_rules
from services.datasets.web_rules import Allowed, Page
from services.datasets.worker import charsets, pages
from services.datasets.worker.card import unusable
from services.datasets.worker.reach import Clock, Resolve, answered, denied, errors_of, failed, late, unfit

MAX_HOPS = 5
_PIECE = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a page may be and take."""

    hosts: tuple[Allowed, ...]
    told: str
    """The hosts as an error shows them."""
    page_bytes: int
    page_seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """A page that was laid down: where it was at last, and its bytes as they came, before its text became UTF-8."""

    page: Page
    kind: pages.Kind
    sha256: str
    size: int


def fetch(
    order: ingest_pb2.FetchOrder, tell: Callable[[int, int], None], resolve: Resolve = socket.getaddrinfo
) -> ingest_pb2.FetchDone:
    """Every page of the order, in order; the files lie in the order's folder. What is wrong with one refuses all."""
    hosts = tuple(web_rules.read_host(word) for word in order.web_hosts)
    bounds = Bounds(hosts, web_rules.told(order.web_hosts), order.max_page_bytes, order.page_seconds)
    into, names, total = pathlib.Path(order.into), pages.Names(), 0
    done = ingest_pb2.FetchDone()
    for number, url in enumerate(order.web.urls):
        path = into / f"page-{number:03d}"
        asked = web_rules.read_url(url)
        file = _bring(asked, bounds, path, functools.partial(_tell_on, tell, total), resolve)
        total += file.size
        if total > order.max_bytes:
            raise too_large(f"web.urls: {len(order.web.urls)} pages", total, order.max_bytes, "bytes")
        shown = file.page.url if file.page == asked else file.page.url_without_query
        name = names.of(file.page, file.kind)
        done.sources.add(path=str(path), filename=name, sha256=file.sha256, size_bytes=file.size, url=shown)
    more = f" and {len(done.sources) - 1} more" if len(done.sources) > 1 else ""
    done.source = f"web:{done.sources[0].url}{more}"
    return done


def _tell_on(tell: Callable[[int, int], None], before: int, done: int) -> None:
    tell(before + done, 0)


def _bring(page: Page, bounds: Bounds, path: pathlib.Path, told: Callable[[int], None], resolve: Resolve) -> Taken:
    """Lays a page down at a path, following redirects."""
    way = [page]
    with Clock(bounds.page_seconds) as clock:
        while True:
            allowed = web_rules.allowance(page.place, bounds.hosts)
            if allowed is None:
                came = f" (a redirect of {show(way[0].url_without_query, 200)})" if len(way) > 1 else ""
                raise denied(page, f"is not of a host that is allowed{came}", bounds.told)
            with answered(page, allowed, pages.ACCEPT, clock, resolve) as response:
                if response.status not in _REDIRECTS:
                    return _take(page, response, bounds, path, told, clock)
                page = _next(page, response)
            if page in way or len(way) > MAX_HOPS:
                hops = " to ".join(show(p.url_without_query, 80) for p in way[-3:])
                raise unfit(way[0], f"is redirected in a circle, or more than {MAX_HOPS} times (at last {hops})")
            way.append(page)


def _next(page: Page, response: http.client.HTTPResponse) -> Page:
    location = response.headers.get("Location")
    if not location:
        raise unfit(page, f"answers with {response.status} and does not say where to")
    try:
        return web_rules.follow(page, _as_sent(location))
    except ValueError as e:
        raise unfit(page, f"is redirected to {show(location)}, which {e}") from None


def _as_sent(location: str) -> str:
    """A header's bytes, which http.client takes for Latin-1, as the UTF-8 that most servers mean."""
    try:
        return location.encode("latin-1").decode()
    except UnicodeError:
        return location


def _take(
    page: Page,
    response: http.client.HTTPResponse,
    bounds: Bounds,
    path: pathlib.Path,
    told: Callable[[int], None],
    clock: Clock,
) -> Taken:
    """Lays the body down; faults for what is none, too large, or of a kind that is not read."""
    if response.status != 200:
        raise _by_status(page, response)
    kind = pages.kind_of(response.headers.get("Content-Type", ""), page)
    if kind is None:
        given = f"{page.url_without_query}, which is {show(response.headers.get('Content-Type', 'of no told type'))}"
        raise unusable("web.urls", given, pages.ACCEPTED)
    size, digest = 0, hashlib.sha256()
    if (announced := response.length or 0) > bounds.page_bytes:
        raise _too_large(page, announced, bounds)
    with path.open("wb") as out:
        for piece in _unpacked(page, response, _body(page, response, clock)):
            size += len(piece)
            if size > bounds.page_bytes:
                raise _too_large(page, size, bounds)
            out.write(piece)
            digest.update(piece)
            told(size)
    if not size:
        raise unusable("web.urls", f"{page.url_without_query}, which is empty", "a page with text")
    if kind.is_text:
        charsets.to_utf8(path, response.headers.get_content_charset(""), kind, page)
    return Taken(page, kind, digest.hexdigest(), size)


def _too_large(page: Page, size: int, bounds: Bounds) -> Fault:
    return too_large(f"web.urls: {page.url_without_query} (--max-page-bytes)", size, bounds.page_bytes, "bytes")


def _body(page: Page, response: http.client.HTTPResponse, clock: Clock) -> Iterator[bytes]:
    """The bytes as they come; an end before the announced one is UPSTREAM."""
    while True:
        with errors_of(page, clock):
            piece = response.read1(_PIECE)
        if not piece:
            break
        yield piece
    if clock.is_over:  # cut by this side, which looks like an end
        raise late(page, clock)
    if response.length:
        raise failed(page, f"ended {response.length} bytes too early")


def _unpacked(page: Page, response: http.client.HTTPResponse, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The body, unpacked where the server packed it unasked: a little at a time, so that a bomb is counted first."""
    packing = response.headers.get("Content-Encoding", "identity").strip().lower() or "identity"
    if packing == "identity":
        yield from pieces
        return
    if packing not in ("gzip", "x-gzip"):
        raise unfit(page, f"is packed as {show(packing)}, which was not asked for", "gzip, or not packed")
    unpack = zlib.decompressobj(31)
    try:
        for piece in pieces:
            while piece:
                if unpack.eof:  # another member follows
                    unpack = zlib.decompressobj(31)
                yield unpack.decompress(piece, _PIECE)
                piece = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
        while rest := unpack.decompress(b"", _PIECE):  # what it still holds
            yield rest
    except zlib.error as e:
        raise unfit(page, f"is packed in a way that is damaged ({e})", "whole gzip data") from None
    if not unpack.eof:
        raise failed(page, "ends in the middle of its packed data")


def _by_status(page: Page, response: http.client.HTTPResponse) -> Fault:
    status = response.status
    if status in (404, 410):
        told = f"web.urls: {show(page.url_without_query, 200)} does not exist ({status})"
        return Fault(errors_pb2.REASON_NOT_FOUND, told, resource=page.url_without_query[:200])
    if status in (401, 403, 407, 451):
        return denied(page, f"is not open to this daemon ({status}), which shows no credentials", "a page open to all")
    if status not in _AGAIN:
        return unfit(page, f"is answered with status {status}")
    wait = response.headers.get("Retry-After", "").strip()
    seconds = float(wait[:9]) if wait.isdecimal() and wait.isascii() else 30.0
    return failed(page, f"answers with status {status}", seconds)
