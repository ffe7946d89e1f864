"""Secrets and personal data: every kind is found where it is one, close misses are not, and none is ever shown."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.datasets.worker import glance, private
from services.datasets.worker.private import KINDS, PERSONAL, SECRET, found, redact
from services.datasets.worker.private_checks import luhn, verhoeff
from tests.datasets.kit import Door, jsonl
from tests.datasets.spooled import answered, text

# Put together from pieces, so that no scanner of code takes them for somebody's.
MIXED = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0"
PEM = "-----BEGIN {0}PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7x9\nabcDEF123==\n-----END {0}PRIVATE KEY-----"
ARE: list[tuple[str, str, str]] = [
    ("private key", "", PEM.format("RSA ")),
    ("private key", "", PEM.format("")),
    ("private key", "", PEM.format("").partition("\n-----END")[0].replace("x9\n", "x9")),
    ("access key", "set ", "AKIA" + "IOSFODNN7QWERTYZ"),
    ("access key", "no digit in it: ", "ASIA" + "QWERTYUIOPASDFGH"),
    ("token", "", "gh" + "p_" + MIXED[:36]),
    ("token", "use ", "github_" + "pat_" + MIXED + "xY"),
    ("token", "", "glpat-" + MIXED[:20]),
    ("token", "", "xoxb-" + "2147-" + MIXED[:24]),
    ("token", "", "sk-" + "proj-" + MIXED),
    ("token", "", "sk_" + "live_" + MIXED[:24]),
    ("token", "", "AIza" + MIXED[:35]),
    ("token", "", "hf_" + MIXED[:34]),
    ("token", "", "npm_" + MIXED[:36]),
    ("token", "", "pypi-" + MIXED + MIXED),
    ("token", "", "SG." + MIXED[:22] + "." + (MIXED + MIXED)[:43]),
    (
        "web token",
        "Bearer ",
        "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    ),
    ("password", "postgres://bob:", "hunter2"),
    ("password", "password = '", "S3cret!pass"),
    ("password", "PASSWD: ", "hunter22x"),
    ("password", '{"passWord": "', "Tr0ub4dor&3"),
    ("key", "api_key: ", "9f8a7b6c5d4e3f2a1b0c9d8e"),
    ("key", 'CLIENT_SECRET="', MIXED),
    ("e-mail", "mail ", "bob.smith@gmail.com"),
    ("e-mail", "", "o_k+tag@mail.uni-stadt.de"),
    ("card", "", "4111 1111 1111 1111"),
    ("card", "", "4532015112830366"),
    ("card", "", "5500-0000-0000-0004"),
    ("card", "", "378282246310005"),
    ("IBAN", "to ", "DE89 3704 0044 0532 0130 00"),
    ("IBAN", "", "GB82WEST12345698765432"),
    ("national id", "SSN ", "536-90-4399"),
    ("national id", "CPF ", "123.456.789-09"),
    ("national id", "DNI ", "12345678Z"),
    ("national id", "Aadhaar ", "2341 2341 2346"),
    ("national id", "", "2 55 08 14 168 025 38"),
    ("phone", "call ", "+49 30 901820"),
    ("phone", "", "+91 98400 12345"),
    ("phone", "", "(212) 736-5000"),
    ("phone", "", "212.736.5000"),
    ("IP address", "server ", "93.184.216.34"),
]
ARE_NOT = [
    # keys and tokens
    "-----BEGIN PUBLIC KEY-----\nMIIEpAIBAAKCAQEA7x9abcDEF123\n-----END PUBLIC KEY-----",
    "-----BEGIN PRIVATE KEY----- begins such a file",
    "AKIA" + "IOSFODNN7EXAMPLE", "AKIA" + "IOSFODNN7QWERTYZ1", "AKIA" + "iosfodnn7qwertyz",
    "ghp_short", "gh" + "p_" + "x" * 36, "sk-" + "your-" + "x" * 40, "sk-learn and sk-image", "hf_hub_download(repo)",
    "api_key = 'YOUR_API_KEY_GOES_HERE_1234'", "key = some_long_function_name_1(x)", "token: string",
    "the secret: always stay calm", "tokens = tokenizer.encode(text)", "secret_key = " + "a" * 30,
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "eyJust.kidding.not",
    # passwords
    "def f(token=None, password: str = ''):", "password = os.environ['PASS']", "password = 'changeme123'",
    "the password: please choose one", "if password == stored1:", "passwords::are::cpp1", "http://host:8080/path@x",
    # mail
    "bob@example.com", "@app.route('/x')", "A@B.dot(C)", "git@github.com:foo/bar.git", "import react@18.2.0",
    "icon@2x.png", "user@host", "noreply@github.com",
    # numbers
    "4111 1111 1111 1112", "0000 0000 0000 0000", "https://a.b/c?id=4111111111111112", "1700000000000",
    "pi is 3.14159265358979", "DE88 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130", "ISBN 978-3-16-148410-0",
    "000-12-3456", "666-12-3456", "900-12-3456", "123.456.789-00", "12345678A", "2341 2341 2347",
    "2 55 08 14 168 025 39", "550e8400-e29b-41d4-a716-446655440000", "2023-11-21 10:22:33",
    "555-0123", "phone +1 (555) 555-0123", "1 + 2 3 4 5 6 7", "1,000,000,000", "0x1234567890abcdef", "212-736-500",
    # addresses
    "192.168.0.1", "10.20.30.40", "127.0.0.1", "172.16.254.1", "203.0.113.77", "v1.2.3.4", "version 10.4.22.15",
    "release 93.184.216.34", "Chrome/91.0.4472.124", "300.184.216.34", "1.2.3.4", "10:20:30:40 section 1.2.3.4",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "before", "it"), ARE)
def test_a_thing_is_found_and_hidden_whole(kind: str, before: str, it: str) -> None:
    end = {"hunter2": "@db.host.net/x", "S3cret!pass": "'", "Tr0ub4dor&3": '"}'}.get(it, "")
    said = f"{before}{it}{end} and so on"
    ((met, span),) = found(said)
    assert met.name == kind and said[slice(*span)] == it
    hidden, count = redact(said)
    assert (hidden, count) == (f"{before}[{kind}]{end} and so on", 1)
    assert redact(hidden) == (hidden, 0)
    # The look that comes first lets it through, and the finding does not show it.
    for example in (text(said), answered("a question", said)):
        (problem,) = [p for p in glance.look(example) if p.rule in (SECRET, PERSONAL)]
        assert problem.rule == met.rule and met.told in problem.message
        assert not any(it[i : i + 6] in f"{problem.message} {problem.hint}" for i in range(len(it) - 5))


@pytest.mark.parametrize("said", ARE_NOT)
def test_a_close_miss_is_none(said: str) -> None:
    assert list(found(said)) == []
    assert redact(said) == (said, 0)
    assert [p for p in glance.look(text(said)) if p.rule in (SECRET, PERSONAL)] == []


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, _, _ in ARE} == {kind.name for kind in KINDS}
    assert {kind.rule for kind in KINDS} == {SECRET, PERSONAL}


@given(st.lists(st.sampled_from([*(f"{b}{i}" for _, b, i in ARE), *ARE_NOT, "plain words", "ünï", "\n"]), max_size=6))
@settings(max_examples=80)
def test_what_is_found_passes_the_first_look_and_what_is_hidden_stays_hidden(pieces: list[str]) -> None:
    said = " ".join(pieces)
    spans = [span for _, span in found(said)]
    assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    if spans:
        assert private.is_worth_a_look(said.encode())
    hidden, count = redact(said)
    assert count == len(spans) and redact(hidden)[1] <= count
    assert [p.rule for p in private.scan(text(said))].count(SECRET) <= count


@given(st.text(max_size=200))
@settings(max_examples=80)
def test_any_text_is_looked_at(said: str) -> None:
    if list(found(said)):
        assert private.is_worth_a_look(said.encode("utf-8", "replace"))
    if redact(said)[1] == 0:
        assert redact(said)[0] == said


@given(st.integers(0, 10**14 - 1))
@settings(max_examples=60)
def test_a_wrong_digit_is_a_wrong_number(number: int) -> None:
    for check in (luhn, verhoeff):
        right = [n for n in (f"{number}{d}" for d in range(10)) if check(n)]
        assert len(right) == 1
        (whole,) = right
        at = number % len(whole)
        other = f"{whole[:at]}{(int(whole[at]) + 1 + number % 9) % 10}{whole[at + 1 :]}"
        assert other == whole or not check(other)


PIECES = (
    "4111 ", "1.", "1 ", "a.a@", "eyJaaaaaaaaaaaa.", "+1 (2) ", "DE89 3704 ", "password= ", "x://a:", "secret: a1",
    "-----BEGIN PRIVATE KEY-----\nA", "-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7x9abcDEF",
)  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", PIECES)
def test_a_long_text_of_beginnings_ends(piece: str) -> None:
    """A pattern that begins anew at each of them takes minutes; the deadline of the test is the bound."""
    said = piece * (400_000 // len(piece))
    list(found(said))
    assert private.is_worth_a_look(said.encode()) in (True, False)


def test_places_and_numbers_are_told(door: Door) -> None:
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "write to bob.smith@gmail.com or amy.lee@gmail.com"},
            {"role": "assistant", "content": f"with {'hf_' + MIXED[:34]}"},
        ]
    }
    clean = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    made = door.make("private", jsonl([clean, row]))
    assert made.stats.rows["train"] == 2
    told = [f for f in door.findings("datasets/private") if f.rule in (SECRET, PERSONAL)]
    assert [(f.rule, f.line, f.field) for f in told] == [
        (PERSONAL, 2, "messages[0].content"),
        (SECRET, 2, "messages[1].content"),
    ]
    assert told[0].message == "looks like an e-mail address, 2 times" and "step redact" in told[0].hint
    assert all(f.severity == datasets_pb2.SEVERITY_WARNING for f in told)
    assert MIXED[:34] not in str(told) and "bob" not in str(told)
    part = {p.name: p for p in made.stats.quality.parts}["private_data"]
    assert part.score == 0 and part.told.startswith("2 findings")
