"""Repairs: each does what its name says, only where it was named, once, and is told."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.datasets import repairs
from services.datasets.forms import CHAT, COMPLETION
from services.datasets.repairs import REPAIRS
from services.datasets.worker import characters, glance, rules
from services.datasets.worker.found import ERROR, Problem
from services.datasets.worker.plain import Plain, text_of
from services.datasets.worker.repairs import Repairs
from tests.datasets.kit import Door, refusal
from tests.datasets.spooled import text

INFO = datasets_pb2.SEVERITY_INFO
NAMED = {"u": "ROLE_USER", "a": "ROLE_ASSISTANT", "s": "ROLE_SYSTEM", "t": "ROLE_TOOL"}


def chat(*turns: tuple[str, str]) -> Plain:
    messages: list[Plain] = [{"role": NAMED[r], **({"parts": [{"text": t}]} if t else {})} for r, t in turns]
    return {"chat": {"messages": messages}}


def turns(example: Plain) -> list[tuple[str, str]]:
    of = {role: name for name, role in NAMED.items()}
    return [(of[m["role"]], text_of(m)) for m in example["chat"]["messages"]]


def mended(example: Plain, *names: str) -> tuple[Plain, list[str]]:
    """The example after the repairs, and those that say they did something."""
    made, problems = Repairs(names).mend(example, [])
    assert all(p.rule == "repaired" and p.severity == INFO for p in problems)
    return made, [p.message.partition(":")[0] for p in problems]


TEXTS = [
    (repairs.LINE_ENDS, "a\r\nb\rc", "a\nb\nc"),
    (repairs.BYTE_ORDER_MARKS, "\ufeffa\ufeffb", "ab"),
    (repairs.CONTROL_CHARACTERS, "be\x07ll\x1b[0m\ttab\nline\x9f", "bell[0m\ttab\nline"),
    (repairs.MOJIBAKE, "cafÃ© and Itâ€™s", "café and It’s"),
    (repairs.MOJIBAKE, "தமிழ்".encode().decode("latin-1"), "தமிழ்"),
    (repairs.MOJIBAKE, "ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
    (repairs.MOJIBAKE, "ðŸ˜€ hi", "😀 hi"),
    (repairs.MOJIBAKE, "twice ÃƒÂ©", "twice é"),
]
SOUND = [
    "naïve café…» “ok” Spaß“", "CAFÉ” MANHÃ”", "5 °C", "Ã", "déjà»", "ok €“x”", "tab\tline\n", "தமிழ் 你好 😀", "\u200dé"
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoiled", "sound"), TEXTS)
def test_a_text_is_mended_only_where_that_was_named(name: str, spoiled: str, sound: str) -> None:
    for example, right in (
        (text(spoiled), text(sound)),
        (chat(("u", "ask"), ("a", spoiled)), chat(("u", "ask"), ("a", sound))),
        ({"infill": {"middle": spoiled}}, {"infill": {"middle": sound}}),
    ):
        example["metadata"] = right["metadata"] = {"as it came": spoiled}
        before = copy.deepcopy(example)
        assert mended(example, name) == (right, [name])
        assert example == before, "the row that was given is not touched"
        assert mended(right, name) == (right, [])
        others = [n for n in REPAIRS if n != name]
        assert mended(example, *others) == (example, [])
        assert [p.repair for p in glance.look(example)] == [name] and glance.look(right) == []


@pytest.mark.parametrize("said", SOUND)
def test_a_sound_text_is_left_alone(said: str) -> None:
    assert mended(text(said), "all") == (text(said), [])
    assert glance.look(text(said)) == []


@given(
    st.text(st.sampled_from("aÃ©â€\x07\r\n\x8d\x9d\ufeffï»¿ð"), max_size=10),
    st.sets(st.sampled_from([*REPAIRS, "all"])),
)
@settings(max_examples=150)
def test_repairs_together_find_nothing_a_second_time(said: str, names: set[str]) -> None:
    for row in (text(said), chat(("u", "q"), ("a", said or "x"))):
        once, done = mended(row, *names)
        assert mended(once, *names) == (once, []) and len(done) == len(set(done))


def test_what_one_repair_brings_to_light_another_mends_and_each_is_told_once() -> None:
    made, done = mended(text("cafÃ© and Ã\x07©"), "all")
    assert made == text("café and é") and done == [repairs.MOJIBAKE, repairs.CONTROL_CHARACTERS]


def test_what_is_no_control_character_but_half_of_another_stays() -> None:
    spoiled = "தமிழ்".encode().decode("latin-1")
    assert "\x8d" in spoiled
    assert mended(text(spoiled), repairs.CONTROL_CHARACTERS) == (text(spoiled), [])
    assert mended(text(f"\x07{spoiled}\x8d"), "all") == (text("தமிழ்"), [repairs.MOJIBAKE, repairs.CONTROL_CHARACTERS])


@given(st.text(st.sampled_from("aéÃ©â€™ðŸ˜€ÂÐŸ\r\n\t\x07\x85\ufeff \ufffd”…“MÉ"), max_size=12))
@settings(max_examples=150)
def test_what_mends_a_text_finds_nothing_a_second_time(said: str) -> None:
    for name, mend in characters.TEXT_REPAIRS.items():
        once = mend(said)
        assert mend(once) == once, name
        found = [p.repair for p in characters.scan(text(said)) if p.repair]
        if name in found:
            assert once != said
    if characters.scan(text(said)):
        assert glance.look(text(said))


TURNS = [
    (repairs.BLANKS, [("u", " \nhi "), ("a", "a b\n")], [("u", "hi"), ("a", "a b")]),
    (repairs.EMPTY_TURNS, [("u", "q"), ("a", "x"), ("u", ""), ("a", "")], [("u", "q"), ("a", "x")]),
    (repairs.JOIN_TURNS, [("u", "one"), ("u", "two"), ("a", "x"), ("a", "y")], [("u", "one\n\ntwo"), ("a", "x\n\ny")]),
    (repairs.TRAILING_TURN, [("u", "q"), ("a", "x"), ("u", "more")], [("u", "q"), ("a", "x")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoiled", "sound"), TURNS)
def test_turns_are_mended_only_where_that_was_named(
    name: str, spoiled: list[tuple[str, str]], sound: list[tuple[str, str]]
) -> None:
    made, done = mended(chat(*spoiled), name)
    assert (turns(made), done) == (sound, [name])
    assert mended(made, name) == (made, []) and mended(made, "all") == (made, [])
    assert mended(chat(*spoiled), *(n for n in REPAIRS if n != name)) == (chat(*spoiled), [])
    problems = [*rules.check(chat(*spoiled), CHAT), *glance.look(chat(*spoiled))]
    assert name in {p.repair for p in problems}
    assert not [p for p in [*rules.check(made, CHAT), *glance.look(made)] if p.repair]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (repairs.BLANKS, [("u", "q"), ("a", " \n ")]),  # a turn of blanks alone would be empty
        (repairs.EMPTY_TURNS, [("u", "q"), ("a", ""), ("u", "r"), ("a", "x")]),  # two of the user would follow
        (repairs.TRAILING_TURN, [("u", "only a question")]),  # nothing would be left to learn
        (repairs.JOIN_TURNS, [("s", "one"), ("s", "two"), ("u", "q"), ("a", "x")]),  # which of them holds?
    ],
)  # fmt: skip
def test_what_is_not_safe_is_not_done(name: str, left: list[tuple[str, str]]) -> None:
    assert mended(chat(*left), name) == (chat(*left), [])


def test_empty_turns_go_where_joining_puts_the_rest_in_order() -> None:
    row = chat(("u", "q"), ("a", ""), ("u", "r"), ("a", "x"))
    made, done = mended(row, repairs.EMPTY_TURNS, repairs.JOIN_TURNS)
    assert turns(made) == [("u", "q\n\nr"), ("a", "x")] and done == [repairs.EMPTY_TURNS, repairs.JOIN_TURNS]


def test_turns_with_calls_or_metadata_of_their_own_stay() -> None:
    call = {"role": "ROLE_ASSISTANT", "tool_calls": [{"id": "1", "name": "f", "arguments_json": "{}"}]}
    asked = {"role": "ROLE_USER", "parts": [{"text": "q"}]}
    with_call = {"chat": {"messages": [asked, call, call]}}
    assert mended(with_call, "all") == (with_call, [])
    row = {**chat(("u", "one"), ("u", "two"), ("a", "x")), "metadata": {"messages[1].weight": 1}}
    assert mended(row, "all") == (row, [])


def test_a_row_with_errors_is_void_and_stays_as_it_is() -> None:
    row, wrong = chat(("u", " q "), ("a", "x")), Problem("role_order", "told", "hint")
    assert wrong.severity == ERROR
    assert Repairs(["all"]).mend(row, [wrong]) == (row, [wrong])


@pytest.mark.parametrize(
    ("name", "rule", "value", "right"),
    [
        (repairs.NUL_CHARACTERS, "nul_character", {"text": "a\0b", "n": [1, "\0"]}, {"text": "ab", "n": [1, ""]}),
        (repairs.LONE_SURROGATES, "lone_surrogate", {"text": "a\ud800b"}, {"text": "ab"}),
    ],
)
def test_a_spoiled_value_is_mended_only_where_that_was_named(
    name: str, rule: str, value: Any, right: dict[str, Any]
) -> None:
    problem = Problem(rule, "told", "hint", repair=name)
    asked = Repairs([name])
    assert asked.mend_value(value, problem) == right
    asked.mend(text("x"), [])
    assert asked.applied == {name: 1}
    assert Repairs([n for n in REPAIRS if n != name]).mend_value(value, problem) is None
    both = {"text": "a\0b\ud800"}
    assert Repairs([name]).mend_value(both, problem) is None, "the other fault is still there"
    assert Repairs(["all"]).mend_value(both, problem) == {"text": "ab"}
    assert Repairs(["all"]).mend_value({"a": "1", "a\0": "2"}, problem) is None, "two keys would become one"
    assert Repairs(["all"]).mend_value(["a\0"], problem) is None


def test_role_names_are_read_only_where_that_was_named() -> None:
    row = {"messages": [{"role": " Human ", "content": "q"}, {"role": "gpt", "content": "x"}], "other": 1}
    right = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], "other": 1}
    asked = Repairs([repairs.ROLE_NAMES])
    assert asked.mend_row(row, CHAT, {}) == right and asked.mend_row(right, CHAT, {}) == right
    assert asked.mend_row(row, COMPLETION, {}) is row
    assert Repairs([n for n in REPAIRS if n != repairs.ROLE_NAMES]).mend_row(row, CHAT, {}) is row
    in_column = {"talk": json.dumps(row["messages"])}
    assert asked.mend_row(in_column, CHAT, {"messages": "talk"}) == {"talk": right["messages"]}
    odd = {"messages": [{"role": "narrator", "content": "q"}, "no message"]}
    assert asked.mend_row(odd, CHAT, {}) == odd


def talk(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in messages]}


SPOILED: dict[str, dict[str, Any]] = {
    repairs.NUL_CHARACTERS: talk(("user", "1 nul\0"), ("assistant", "x")),
    repairs.LONE_SURROGATES: talk(("user", "2 ha\ud83dlf"), ("assistant", "x")),
    repairs.ROLE_NAMES: talk(("human", "3 role"), ("gpt", "x")),
    repairs.LINE_ENDS: talk(("user", "4 line\r\nend"), ("assistant", "x")),
    repairs.BYTE_ORDER_MARKS: talk(("user", "5 \ufeffmark"), ("assistant", "x")),
    repairs.CONTROL_CHARACTERS: talk(("user", "6 bell\x07"), ("assistant", "x")),
    repairs.MOJIBAKE: talk(("user", "7 cafÃ©"), ("assistant", "x")),
    repairs.BLANKS: talk(("user", "8 blank "), ("assistant", "x")),
    repairs.EMPTY_TURNS: talk(("user", "9 q"), ("assistant", "x"), ("user", ""), ("assistant", "")),
    repairs.JOIN_TURNS: talk(("user", "10 one"), ("user", "two"), ("assistant", "x")),
    repairs.TRAILING_TURN: talk(("user", "11 q"), ("assistant", "x"), ("user", "more")),
}
LINES = "".join(json.dumps(row) + "\n" for row in SPOILED.values()).encode()


def test_all_repairs_through_the_door(door: Door) -> None:
    assert set(SPOILED) == set(REPAIRS)
    refused = refusal(lambda: door.make("unrepaired", LINES))
    # An error tells the repair that mends it, as what is none does.
    for name in (repairs.NUL_CHARACTERS, repairs.LONE_SURROGATES, repairs.ROLE_NAMES, repairs.JOIN_TURNS):
        assert any(f"the repair {name} does it" in accepted for _, accepted in refused.violations), name
    made = door.make("repaired", LINES, repairs=["all"])
    assert made.stats.repaired == dict.fromkeys(REPAIRS, 1)
    assert made.stats.rows["train"] == len(REPAIRS) and made.stats.skipped_rows == 0
    told = [f for f in door.findings("datasets/repaired") if f.rule == "repaired"]
    assert [(f.line, f.message.partition(":")[0]) for f in told] == list(enumerate(SPOILED, 1))
    assert list(made.lineage.repairs) == sorted(REPAIRS)
    rows = door.export("datasets/repaired", datasets_pb2.ROW_FORMAT_CHAT)
    said = [[m["content"] for m in row["messages"]] for row in rows]
    assert said[3][0] == "4 line\nend" and said[9] == ["10 one\n\ntwo", "x"] and said[10] == ["11 q", "x"]


def test_one_repair_through_the_door_leaves_the_others_undone(door: Door) -> None:
    skip = datasets_pb2.ON_ROW_ERROR_SKIP
    made = door.make("repaired-one", LINES, repairs=[repairs.BLANKS], on_row_error=skip)
    assert made.stats.repaired == {repairs.BLANKS: 1}
    assert made.stats.skipped_rows == 5 and made.stats.findings["carriage_return"] == 1
    wrong = refusal(lambda: door.make("repaired-x", LINES, repairs=["blank"]))
    assert wrong.fields == ["repairs[0]"] and "join_turns" in wrong.violations[0][1]
