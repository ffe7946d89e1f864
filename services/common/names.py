"""Resource names, digests, page tokens: what is well formed.

Law of this room: pure. A name that passes here is safe as one path component;
nothing else may become a path.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from services.common.errors import Violation, invalid, show

ALIAS: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
ALIAS_RULE: Final = "1 to 63 of [a-z0-9._-], begun and ended by a letter or digit, without '..'; not 'base'"
JOB: Final = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
JOB_RULE: Final = "1 to 63 of [a-z0-9-], begun by a letter, ended by a letter or digit"
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
DIGEST_PREFIX: Final = re.compile(r"sha256:[0-9a-f]{8,64}")
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
REQUEST_ID_RULE: Final = "1 to 128 of [A-Za-z0-9._:-]"
_RESERVED: Final = frozenset({"base"})


def is_alias(text: str) -> bool:
    """Whether the text may be an alias."""
    return bool(ALIAS.fullmatch(text)) and ".." not in text and text not in _RESERVED


def is_digest(text: str) -> bool:
    """Whether the text is a whole digest."""
    return bool(DIGEST.fullmatch(text))


def is_digest_prefix(text: str) -> bool:
    """Whether the text is a digest or a usable beginning of one."""
    return bool(DIGEST_PREFIX.fullmatch(text))


def hex_of(digest: str) -> str:
    """The hex part of a digest."""
    return digest.removeprefix("sha256:")


def short(digest: str) -> str:
    """A digest as people read it."""
    return digest[: len("sha256:") + 12]


def check_id(field: str, value: str, pattern: re.Pattern[str] = ALIAS, rule: str = ALIAS_RULE) -> list[Violation]:
    """Violations of an id that a caller chose; none if it is fine."""
    ok = is_alias(value) if pattern is ALIAS else bool(pattern.fullmatch(value))
    return [] if ok else [Violation(field, show(value), rule)]


def check_request_id(value: str) -> list[Violation]:
    """Violations of a request_id."""
    return [] if REQUEST_ID.fullmatch(value) else [Violation("request_id", show(value), REQUEST_ID_RULE)]


def check_name(field: str, value: str, collection: str) -> list[Violation]:
    """Violations of "collection/{alias or digest}"."""
    rest = value.removeprefix(collection + "/")
    if rest != value and (is_alias(rest) or is_digest_prefix(rest)):
        return []
    return [Violation(field, show(value), f"'{collection}/ID' or '{collection}/sha256:HEX'")]


def parse(field: str, value: str, collection: str) -> str:
    """The id inside "collection/{id}", or INVALID_ARGUMENT."""
    wrong = check_name(field, value, collection)
    if wrong:
        raise invalid(wrong)
    return value.removeprefix(collection + "/")


def parse_job(field: str, value: str) -> str:
    """The id inside "jobs/{id}", or INVALID_ARGUMENT."""
    rest = value.removeprefix("jobs/")
    if rest == value or not JOB.fullmatch(rest):
        raise invalid([Violation(field, show(value), "'jobs/ID'")])
    return rest


def page_token(position: str) -> str:
    """An opaque token for a position in a list."""
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=") if position else ""


def page_position(token: str) -> str:
    """The position inside a token, or INVALID_ARGUMENT."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise invalid([Violation("page_token", show(token), "the next_page_token of the page before")]) from None


def page_size(value: int) -> int:
    """The size of a page, or INVALID_ARGUMENT."""
    if not 0 <= value <= 1000:
        raise invalid([Violation("page_size", show(value), "0 (= 100) to 1000")])
    return value or 100
