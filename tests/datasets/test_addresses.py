"""Which URLs may be fetched: the table of addresses, the reading of URLs, the allow-list."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.common.config import ConfigError, load
from services.datasets import web_rules
from services.datasets.addresses import INNER, PUBLIC, carried, is_open, kind_of
from services.datasets.app import Config
from services.datasets.source_checks import check_web

NEVER = (
    "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192",
    "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "192.88.99.1", "::", "fe80::1", "ff02::1", "fd00:ec2::254", "fd20:ce::254", "2001:db8::1",
    "2001::1", "3fff::1", "64:ff9b:1::1", "100::1", "::ffff:0.0.0.0", "::ffff:169.254.169.254", "::7f00:1",
    "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "5f00::1", "fec0::1", "4000::1",
)  # fmt: skip
WITHIN = (
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "::1",
    "fc00::1", "fd12:3456::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2002:c0a8:101::1",
)  # fmt: skip
OPEN = ("1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "192.0.1.1", "2606:4700::1111",
        "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808")  # fmt: skip


@pytest.mark.parametrize("address", NEVER)
def test_addresses_that_nobody_may_open(address: str) -> None:
    here = ipaddress.ip_address(address)
    assert not is_open(here) and not is_open(here, with_inner=True)


@pytest.mark.parametrize("address", WITHIN)
def test_inner_addresses_are_open_on_demand_alone(address: str) -> None:
    here = ipaddress.ip_address(address)
    assert not is_open(here) and is_open(here, with_inner=True) and kind_of(here) in INNER


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses(address: str) -> None:
    assert is_open(ipaddress.ip_address(address)) and kind_of(ipaddress.ip_address(address)) == PUBLIC


FOUR, SIX = st.ip_addresses(v=4), st.ip_addresses(v=6)


@given(st.one_of(FOUR, SIX))
def test_nothing_is_open_that_python_knows_as_closed(address) -> None:
    """Another table than ours, made by others from the same registries."""
    here = carried(address)
    if is_open(address):
        assert here.is_global and not here.is_multicast and not here.is_reserved
    if here.is_private or here.is_link_local or here.is_loopback or here.is_multicast or here.is_unspecified:
        assert not is_open(address)
    if here.is_link_local or here.is_multicast or here.is_unspecified:
        assert not is_open(address, with_inner=True)


@given(FOUR, SIX)
def test_a_cover_opens_nothing(inside: ipaddress.IPv4Address, other: ipaddress.IPv6Address) -> None:
    number = int(inside)
    rest = int(other) & ((1 << 80) - 1)
    for cover in (0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80 | rest):
        for with_inner in (False, True):
            assert is_open(ipaddress.IPv6Address(cover), with_inner) == is_open(inside, with_inner)


def test_urls_are_read_as_they_are_asked() -> None:
    page = web_rules.read_url("https://Docs.Example.org.:443/a b/ü?x=1&y=ä#part".replace(" ", "%20"))
    assert page.url == "https://docs.example.org/a%20b/%C3%BC?x=1&y=%C3%A4"
    assert page.place.authority == "docs.example.org" and page.target == "/a%20b/%C3%BC?x=1&y=%C3%A4"
    assert web_rules.read_url("http://[::1]:80/").place == web_rules.Place("http", "::1", 80)
    assert web_rules.read_url("https://bücher.example/").place.host == "xn--bcher-kva.example"
    assert web_rules.follow(page, "../c").url == "https://docs.example.org/c"


WRONG = (
    "", "example.org", "ftp://example.org/", "file:///etc/passwd", "gopher://127.0.0.1:70/", "https://", "https:///x",
    "https://user@example.org/", "https://example.org@127.0.0.1/", "https://u:p@example.org/", "https://a b.org/",
    "https://example.org\\@127.0.0.1/", "https://example.org\r\nHost: x/", "https://example.org:0/", "//example.org/",
    "https://example.org:99999/", "https://exa%6dple.org/", "https://[::1%25eth0]/", "https://[::1/", "https://a..b/",
    "https://example.org:/", "https://" + "a" * 300 + ".org/", "https://example.org/" + "a" * 2048, "https://-a.org/",
)  # fmt: skip


@pytest.mark.parametrize("url", WRONG)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError):
        web_rules.read_url(url)
    (wrong,) = check_web(datasets_pb2.WebSource(urls=[url]))
    assert wrong.field == "web.urls[0]"


def test_every_wrong_url_is_told_at_once() -> None:
    told = check_web(datasets_pb2.WebSource(urls=["x", "https://a.org/", "https://a.org/", "ftp://b"]))
    assert [v.field for v in told] == ["web.urls[0]", "web.urls[2]", "web.urls[3]"]
    assert check_web(datasets_pb2.WebSource()) and check_web(datasets_pb2.WebSource(urls=["https://a.org/"] * 101))


def allowed(url: str, *words: str) -> web_rules.Allowed | None:
    return web_rules.allowance(web_rules.read_url(url).place, [web_rules.read_host(w) for w in words])


@pytest.mark.parametrize(
    ("entry", "fits", "fits_not"),
    [
        (
            "example.org",
            "https://example.org/x",
            "http://example.org/ https://example.org:8443/ https://a.example.org/",
        ),
        ("example.org", "https://EXAMPLE.org./", "https://example.org.evil.net/ https://evilexample.org/"),
        ("*.example.org", "https://a.b.example.org/", "https://example.org/ https://evilexample.org/"),
        ("http://example.org", "http://example.org/", "https://example.org/ http://example.org:8080/"),
        ("https://example.org:8443", "https://example.org:8443/", "https://example.org/"),
        ("http://[::1]:8080+inner", "http://[0:0::1]:8080/", "http://[::1]/ http://127.0.0.1:8080/"),
        ("10.0.0.1", "https://10.0.0.1/", "https://167772161/ https://10.1/ https://0x0a000001/"),
    ],
)
def test_entries_of_the_allow_list(entry: str, fits: str, fits_not: str) -> None:
    found = allowed(fits, entry)
    assert found is not None and found.with_inner == entry.endswith("+inner")
    for url in fits_not.split():
        assert allowed(url, entry) is None, url


def test_the_allow_list_is_empty_by_default_and_its_widest_entry_counts() -> None:
    assert allowed("https://example.org/") is None
    both = allowed("https://a.example.org/", "*.example.org", "a.example.org+inner")
    assert both is not None and both.with_inner


def test_the_settings_are_checked_at_the_start() -> None:
    flags = ["--web-hosts", "docs.example.org,*.a.org,http://b.org:81+inner", "--page-seconds", "5"]
    assert load(Config, "datasets", flags, {}).web_hosts == tuple(flags[1].split(","))
    assert load(Config, "datasets", [], {}).web_hosts == ()
    for name, value in (("web-hosts", "a.org,*"), ("page-seconds", "0"), ("max-page-bytes", "0")):
        with pytest.raises(ConfigError, match=f"--{name}"):
            load(Config, "datasets", [f"--{name}", value], {})


@pytest.mark.parametrize(
    "word",
    ["", "*", "*.org", "ftp://x.org", "https://x.org/path", "a b", "x.org+outer", "*.1.2.3.4", "u@x.org", "x.org:0",
     "https://x.org+inner+inner"],
)  # fmt: skip
def test_entries_that_are_none(word: str) -> None:
    assert not web_rules.is_host(word)
