"""Which URLs may be fetched: how one is read, and the hosts that a daemon allows.

Law of this room: pure. A URL is taken apart once, here, and what was read is
what is connected to, so that no two readers can differ on it. Hosts are equal
or they are not: a name is never looked at by its end, but where an entry says so.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

MAX_URLS = 100
MAX_URL_CHARACTERS = 2048
URL_RULE = (
    f"https://HOST/PATH of at most {MAX_URL_CHARACTERS} characters, without a user's name, blanks, '\\' or controls"
)
HOST_RULE = (
    "HOST, *.DOMAIN, or https://HOST:PORT or http://HOST:PORT; with +inner behind it where the host may lie within"
)
_PORTS = {"https": 443, "http": 80}
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
_ENTRY = re.compile(r"(?:(?P<scheme>https?)://)?(?P<any>\*\.)?(?P<rest>[^/?#@\s+]+)(?P<inner>\+inner)?")
_ODD = re.compile(r"[\x00-\x20\x7f\\]")
_PATH_SAFE = "/%:@!$&'()*+,;=-._~"


@dataclass(frozen=True, slots=True)
class Place:
    """A server: what a connection needs to know of it."""

    scheme: str
    host: str
    """In lower case, as ASCII; an IPv6 address without brackets."""
    port: int

    @property
    def authority(self) -> str:
        """Host and port as a URL and the Host header have them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Page:
    """A URL, taken apart."""

    place: Place
    path: str
    query: str

    @property
    def target(self) -> str:
        """What is asked of the server."""
        return self.path + (f"?{self.query}" if self.query else "")

    @property
    def url(self) -> str:
        return f"{self.place.scheme}://{self.place.authority}{self.target}"

    @property
    def url_without_query(self) -> str:
        """The URL where its query may hold what is not to be kept."""
        return f"{self.place.scheme}://{self.place.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class Allowed:
    """An entry of the allow-list."""

    place: Place
    with_subdomains: bool
    """Names below the host, and not the host itself."""
    with_inner: bool
    """The host may have inner addresses."""

    def fits(self, place: Place) -> bool:
        if (place.scheme, place.port) != (self.place.scheme, self.place.port):
            return False
        if self.with_subdomains:
            return place.host.endswith(f".{self.place.host}")
        return place.host == self.place.host


def read_url(url: str) -> Page:
    """A URL taken apart. ValueError for one that is not well formed."""
    if not 1 <= len(url) <= MAX_URL_CHARACTERS or _ODD.search(url):
        raise ValueError("is empty, too long, or holds blanks or controls")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError("is neither https nor http")
    if "@" in parts.netloc:
        raise ValueError("names a user")
    place = _place(url)
    return Page(place, quote(parts.path or "/", safe=_PATH_SAFE), quote(parts.query, safe=_PATH_SAFE + "?"))


def follow(page: Page, location: str) -> Page:
    """Where a redirect leads. ValueError for what is no URL."""
    return read_url(urljoin(page.url, location.strip()))


def read_host(word: str) -> Allowed:
    """An entry of the allow-list. ValueError for what is none."""
    found = _ENTRY.fullmatch(word)
    if not found:
        raise ValueError(HOST_RULE)
    try:
        place = _place(f"{found['scheme'] or 'https'}://{found['rest']}")
    except ValueError:
        raise ValueError(HOST_RULE) from None
    if found["any"] and ("." not in place.host or _is_address(place.host)):
        raise ValueError(HOST_RULE)
    return Allowed(place, bool(found["any"]), bool(found["inner"]))


def is_host(word: str) -> bool:
    """Whether a word is an entry of an allow-list."""
    try:
        read_host(word)
    except ValueError:
        return False
    return True


def allowance(place: Place, hosts: Iterable[Allowed]) -> Allowed | None:
    """The entry by which a server may be asked; of several one that allows inner addresses. None = it may not be."""
    fitting = [a for a in hosts if a.fits(place)]
    return next((a for a in fitting if a.with_inner), fitting[0] if fitting else None)


def is_wrong_url(url: str) -> bool:
    """Whether a request's URL is not well formed."""
    try:
        read_url(url)
    except ValueError:
        return True
    return False


def told(hosts: Sequence[str]) -> str:
    """The allow-list as an error shows it."""
    some = ", ".join(hosts[:10]) + (f" and {len(hosts) - 10} more" if len(hosts) > 10 else "")
    return f"hosts of --web-hosts: {some}" if hosts else "hosts of --web-hosts, which is empty: no page is fetched"


def _place(url: str) -> Place:
    parts = urlsplit(url)
    if parts.port == 0 or parts.netloc.endswith(":"):
        raise ValueError("has a port that is none")
    return Place(parts.scheme, _host(parts.hostname or ""), parts.port or _PORTS[parts.scheme])


def _host(host: str) -> str:
    """A host as it is compared: in ASCII and lower case, without the dot at its end."""
    if "%" in host:
        raise ValueError("has a host that is none")
    if _is_address(host):
        return str(ipaddress.ip_address(host))
    try:
        name = host.removesuffix(".").encode("idna").decode().lower()
    except UnicodeError:
        raise ValueError("has a host that is none") from None
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise ValueError("has a host that is none")
    return name


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
