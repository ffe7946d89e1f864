"""Whether a thing that looks like a card, an account, an address or a password is one.

Law of this room: pure. Each check is given the thing, the text around it and
where it begins. In doubt it is none: a warning that is mostly wrong is not read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

_NO_MAIL = re.compile(
    r"(?i)(?:.*\.)?(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local|domain\.com|email\.com"
    r"|company\.com|yourdomain\.com|mail\.com|png|jpe?g|gif|svg|webp|js|py|css)"
)
_NOBODY = frozenset(
    {"git", "noreply", "no-reply", "user", "username", "name", "you", "your", "email", "someone", "foo"}
)
_PLACEHOLDER = re.compile(
    r"(?i)(?:.*(?:your|example|placeholder|changeme|change_me|redacted|dummy|sample|insert|replace|todo|fixme).*"
    r"|[x*.#_\-]+|<.*|\$.*|%.*|\{.*|\[.*|(?:my|the|some|new|old|user|db|test)?[_-]?(?:password|passwd|pass|secret|token|key)\d{0,3}"
    r"|none|null|true|false|undefined|string|str|required|optional|self\..*|os\..*|process\..*|env.*|config.*|args\..*"
    r"|request\..*|input.*|get.*|options\..*|params.*)"
)
_MIN_BITS = 3.3
_IBAN_LENGTHS: Mapping[str, int] = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18,
    "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23,
    "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27,
    "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29,
    "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26,
    "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
_VERHOEFF = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_VERHOEFF_TURN = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip
_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"


def digits(it: str) -> str:
    """Its digits."""
    return "".join(c for c in it if "0" <= c <= "9")


def is_mail(it: str, text: str, at: int) -> bool:
    """An address of somebody: not one of the documentation's, nor a file's name."""
    local, _, domain = it.rpartition("@")
    return local.lower() not in _NOBODY and not _NO_MAIL.fullmatch(domain)


def is_random(it: str, text: str, at: int) -> bool:
    """Text that nobody would write: letters and digits, and no word after another."""
    if not any(c.isdigit() for c in it) or not any(c.isalpha() for c in it) or _PLACEHOLDER.fullmatch(it):
        return False
    return bits(it) >= _MIN_BITS


def bits(it: str) -> float:
    """Bits a character (Shannon), by how often each stands there."""
    return -sum(n / len(it) * math.log2(n / len(it)) for n in Counter(it).values())


def is_password(it: str, text: str, at: int) -> bool:
    """A password and no placeholder, variable or prose."""
    if _PLACEHOLDER.fullmatch(it):
        return False
    is_quoted = text[at - 1 : at] in ("'", '"')
    is_in_address = text[at - 1 : at] == ":" and text[at + len(it) : at + len(it) + 1] == "@"
    is_mixed = any(c.isdigit() for c in it) and any(c.isalpha() for c in it)
    return is_mixed or is_in_address or (is_quoted and not it.islower() and any(not c.isalnum() for c in it))


def is_card(it: str, text: str, at: int) -> bool:
    """The number of a card: a known issuer's, with a right last digit."""
    number = digits(it)
    known = (
        (number[0] == "4" and len(number) in (13, 16, 19))
        or (len(number) == 16 and (51 <= int(number[:2]) <= 55 or 2221 <= int(number[:4]) <= 2720))
        or (len(number) == 15 and number[:2] in ("34", "37"))
        or (len(number) == 16 and (number[:4] == "6011" or number[:2] in ("65", "35")))
    )
    return known and len(set(number)) > 1 and luhn(number)


def luhn(number: str) -> bool:
    """Whether the last digit is right (Luhn)."""
    total = 0
    for i, c in enumerate(reversed(number)):
        d = int(c) * (1 + i % 2)
        total += d - 9 * (d > 9)
    return total % 10 == 0


def is_iban(it: str, text: str, at: int) -> bool:
    """An account number with the length of its country and right check digits."""
    account = it.replace(" ", "")
    if _IBAN_LENGTHS.get(account[:2]) != len(account):
        return False
    turned = account[4:] + account[:4]
    return int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def is_phone(it: str, text: str, at: int) -> bool:
    """A phone number in its international or its North American writing; 555-01xx are nobody's."""
    number = digits(it)
    if number[-7:-2] == "55501":
        return False
    if it[0] != "+":
        return len(number) == 10
    return 9 <= len(number) <= 15 and it.count("(") == it.count(")")


def is_address(it: str, text: str, at: int) -> bool:
    """A public address: no private or documentation range, and no version."""
    parts = it.split(".")
    if any(len(p) > 1 and p[0] == "0" for p in parts):
        return False
    a, b, c, d = map(int, parts)
    if max(a, b, c, d) > 255 or max(a, b, c, d) < 10 or a in (0, 10, 127) or a >= 224:
        return False
    reserved = (
        (a == 192 and (b == 168 or (b, c) in ((0, 2), (0, 0))))
        or (a == 172 and 16 <= b <= 31)
        or (a == 169 and b == 254)
        or (a == 100 and 64 <= b <= 127)
        or (a == 198 and (b in (18, 19) or (b, c) == (51, 100)))
        or (a, b, c) == (203, 0, 113)
    )
    before = text[max(0, at - 24) : at].lower()
    return not reserved and not re.search(r"\b(?:version|release|ver\.?|chrome|firefox|build|v)[\s/:=]*$", before)


def is_national_id(it: str, text: str, at: int) -> bool:
    """A number of a person whose check digits, or whose parts where it has none, are right."""
    number = digits(it)
    if len(number) == 9 and it[3] == "-":  # United States
        area, group, serial = number[:3], number[3:5], number[5:]
        return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    if len(number) == 11 and it[3] == ".":  # Brazil
        return len(set(number)) > 1 and all(_cpf(number[:n]) == int(number[n]) for n in (9, 10))
    if len(number) == 8:  # Spain
        return _DNI[int(number) % 23] == it[-1]
    if len(number) == 12:  # India
        return verhoeff(number)
    if len(number) == 15:  # France
        return 1 <= int(number[3:5]) <= 12 and 97 - int(number[:13]) % 97 == int(number[13:])
    return False


def _cpf(number: str) -> int:
    rest = sum(int(c) * (len(number) + 1 - i) for i, c in enumerate(number)) % 11
    return 0 if rest < 2 else 11 - rest


def verhoeff(number: str) -> bool:
    """Whether the last digit is right (Verhoeff)."""
    check = 0
    for i, c in enumerate(reversed(number)):
        check = int(_VERHOEFF[check][int(_VERHOEFF_TURN[i % 8][int(c)])])
    return check == 0
