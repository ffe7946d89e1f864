"""What a key may take: the file, the buckets, the places; with a clock of our own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import pathlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.common import caller, config
from services.common.errors import Fault, Reason, to_status
from services.common.interceptors import Door, Tokens
from services.inference import limits
from services.inference.admission import Admission
from services.inference.app import Config
from services.inference.limits import Bucket, Limit, Limits, Meter
from services.inference.places import Places


def test_every_fault_of_the_file_is_told_at_once() -> None:
    tree = yaml.safe_load("""
    ada: {requests_per_minute: 0, tokens_per_minute: many, wishes: 3}
    bbo: {max_in_flight: 2}
    "*": 7
    """)
    _, faults = limits.read(tree, ["ada", "bob"])
    assert len(faults) == 5
    for words in ("ada.requests_per_minute: got 0", "ada.tokens_per_minute: got 'many'", "ada.wishes: no such limit",
                  "bbo: no token has this name; did you mean 'bob'?", "*: got 7"):  # fmt: skip
        assert any(words in fault for fault in faults), words
    assert limits.read(["a"], [])[1]
    sound, none = limits.read({"*": {"max_in_flight": 2}, "ada": {"tokens_per_minute": 5}}, ["ada"])
    assert not none
    assert sound.of("bob") == sound.of("") == Limit(max_in_flight=2)
    assert sound.of("ada") == Limit(tokens_per_minute=5), "a key's own bounds stand instead of those of all others"
    assert Limits().of("ada") == Limit()


def test_the_highest_priority_of_a_key_is_0_unless_it_is_said() -> None:
    assert (Limits().highest(""), Limits().highest("ada")) == (10, 0)
    told, none = limits.read({"*": {"max_priority": 4}, "ada": {"max_priority": 10}, "bob": {}}, ["ada", "bob"])
    assert not none
    assert [told.highest(name) for name in ("", "cy", "ada", "bob")] == [4, 4, 10, 0]
    for wrong in (11, -1, 1.5, True, "high"):
        assert limits.read({"*": {"max_priority": wrong}}, [])[1][0].endswith("accepted: 0 to 10")


def test_a_daemon_with_a_wrong_file_does_not_start(tmp_path: pathlib.Path) -> None:
    tokens, file = tmp_path / "tokens", tmp_path / "limits.yaml"
    tokens.write_text("0" * 64 + " ada\n")

    def faults(text: str, *flags: str) -> tuple[str, ...]:
        file.write_text(text)
        words = ["--home", str(tmp_path), "--limits-file", str(file), *flags]
        try:
            config.load(Config, "inference", words, {})
        except config.ConfigError as e:
            return e.faults
        return ()

    assert len(faults("ada: {requests: 3}\nbob: {}\n", "--tokens-file", str(tokens))) == 2
    assert faults("ada: {max_in_flight: 3}", "--tokens-file", str(tokens)) == ()
    assert "no token has this name" in faults("ada: {max_in_flight: 3}")[0]
    assert "is not YAML" in faults("{")[0]
    assert "cannot be read" in faults("", "--limits-file", str(tmp_path / "none"))[0]


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60))
@settings(max_examples=60)
def test_no_stretch_of_time_gives_more_than_its_share(rate: int, asks: list[tuple[float, int]]) -> None:
    bucket, now, taken = Bucket(rate, 100.0), 100.0, 0
    for pause, need in asks:
        now += pause
        wait = bucket.wait(now, need)
        assert wait >= 0
        if not wait:
            bucket.take(now, need)
            taken += need
        else:
            assert not bucket.wait(now + wait + 1e-6, need), "what was told to wait for is there then"
            now += wait + 1e-6
    # More than a minute's worth at a time is lent, once.
    assert taken <= rate + (now - 100.0) * rate / 60.0 + 50 + 1e-6


def refused(meter: Meter, name: str, now: float, requests: int = 1) -> Fault:
    with pytest.raises(Fault) as caught:
        meter.begin(name, requests, requests, now)
    assert Reason.Name(caught.value.reason) == "REASON_RATE_LIMITED"
    assert caught.value.retry_seconds > 0
    return caught.value


def test_each_bound_is_named_and_says_when_to_come_again() -> None:
    meter = Meter(Limits({"*": Limit(requests_per_minute=2, tokens_per_minute=100, max_in_flight=2)}))
    assert meter.begin("ada", 1, 1, 0.0) == 1
    assert meter.begin("ada", 1, 1, 0.0) == 1
    assert refused(meter, "ada", 0.0).metadata == {"limit": "max_in_flight"}
    meter.end("ada", 2)
    spent = refused(meter, "ada", 0.0)
    assert spent.metadata == {"limit": "requests_per_minute"} and spent.retry_seconds == pytest.approx(30.0)
    assert meter.begin("bob", 1, 1, 0.0) == 1, "another key has bounds of its own"
    meter.took("ada", 150, 0.0)
    assert meter.begin("bob", 1, 1, 0.0) == 1
    owed = refused(meter, "ada", 30.0)
    assert owed.metadata == {"limit": "tokens_per_minute"}
    assert owed.retry_seconds == pytest.approx(0.6, abs=0.1), "50 are owed; 50 came in half a minute; 1 is needed"
    assert meter.begin("ada", 1, 1, 30.0 + owed.retry_seconds + 0.001) == 1
    status = to_status(owed)
    assert status.code == 8 and "ada" in status.message


def test_a_batch_is_as_wide_as_its_key_may_be_and_pays_for_each_prompt() -> None:
    meter = Meter(Limits({"ada": Limit(requests_per_minute=10, max_in_flight=3)}))
    assert meter.begin("ada", 8, 8, 0.0) == 3
    assert refused(meter, "ada", 0.0).metadata == {"limit": "max_in_flight"}
    meter.end("ada", 3)
    assert meter.in_flight("ada") == 0
    assert refused(meter, "ada", 0.0, 8).metadata == {"limit": "requests_per_minute"}
    assert meter.begin("bob", 256, 16, 0.0) == 16, "no bounds, no bounds"
    meter = Meter(Limits({"ada": Limit(requests_per_minute=10)}))
    assert meter.begin("ada", 256, 16, 0.0) == 16, "a full bucket lets even a large batch in, which is then owed"
    assert refused(meter, "ada", 60.0).retry_seconds > 60.0 * 23


def test_what_is_refused_takes_nothing() -> None:
    meter = Meter(Limits({"*": Limit(requests_per_minute=1)}))
    places = Places(2)
    admission = Admission(places, meter, 4)
    with admission.enter() as entry:
        assert (entry.who, entry.width, places.taken) == ("", 1, 1)
        with pytest.raises(Fault) as limited, admission.enter():
            raise AssertionError("let in")
        assert limited.value.metadata == {"limit": "requests_per_minute"} and places.taken == 1
    assert places.taken == 0 and meter.in_flight("") == 0
    full = Admission(Places(0), meter, 4)
    with pytest.raises(Fault) as caught, full.enter():
        raise AssertionError("let in")
    assert Reason.Name(caught.value.reason) == "REASON_QUEUE_FULL" and caught.value.retry_seconds > 0


async def test_a_batch_waits_in_order_and_who_leaves_gives_its_place_on() -> None:
    places = Places(1)
    places.take()
    order: list[int] = []

    async def wait(number: int) -> None:
        await places.wait()
        order.append(number)

    tasks = [asyncio.create_task(wait(n)) for n in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    places.free()
    tasks[0].cancel()  # in the very moment in which the place is handed to it
    await asyncio.gather(*tasks[:3], return_exceptions=True)
    assert order == [2] and places.taken == 1
    with pytest.raises(Fault):
        places.take()
    places.free()
    await tasks[3]
    assert order == [2, 3] and places.taken == 1
    places.free()
    assert places.taken == 0


def test_no_key_takes_all_places() -> None:
    def most(places: Places, who: str) -> int:
        for taken in itertools.count():
            try:
                places.take(who)
            except Fault as fault:
                assert Reason.Name(fault.reason) == "REASON_QUEUE_FULL" and fault.retry_seconds > 0
                return taken
        raise AssertionError

    places = Places(96)
    assert [most(places, who) for who in ("ada", "bob", "cy")] == [72, 18, 5], "and who comes next has a place too"
    with pytest.raises(Fault, match="of one key 3 for each place that is free; key 'ada' has 72"):
        places.take("ada")
    for _ in range(72):
        places.free("ada")
    assert most(places, "bob") > 30, "what one gives back is for all"
    assert [most(Places(n), "ada") for n in (1, 2, 3, 4)] == [1, 2, 3, 3]
    assert most(Places(9), "") == 9, "without keys nobody is told apart"


async def test_who_waits_behind_a_key_that_has_enough_is_not_held_up_by_it() -> None:
    places = Places(8)
    for who, count in (("ada", 6), ("cy", 2)):
        for _ in range(count):
            places.take(who)
    ada, bob = (asyncio.create_task(places.wait(who)) for who in ("ada", "bob"))
    await asyncio.sleep(0)
    places.free("cy")
    await asyncio.sleep(0)
    assert bob.done() and not ada.done()
    places.free("ada")
    await asyncio.sleep(0)
    assert not ada.done(), "five are more than three for the one that is free"
    places.free("ada")
    await ada


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "wait", "free", "leave"]), st.sampled_from(["", "a", "b"])), max_size=60
    )
)
@settings(max_examples=60)
def test_places_are_as_many_as_they_are_and_who_may_have_one_waits_for_none(steps: list[tuple[str, str]]) -> None:
    async def run() -> None:
        places, held = Places(5), collections.Counter[str]()
        waiting: list[tuple[str, asyncio.Task[None]]] = []

        async def settle() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            for who, task in list(waiting):
                if task.done():
                    waiting.remove((who, task))
                    held[who] += not task.cancelled()

        for what, who in steps:
            if what == "take":
                with contextlib.suppress(Fault):
                    places.take(who)
                    held[who] += 1
            elif what == "wait":
                waiting.append((who, asyncio.create_task(places.wait(who))))
            elif what == "free" and held[who]:
                held[who] -= 1
                places.free(who)
                if waiting:
                    waiting[0][1].cancel()  # in the very moment in which the place may be handed to it
            elif what == "leave" and waiting:
                waiting[-1][1].cancel()
            await settle()
            assert places.taken == held.total() <= 5
            free = 5 - places.taken
            for one, _ in waiting:
                assert not free or (one and held[one] >= 3 * free), "nobody waits for a place that is there for it"
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
        for who, count in held.items():
            for _ in range(count):
                places.free(who)
        assert places.taken == 0

    asyncio.run(run())


def test_the_door_says_who_calls_and_only_inside_the_call() -> None:
    import hashlib

    told = hashlib.sha256(b"secret").hexdigest()
    door = Door(CollectorRegistry(), Tokens.parse(f"{told} ada\n"), lambda: False)
    who = door.admit("/qlorad.v1.InferenceService/Generate", {"authorization": "Bearer secret"})
    assert caller.name() == ""
    with caller.calling(who):
        assert caller.name() == "ada"
    assert caller.name() == ""
