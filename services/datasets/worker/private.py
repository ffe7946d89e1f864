"""Secrets and personal data in rows: told, never shown.

Law of this room: pure. A finding names kind, place and how often, not the text
itself. Every row passes through here, so a look at single characters comes
first: what has no digit, no "@", no "=" and no ":" can hold none of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from services.datasets.worker.found import WARNING, Problem
from services.datasets.worker.plain import Plain, texts
from services.datasets.worker.private_checks import (
    is_address,
    is_card,
    is_iban,
    is_mail,
    is_national_id,
    is_password,
    is_phone,
    is_random,
)

SECRET, PERSONAL = "secret", "personal_data"
Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing that should not be learnt."""

    name: str
    """As a redacted text tells it, in brackets."""
    rule: str
    told: str
    gates: tuple[str, ...]
    """One of these must be in a text, or there is nothing to look for."""
    pattern: re.Pattern[str]
    """Its group `it`, else the whole match, is the thing."""
    check: Callable[[str, str, int], bool] | None = None
    """Whether it is one: given the thing, the text and where it begins."""


_TOKENS = "|".join(
    (
        r"gh[pousr]_[A-Za-z0-9]{36,}",
        r"github_pat_[A-Za-z0-9_]{40,}",
        r"glpat-[A-Za-z0-9_\-]{20,}",
        r"xox[abposr]-[A-Za-z0-9-]{10,}",
        r"sk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_\-]{32,}",
        r"[rs]k_live_[A-Za-z0-9]{16,}",
        r"AIza[A-Za-z0-9_\-]{35}",
        r"hf_[A-Za-z0-9]{30,}",
        r"npm_[A-Za-z0-9]{36}",
        r"pypi-[A-Za-z0-9_\-]{50,}",
        r"SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}",
    )
)
_TOKEN_GATES = (
    "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-", "k_live_", "AIza", "hf_", "npm_",
    "pypi-", "SG.",
)  # fmt: skip
_KEYED = r"(?:api|access|secret|private|auth|account|client|encryption)[_-]?(?:key|token|secret)|secret|token"

KINDS: tuple[Kind, ...] = (
    Kind(
        "private key",
        SECRET,
        "a private key",
        ("PRIVATE KEY",),
        re.compile(
            # No step over another "-----", so that many beginnings without an end take no time.
            r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:(?:(?!-----)[A-Za-z0-9+/=\s\\:,.-]){16,}-----END [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----"
            r"|(?:\s|\\[nr]){0,4}[A-Za-z0-9+/=]{24,}(?:(?:\s|\\[nr]){1,4}[A-Za-z0-9+/=]{16,})*)"
        ),
    ),
    Kind(
        "access key",
        SECRET,
        "a cloud access key",
        ("AKIA", "ASIA"),
        re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Za-z0-9])"),
        lambda it, text, at: not it.endswith("EXAMPLE"),
    ),
    Kind("token", SECRET, "an access token", _TOKEN_GATES, re.compile(rf"(?<![A-Za-z0-9_])(?:{_TOKENS})"), is_random),
    Kind(
        "web token",
        SECRET,
        "a signed web token (JWT)",
        ("eyJ",),
        re.compile(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}"),
    ),
    Kind(
        "password",
        SECRET,
        "a password in an address",
        ("://",),
        re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s:/@\"'<>]{1,64}:(?P<it>[^\s:/@\"'<>]{3,128})@[A-Za-z0-9]"),
        is_password,
    ),
    Kind(
        "password",
        SECRET,
        "a password",
        ("assw", "ASSW", "assW", "pwd", "PWD", "Pwd"),
        re.compile(
            r"(?i)(?:password|passwd|passwort|pwd)[\"']?\s{0,3}(?:=(?!=)|:(?!:))\s{0,3}"
            r"(?:[\"'](?P<quoted>[^\s\"']{6,128})[\"']|(?P<bare>[^\s\"',;<>(){}\[\]]{6,128}))"
        ),
        is_password,
    ),
    Kind(
        "key",
        SECRET,
        "a key or token",
        ("key", "KEY", "Key", "oken", "OKEN", "ecret", "ECRET"),
        re.compile(
            rf"(?i)(?:{_KEYED})[\"']?\s{{0,3}}(?:=(?!=)|:(?!:))\s{{0,3}}(?:bearer\s+)?"
            r"[\"']?(?P<it>[A-Za-z0-9+/_\-]{20,200}={0,2})(?![A-Za-z0-9(.\[])"
        ),
        is_random,
    ),
    Kind(
        "e-mail",
        PERSONAL,
        "an e-mail address",
        ("@",),
        re.compile(
            r"(?<![\w.+%/@=-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_])?"
            r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}[A-Za-z]{2,18}(?![\w(@-]|\.\w)"
        ),
        is_mail,
    ),
    Kind(
        "card",
        PERSONAL,
        "a card number",
        (),
        re.compile(r"(?<![\w.+-])[2-6][0-9]{3}(?:[ -]?[0-9]{2,6}){2,4}(?![\w-]|\.[0-9])"),
        is_card,
    ),
    Kind(
        "IBAN",
        PERSONAL,
        "an account number (IBAN)",
        (),
        re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"),
        is_iban,
    ),
    Kind(
        "national id",
        PERSONAL,
        "a national id",
        (),
        re.compile(
            r"(?<![\w.+/-])(?:[0-9]{3}-[0-9]{2}-[0-9]{4}|[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}|[0-9]{8}-?[A-Z]"
            r"|[2-9][0-9]{3}[ -][0-9]{4}[ -][0-9]{4}|[12] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{2})"
            r"(?![\w-]|[./][0-9])"
        ),
        is_national_id,
    ),
    Kind(
        "phone",
        PERSONAL,
        "a phone number",
        (),
        re.compile(
            r"(?<![\w.+*/=-])(?:\+[1-9](?:[ .-]?\(?[0-9]{1,5}\)?){2,7}"
            r"|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}|[2-9][0-9]{2}([.-])[2-9][0-9]{2}\1[0-9]{4})"
            r"(?![\w-]|[./][0-9])"
        ),
        is_phone,
    ),
    Kind(
        "IP address",
        PERSONAL,
        "a public IP address",
        (),
        re.compile(r"(?<![\w.:/-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])"),
        is_address,
    ),
)
_NUMBERS = re.compile(
    # Seven digits near each other, as cards, ids and phones have; or four numbers with dots. One set of characters to
    # begin with, so that the search runs from digit to digit.
    rb"[0-9](?:(?:[ ().-]{0,2}[0-9]){6}|(?:[0-9]{0,2}\.[0-9]{1,3}){3})"
)
_ACCOUNT = re.compile(rb"[A-Z][A-Z][0-9]{2} ?[A-Z0-9]{4}")
_DIGITS = b"0123456789"
_FEWEST = 5
"""No number that is somebody's has fewer digits."""
_FEWEST_OF_ACCOUNT = 10


def _has_digit(t: str) -> bool:
    # Ten searches for one character each are several times faster than one pattern.
    return (
        "0" in t or "1" in t or "2" in t or "3" in t or "4" in t
        or "5" in t or "6" in t or "7" in t or "8" in t or "9" in t
    )  # fmt: skip


def is_worth_a_look(data: bytes) -> bool:
    """Whether a closer look can find anything: given texts as UTF-8. Most texts end here."""
    if b"@" in data:
        return True
    if b"=" in data or b":" in data:
        low = data.lower()
        if b"assw" in low or b"pwd" in low or b"key" in low or b"oken" in low or b"ecret" in low:
            return True
    if b"A" in data and (b"AKIA" in data or b"ASIA" in data):  # one in thirty has no digit
        return True
    digits = len(data) - len(data.translate(None, _DIGITS))
    if not digits:
        return False
    # One character first: it is found five times faster than three.
    if b"_" in data and (b"gh" in data or b"_live_" in data or b"hf_" in data or b"npm_" in data or b"github_" in data):
        return True
    if b"-" in data and (b"-----" in data or b"sk-" in data or b"glpat-" in data or b"xox" in data or b"pypi-" in data):
        return True
    if (b"A" in data and b"AIza" in data) or (b"J" in data and b"eyJ" in data):
        return True
    if b"G" in data and b"SG." in data:
        return True
    if digits < _FEWEST:
        return False
    return _NUMBERS.search(data) is not None or (digits >= _FEWEST_OF_ACCOUNT and _ACCOUNT.search(data) is not None)


def scan(example: Plain) -> list[Problem]:
    """What of a row looks like a secret or like somebody's data: one warning for each place and kind."""
    problems = []
    for place, text in texts(example):
        seen = Counter((kind.rule, kind.told) for kind, _ in found(text))
        for (rule, told), times in seen.items():
            often = "" if times == 1 else f", {times} times"
            hint = f"leave the row out, or hide it with the step redact, so that no model says it; {_AGAIN[rule]}"
            problems.append(Problem(rule, f"looks like {told}{often}", hint, place, WARNING))
    return problems


_AGAIN: Mapping[str, str] = {
    SECRET: "a secret that lay in a file is to be replaced",
    PERSONAL: "people may have to be asked",
}


def found(text: str) -> Iterator[tuple[Kind, Span]]:
    """Every secret and everybody's data in a text, in order; what lies in another is not told apart."""
    spans: list[tuple[int, int, Kind]] = []
    has_digit = _has_digit(text)
    for kind in KINDS:
        if not kind.gates and not has_digit:
            continue
        if kind.gates and not any(g in text for g in kind.gates):
            continue
        for match in kind.pattern.finditer(text):
            group = next((g for g in ("it", "quoted", "bare") if g in kind.pattern.groupindex and match[g]), 0)
            begin, end = match.span(group)
            if kind.check is None or kind.check(text[begin:end], text, begin):
                spans.append((begin, end, kind))
    spans.sort(key=lambda s: (s[0], s[2].rule != SECRET, -s[1]))
    after = 0
    for begin, end, kind in spans:
        if begin >= after:
            yield kind, (begin, end)
            after = end


def redact(text: str) -> tuple[str, int]:
    """The text with "[KIND]" in place of each secret and of somebody's data, and how many there were."""
    pieces: list[str] = []
    after = count = 0
    for kind, (begin, end) in found(text):
        pieces += (text[after:begin], f"[{kind.name}]")
        after = end
        count += 1
    return ("".join((*pieces, text[after:])), count) if count else (text, 0)
