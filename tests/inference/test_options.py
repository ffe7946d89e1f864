"""How tokens are chosen: bounds, and who is heard: request, preset, adapter, house."""

from __future__ import annotations

import math

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import artifacts_pb2, inference_pb2
from services.common import facts, generation
from services.common.errors import Fault, corrupt
from services.common.generation import Options

BOUNDS = {
    "temperature": (0.0, 2.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, 2.0, True),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
}
sound = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 512),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(0, 100),
        "seed": st.integers(0, (1 << 64) - 1),
        "stop": st.lists(st.text("abc", min_size=1, max_size=64), min_size=1, max_size=8),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 2, exclude_min=True),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "log_probabilities": st.integers(0, 20),
        "ignore_end": st.just(True),
    },
).map(lambda told: Options(**told))


@pytest.mark.parametrize("field", BOUNDS)
def test_each_number_has_its_bounds_and_none_is_no_number(field: str) -> None:
    low, high, above = BOUNDS[field]
    for good in (high, (low + high) / 2, math.nextafter(low, high), *([] if above else [low])):
        assert generation.check(Options(**{field: good})) == [], good
    for bad in (math.nextafter(high, 9), math.nextafter(low, -9), math.nan, math.inf, -math.inf, *([low] * above)):
        assert [v.field for v in generation.check(Options(**{field: bad}))] == [f"options.{field}"], bad


def test_counts_and_stops_have_bounds_and_all_is_told_at_once() -> None:
    wrong = Options(max_tokens=513, log_probabilities=21, stop=["", "x" * 65, *"abcdefg"], temperature=3)
    told = generation.check(wrong, 512, "items[3].options")
    assert [v.field.removeprefix("items[3].options.") for v in told] == [
        "max_tokens", "temperature", "log_probabilities", "stop", "stop[0]", "stop[1]",
    ]  # fmt: skip
    assert told[0].accepted == "1 to 512 (the context)"
    assert generation.check(Options(max_tokens=513)) == [], "where the context is not known, it bounds nothing"
    assert generation.check(Options(max_tokens=0))


@given(sound)
@settings(max_examples=50)
def test_what_is_sound_passes_and_outlives_a_manifest(options: Options) -> None:
    assert generation.check(options, 512) == []
    told = facts.AdapterFacts(1, 1.0, (), 1, (), generation=generation.to_plain(options))
    manifest = artifacts_pb2.Manifest(digest="sha256:x")
    manifest.facts.update(facts.to_facts(told))
    known = facts.from_manifest(facts.AdapterFacts, artifacts_pb2.Manifest.FromString(manifest.SerializeToString()))
    assert generation.from_plain(known.generation, lambda why: corrupt("x", why)) == options


def test_options_of_a_manifest_that_are_wrong_are_never_taken() -> None:
    for told in ({"temperature": 9}, {"temperature": "hot"}, {"stop": [""]}):
        with pytest.raises(Fault, match="generation options"):
            generation.from_plain(told, lambda why: corrupt("adapters/x", why))
    assert generation.from_plain({"temperature": 1, "of_later": 3}, lambda why: corrupt("x", why)).temperature == 1


@given(st.lists(sound, min_size=1, max_size=4))
@settings(max_examples=80)
def test_the_first_who_says_something_is_heard_field_by_field(sayings: list[Options]) -> None:
    answer = generation.resolved(*sayings, generation.house(7))
    plain = [json_format.MessageToDict(s, preserving_proto_field_name=True) for s in (*sayings, generation.house(7))]
    expected: dict = {}
    for told in reversed(plain):
        expected.update(told)
    assert json_format.MessageToDict(answer, preserving_proto_field_name=True) == expected
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty"):
        assert answer.HasField(field), "every field is filled"


def test_zero_is_said_and_a_list_is_taken_whole() -> None:
    request = Options(temperature=0.0, stop=["a"])
    adapter = Options(temperature=0.8, stop=["b", "c"], seed=0)
    answer = generation.resolved(request, adapter, generation.house(5))
    assert answer.HasField("temperature") and answer.temperature == 0.0
    assert list(answer.stop) == ["a"] and answer.seed == 0
    assert not answer.HasField("log_probabilities"), "none are told unless someone asks"


def test_the_house_says_what_the_contract_says() -> None:
    house = generation.house(3)
    assert (house.max_tokens, house.temperature, house.top_p, house.top_k) == (128, 0.0, 1.0, 0)
    assert (house.repetition_penalty, house.presence_penalty, house.frequency_penalty) == (1.0, 0.0, 0.0)
    assert house.min_p == 0.0 and house.seed == 3 and not house.ignore_end and not house.stop


def test_what_is_inherited_bends_to_the_context() -> None:
    assert generation.within(Options(max_tokens=900), 512).max_tokens == 512
    assert not generation.within(Options(), 512).HasField("max_tokens")
    assert generation.within(Options(max_tokens=900), 0).max_tokens == 900
    assert inference_pb2.GenerationOptions is Options
