"""Pages by URL: fetched as they are, or refused by name, whatever the other end and the name service do."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import socket
import ssl
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import web
from tests.common.certificates import Authority
from tests.datasets.site import Site, site
from tests.house import eventually

HTML = "text/html; charset=utf-8"


@pytest.fixture(scope="module")
def there() -> Iterator[Site]:
    with site() as running:
        yield running


class Get:
    """Fetches in this process, by the worker's own code."""

    def __init__(self, into: pathlib.Path, there: Site) -> None:
        self.into = into
        self.there = there
        there.asked.clear()
        there.heads.clear()

    def __call__(
        self, *urls: str, hosts: tuple[str, ...] = (), most: int = 1 << 20, seconds: float = 20.0, **more: Any
    ) -> ingest_pb2.FetchDone:
        order = ingest_pb2.FetchOrder(
            into=str(self.into),
            max_bytes=1 << 30,
            max_page_bytes=most,
            page_seconds=seconds,
            web_hosts=hosts or (self.there.host(),),
        )
        order.web.urls.extend(urls)
        return web.fetch(order, lambda *_: None, **more)

    def refused(self, *urls: str, **asked: Any) -> Fault:
        with pytest.raises(Fault) as caught:
            self(*urls, **asked)
        return caught.value

    def text(self, url: str) -> str:
        (source,) = self(url).sources
        return pathlib.Path(source.path).read_text("utf-8-sig")


@pytest.fixture
def get(tmp_path: pathlib.Path, there: Site) -> Get:
    return Get(tmp_path, there)


def reason(fault: Fault) -> str:
    return errors_pb2.Reason.Name(fault.reason).removeprefix("REASON_")


def test_pages_come_with_their_last_url_and_digest(get: Get, there: Site) -> None:
    body = "Ünser Text.\n".encode()
    there.put("/b/notes?key=1", body)
    there.move("/old", "/b/notes?key=1", 301)
    there.put("/rows.jsonl?key=2", b'{"text": "a"}\n')
    done = get(there.url("/old"), there.url("/rows.jsonl?key=2"))
    assert done.source == f"web:{there.url('/b/notes')} and 1 more"
    told = [(s.filename, s.url, s.sha256) for s in done.sources]
    assert told == [
        ("127.0.0.1/b/notes.txt", there.url("/b/notes"), hashlib.sha256(body).hexdigest()),
        ("127.0.0.1/rows.jsonl", there.url("/rows.jsonl?key=2"), hashlib.sha256(b'{"text": "a"}\n').hexdigest()),
    ]
    assert pathlib.Path(done.sources[0].path).read_bytes() == body
    head = there.heads[0].lower()
    assert f"host: 127.0.0.1:{there.port}" in head and "accept-encoding: identity" in head
    assert "authorization" not in head and "cookie" not in head


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        ("/", HTML, "127.0.0.1/index.html"),
        ("/guide/", HTML, "127.0.0.1/guide/index.html"),
        ("/guide.php", HTML, "127.0.0.1/guide.php.html"),
        ("/a.htm", "application/xhtml+xml", "127.0.0.1/a.htm"),
        ("/README.md", "text/plain", "127.0.0.1/README.md"),
        ("/README", "text/markdown", "127.0.0.1/README.md"),
        ("/x.json", "text/plain", "127.0.0.1/x.json"),
        ("/x", "application/x-ndjson", "127.0.0.1/x.jsonl"),
        ("/t", "text/csv;charset=utf-8", "127.0.0.1/t.csv"),
        ("/p", "application/pdf", "127.0.0.1/p.pdf"),
        ("/d.docx", "application/octet-stream", "127.0.0.1/d.docx"),
        ("/raw/a.md", "", "127.0.0.1/raw/a.md"),
        ("/..%2f..%2fetc/%2e%2e/p%00w", "text/plain", "127.0.0.1/..-..-etc/p-w.txt"),
    ],
)
def test_names_tell_readers_what_a_page_is(get: Get, there: Site, path: str, kind: str, name: str) -> None:
    (source,) = get(there.put(path, b"text", kind)).sources
    assert source.filename == name


def test_names_are_given_once(get: Get, there: Site) -> None:
    urls = [there.put(f"/list?page={i}", b"a", HTML) for i in range(3)]
    assert [s.filename for s in get(*urls).sources] == [f"127.0.0.1/list{n}.html" for n in ("", "-2", "-3")]


# Where it may not go


def test_an_inner_address_is_not_asked(get: Get, there: Site) -> None:
    for host in ("127.0.0.1", "localhost"):
        there.put("/", b"secret")
        fault = get.refused(there.url("/", host), hosts=(there.host(host, inner=False),))
        assert reason(fault) == "PERMISSION_DENIED" and "leads to a loopback address" in fault.message
        assert f"{there.host(host)} in --web-hosts" in fault.message
    assert there.asked == []


def test_every_address_of_a_name_counts(get: Get, there: Site) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        # The name has a public address too, and the first one is that.
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("93.184.216.34", "127.0.0.1")]

    fault = get.refused("http://two.example/", hosts=("http://two.example",), resolve=resolve)
    assert reason(fault) == "PERMISSION_DENIED" and "loopback" in fault.message
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "0.0.0.0", "fe80::1%eth0"):
        asked = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        fault = get.refused(
            "http://a.example/", hosts=("http://a.example+inner",), resolve=lambda *_, a=asked, **__: [a]
        )
        assert reason(fault) == "PERMISSION_DENIED", address
    assert there.asked == []


def test_a_name_that_moves_between_check_and_use(get: Get, there: Site) -> None:
    """The name is looked up once, and the connection goes to what was found then."""
    there.put("/", b"page")
    looked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        looked.append(host)
        address = "127.0.0.1" if len(looked) == 1 else "169.254.169.254"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    url = there.url("/", "moving.example")
    done = get(url, hosts=(there.host("moving.example"),), resolve=resolve)
    assert looked == ["moving.example"] and done.sources[0].url == url and there.asked == ["/"]
    assert f"Host: moving.example:{there.port}" in there.heads[0]


def test_each_hop_is_checked_anew(get: Get, there: Site) -> None:
    with site() as inner:
        inner.put("/", b"secret")
        there.move("/out", inner.url("/"))
        fault = get.refused(there.url("/out"))
        assert (
            reason(fault) == "PERMISSION_DENIED" and "a redirect of" in fault.message and "--web-hosts" in fault.message
        )
        # Allowed by name, but not that it lies within.
        fault = get.refused(there.url("/out"), hosts=(there.host(), inner.host(inner=False)))
        assert reason(fault) == "PERMISSION_DENIED" and "loopback" in fault.message
        assert inner.asked == []
        assert len(get(there.url("/out"), hosts=(there.host(), inner.host())).sources) == 1
    for to in ("file:///etc/passwd", "http://user@127.0.0.1/", "ftp://127.0.0.1/", "http://a b/", "\\\\x"):
        there.move("/odd", to)
        assert reason(get.refused(there.url("/odd"))) in ("INVALID_REQUEST", "NOT_FOUND"), to
    assert "does not say where to" in get.refused(there.say("/nowhere", 302)).message


def test_a_redirect_may_be_written_in_utf8(get: Get, there: Site) -> None:
    there.put("/gr%C3%BCn", b"Here.\n")
    assert get.text(there.move("/raw", "/grün")) == "Here.\n" and there.asked == ["/raw", "/gr%C3%BCn"]
    assert get.text(there.move("/told", "/gr%C3%BCn")) == "Here.\n"


def test_a_proxy_that_the_environment_names_is_not_asked(
    get: Get, there: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        monkeypatch.delenv("no_proxy", raising=False)
        assert get.text(there.put("/straight", b"Here.\n")) == "Here.\n" and proxy.asked == []


def test_circles_and_long_ways_end(get: Get, there: Site) -> None:
    there.move("/a", "/b")
    there.move("/b", "/a")
    for i in range(9):
        there.move(f"/hop{i}", f"/hop{i + 1}")
    for path, hops in (("/a", 2), ("/hop0", web.MAX_HOPS + 1)):
        there.asked.clear()
        fault = get.refused(there.url(path))
        assert reason(fault) == "INVALID_REQUEST" and "circle" in fault.message and len(there.asked) == hops


# What the other end sends


def test_an_endless_body_is_cut_at_the_bound(get: Get, there: Site) -> None:
    there.odd("/endless", there.drip(b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\n\r\n", b"x" * 60_000))
    chunk = b"ea60\r\n" + b"x" * 60_000 + b"\r\n"
    head = b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    there.odd("/chunks", there.drip(head, chunk))
    there.odd(
        "/told", there.drip(b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\nContent-Length: 99999999\r\n\r\n", b"")
    )
    for path in ("/endless", "/chunks", "/told"):
        fault = get.refused(there.url(path), most=200_000)
        assert reason(fault) == "TOO_LARGE" and "--max-page-bytes" in fault.message, path
        assert sum(p.stat().st_size for p in get.into.iterdir()) <= 200_000


def test_a_bomb_is_cut_at_the_bound(get: Get, there: Site) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    url = there.put("/bomb", bomb, Content_Encoding="gzip")
    tracemalloc.start()
    try:
        fault = get.refused(url, most=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert reason(fault) == "TOO_LARGE" and (get.into / "page-000").stat().st_size <= 1 << 20


def test_packed_bodies(get: Get, there: Site) -> None:
    packed = gzip.compress(b"first ") + gzip.compress(b"second" * 40_000)
    assert get.text(there.put("/packed", packed, Content_Encoding="gzip")) == "first " + "second" * 40_000
    for body, encoding, why, word in (
        (packed[:-9], "gzip", "UPSTREAM", "middle of its packed data"),
        (b"no gzip", "gzip", "INVALID_REQUEST", "damaged"),
        (packed + b"rest", "gzip", "INVALID_REQUEST", "damaged"),
        (packed, "br", "INVALID_REQUEST", "'br'"),
    ):
        fault = get.refused(there.put("/odd-packed", body, Content_Encoding=encoding))
        assert reason(fault) == why and word in fault.message


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 x\r\nX-Slow: ",
        b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\n\r\n",
        b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\nContent-Length: 500000\r\n\r\n",
    ],
    ids=["line", "head", "body", "told"],
)
def test_a_slow_page_ends_with_the_clock(get: Get, there: Site, head: bytes) -> None:
    there.odd("/slow", there.drip(head, b"H" if head == b"" else b"x"))
    fault = get.refused(there.url("/slow"), seconds=0.15)
    assert reason(fault) == "UPSTREAM" and "within 0.15 seconds (--page-seconds)" in fault.message


def test_a_name_service_that_hangs(get: Get, there: Site) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        there.over.wait(20)
        return []

    fault = get.refused("http://hangs.example/", hosts=("http://hangs.example",), seconds=0.2, resolve=resolve)
    assert reason(fault) == "UPSTREAM" and "within 0.2 seconds" in fault.message


def test_heads_that_are_none(get: Get, there: Site) -> None:
    many = b"".join(b"X-%d: y\r\n" % i for i in range(5000))
    for head, why in (
        (b"HTTP/1.1 200 x\r\nX-Huge: " + b"x" * (1 << 20) + b"\r\n\r\n", "INVALID_REQUEST"),
        (b"HTTP/1.1 200 x\r\n" + many + b"\r\n", "INVALID_REQUEST"),
        (b"x" * 100_000, "INVALID_REQUEST"),
        (b"SSH-2.0-server\r\n", "INVALID_REQUEST"),
        (b"", "UPSTREAM"),
    ):
        fault = get.refused(there.odd("/head", lambda s, head=head: s.sendall(head)))
        assert reason(fault) == why and "does not answer as a web server should" in fault.message
    cut = b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nhalf"
    assert "too early" in get.refused(there.odd("/cut", lambda s: s.sendall(cut))).message


def test_kinds_that_are_not_read(get: Get, there: Site) -> None:
    for path, kind in (
        ("/a.png", "image/png"),
        ("/a", "application/octet-stream"),
        ("/a.zip", ""),
        ("/a.js", "text/javascript"),
    ):
        fault = get.refused(there.put(path, b"x", kind))
        assert reason(fault) == "INVALID_REQUEST" and "application/pdf" in fault.message
    assert "empty" in get.refused(there.put("/empty", b"")).message


def test_answers_that_are_no_page(get: Get, there: Site) -> None:
    assert reason(get.refused(there.url("/none"))) == "NOT_FOUND"
    assert reason(get.refused(there.say("/closed", 403, b"no"))) == "PERMISSION_DENIED"
    fault = get.refused(there.say("/busy", 503, b"", Retry_After="7"))
    assert reason(fault) == "UPSTREAM" and fault.retry_seconds == 7
    for status in (204, 206, 304, 418, 500, 999):
        fault = get.refused(there.say("/part", status, b"x", Content_Type="text/plain"))
        assert reason(fault) == ("UPSTREAM" if status == 500 else "INVALID_REQUEST"), status
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    fault = get.refused(f"http://127.0.0.1:{port}/", hosts=(f"http://127.0.0.1:{port}+inner",))
    assert reason(fault) == "UPSTREAM" and "Connection refused" in fault.message


# Charsets


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("grün – Δ".encode(), "text/plain"),
        ("grün – Δ".encode("utf-16"), "text/plain"),
        (b"\xef\xbb\xbf" + "grün – Δ".encode(), "text/plain; charset=iso-8859-1"),
        ("grün – Δ".encode("utf-16-le"), "text/plain; charset=utf-16le"),
        ("grün – Δ".encode("gb18030"), 'text/html; charset="GB18030"'),
        (b"<meta charset='gb18030'>" + "grün – Δ".encode("gb18030"), "text/html"),
    ],
)
def test_charsets_become_utf8(get: Get, there: Site, body: bytes, kind: str) -> None:
    assert get.text(there.put("/c", body, kind)).removeprefix("<meta charset='gb18030'>") == "grün – Δ"


def test_latin_pages_are_read_as_browsers_do(get: Get, there: Site) -> None:
    assert get.text(there.put("/l", "“grün”".encode("cp1252"), "text/plain; charset=ISO-8859-1")) == "“grün”"


@pytest.mark.parametrize(
    ("body", "kind", "word"),
    [
        (b"abc\xe9", "text/plain; charset=utf-8", "not utf-8, as it tells (byte 3)"),
        (b"abc\xe9", "text/html", "not utf-8"),
        (b"a" * (1 << 20) + b"\xc3", "text/plain", "not utf-8"),
        (b"caf\xc3\xa9", "text/plain; charset=us-ascii", "not ascii"),
        (b"abc", "text/plain; charset=rot13", "in the charset 'rot13'"),
        (b"abc", "text/plain; charset=zlib", "in the charset 'zlib'"),
        (b"abc", "text/plain; charset=none-such", "in the charset"),
    ],
)
def test_a_wrong_charset_is_refused(get: Get, there: Site, body: bytes, kind: str, word: str) -> None:
    fault = get.refused(there.put("/wrong", body, kind), most=1 << 21)
    assert reason(fault) == "INVALID_REQUEST" and word in fault.message and "UTF-8" in fault.message


# TLS


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, pathlib.Path]]:
    authority = Authority(tmp_path_factory.mktemp("tls") / "authority")
    pair = authority.sign("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    with site(context) as running:
        yield running, authority.cert


def test_certificates_are_held_against_the_name(
    get: Get, secure: tuple[Site, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, authority = secure
    url = there.put("/", b"page").replace("127.0.0.1", "localhost")
    fault = get.refused(url, hosts=(there.host("localhost"),))
    assert reason(fault) == "REJECTED" and "certificate" in fault.message
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    assert len(get(url, hosts=(there.host("localhost"),)).sources) == 1

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    plain = there.url("/", "localhost").replace("https", "http")
    fault = get.refused(plain, hosts=(there.host("localhost").replace("https", "http"),))
    assert reason(fault) in ("UPSTREAM", "INVALID_REQUEST")
    fault = get.refused(there.url("/", "other.example"), hosts=(there.host("other.example"),), resolve=resolve)
    assert reason(fault) == "REJECTED" and "certificate" in fault.message
    # No length, and no farewell: this may be half of it.
    there.odd(
        "/cut", lambda s: (s.sendall(b"HTTP/1.1 200 x\r\nContent-Type: text/plain\r\n\r\nhalf"), s.shutdown(2))[1]
    )
    assert reason(get.refused(there.url("/cut", "localhost"), hosts=(there.host("localhost"),))) == "UPSTREAM"


def test_nothing_is_left_behind(get: Get, there: Site, keep: Callable[[], int]) -> None:
    before = keep()
    for path in ("/none", "/"):
        there.put("/", b"x")
        try:
            get(there.url(path))
        except Fault:
            continue
    eventually(lambda: keep() <= before, 10, "the end of every connection")


@pytest.fixture
def keep() -> Callable[[], int]:
    """How many descriptors this process has."""
    return lambda: len(list(pathlib.Path("/proc/self/fd").iterdir()))
