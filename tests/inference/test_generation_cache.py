"""Kept answers: the same question alone finds them, and their bytes are bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import inference_pb2 as pb
from services.common import generation
from services.common.frames.v1 import engine_pb2
from services.inference.generation_cache import GenerationCache, Kept, Recorder, key_of
from tests.inference.kit import turn

FP32, BF16 = pb.PRECISION_FP32, pb.PRECISION_BF16


def submit(seed: int = 1, **told: Any) -> engine_pb2.EngineSubmit:
    how = told.pop("options", {})
    options = generation.resolved(pb.GenerationOptions(**how), generation.house(seed))
    return engine_pb2.EngineSubmit(**({"prompt": "x"} | told), options=options)


def test_what_the_answer_depends_on_is_in_the_key_and_nothing_else() -> None:
    def key(model: str = "sha256:m", precision: pb.Precision.ValueType = FP32, **told: Any) -> bytes | None:
        return key_of(submit(**told), model, precision)

    same = key()
    assert same == key(seed=99) == key(priority=3) == key(who="ada"), "greedy draws nothing; turns change nothing"
    others = [
        key("sha256:n"), key(precision=BF16), key(prompt="y"), key(adapter_digest="sha256:a"),
        key(options={"max_tokens": 5}), key(options={"stop": ["a"]}), key(options={"stop": ["a", "b"]}),
        key(options={"ignore_end": True}), key(options={"repetition_penalty": 1.1}),
        key(options={"presence_penalty": 1.0}), key(options={"frequency_penalty": 1.0}),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)
    talk = submit()
    talk.conversation.messages.add().CopyFrom(turn(2, "x"))
    assert key_of(talk, "sha256:m", FP32) not in (same, None)
    for how in ({"temperature": 0.1}, {"log_probabilities": 0}, {"log_probabilities": 3}):
        assert key(options=how) is None, "what draws, or tells more than text, is not kept"


def kept(text: str) -> Kept:
    return Kept(3, text, tuple(range(len(text))), pb.FINISH_REASON_END)


@given(
    st.integers(0, 3000),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 120)), max_size=80),
)
@settings(max_examples=80)
def test_it_is_a_map_that_forgets_the_oldest_and_never_errs(limit: int, steps: list[tuple[bool, int, int]]) -> None:
    cache, told = GenerationCache(limit), {}
    order: list[bytes] = []
    for put, number, length in steps:
        key = bytes([number])
        if put:
            answer = kept("x" * length)
            cache.put(key, answer)
            if answer.size <= limit:
                told[key] = answer
                order = [k for k in order if k != key] + [key]
                while sum(told[k].size for k in order) > limit:
                    order.pop(0)
        else:
            found = cache.get(key)
            assert found == (told[key] if key in order else None)
            if found is not None:
                order = [k for k in order if k != key] + [key]
        assert cache.bytes == sum(told[k].size for k in order) <= limit
        assert len(cache) == len(order)
    assert cache.get(None) is None and not GenerationCache(0).on
    cache.put(None, kept("x"))
    assert len(cache) == len(order)


@given(st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(0, 1 << 20), max_size=4)), max_size=12))
@settings(max_examples=40)
def test_a_recorder_loses_nothing(pieces: list[tuple[str, list[int]]]) -> None:
    recorder = Recorder()
    for text, ids in pieces:
        recorder.add(text, ids)
    whole = recorder.whole(7, pb.FINISH_REASON_STOP)
    assert whole.text == "".join(text for text, _ in pieces)
    assert whole.ids == tuple(i for _, ids in pieces for i in ids)
    assert (whole.prompt_tokens, whole.reason) == (7, pb.FINISH_REASON_STOP)


def test_what_was_asked_for_longest_ago_makes_room() -> None:
    cache = GenerationCache(2 * kept("x").size)
    for name in (b"a", b"b"):
        cache.put(name, kept("x"))
    assert cache.get(b"a") is not None
    cache.put(b"c", kept("x"))
    assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.get(b"c") is not None
