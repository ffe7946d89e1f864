"""Which addresses a page may be fetched from.

Law of this room: pure. A network that is not named here as open to all, or as
inner and allowed, is refused: what nobody thought of is refused too. An IPv6
address that carries an IPv4 address is judged by that one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TypeAlias

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"

PUBLIC = "public"
INNER = ("loopback", "private", "unique-local", "shared")
"""Kinds that an entry of the allow-list may open; all others but PUBLIC are never fetched from."""

# The first network that holds the address tells its kind. After the registries of special-purpose
# addresses at IANA, and the addresses at which clouds tell secrets to their machines.
_V4: Mapping[str, str] = {
    "100.100.100.200/32": "metadata",
    "168.63.129.16/32": "metadata",
    "169.254.0.0/16": "link-local",
    "192.0.0.0/24": "reserved",
    "0.0.0.0/8": "unspecified",
    "127.0.0.0/8": "loopback",
    "10.0.0.0/8": "private",
    "172.16.0.0/12": "private",
    "192.168.0.0/16": "private",
    "100.64.0.0/10": "shared",
    "192.0.2.0/24": "reserved",
    "192.88.99.0/24": "reserved",
    "198.18.0.0/15": "reserved",
    "198.51.100.0/24": "reserved",
    "203.0.113.0/24": "reserved",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "0.0.0.0/0": PUBLIC,
}
_V6: Mapping[str, str] = {
    "::/128": "unspecified",
    "::1/128": "loopback",
    "fd00:ec2::/32": "metadata",
    "fd20:ce::254/128": "metadata",
    "fc00::/7": "unique-local",
    "fe80::/10": "link-local",
    "ff00::/8": "multicast",
    "2001::/23": "reserved",
    "2001:db8::/32": "reserved",
    "3fff::/20": "reserved",
    "2000::/3": PUBLIC,
    "::/0": "reserved",
}
_NETWORKS: Mapping[int, tuple[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, str], ...]] = {
    4: tuple((ipaddress.IPv4Network(network), kind) for network, kind in _V4.items()),
    6: tuple((ipaddress.IPv6Network(network), kind) for network, kind in _V6.items()),
}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")


def carried(address: Address) -> Address:
    """The IPv4 address that an IPv6 address is a cover of; else itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _MAPPED or address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address in _SIX_TO_FOUR:
            return ipaddress.IPv4Address((int(address) >> 80) & 0xFFFFFFFF)
    return address


def kind_of(address: Address) -> str:
    """What sort of address it is: PUBLIC, one of INNER, or one that is never fetched from."""
    inner = carried(address)
    return next(kind for network, kind in _NETWORKS[inner.version] if inner in network)


def is_open(address: Address, with_inner: bool = False) -> bool:
    """Whether a page may be fetched from an address; inner ones only where that was allowed."""
    kind = kind_of(address)
    return kind == PUBLIC or (with_inner and kind in INNER)
