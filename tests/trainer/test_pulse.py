"""Signs of life: who beats is left alone, who is silent is noticed in time, whatever the daemon did meanwhile."""

from __future__ import annotations

import pathlib

from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer import launch, pulse
from services.trainer.worker.facts import Teller
from tests.house import eventually

HEARTBEAT, STUCK = 8.0, 100.0
LOOK = HEARTBEAT / pulse.BEATS
"""As far apart as two looks of a daemon are at the very most while it does its work."""
GAPS = st.lists(st.floats(0.01, LOOK), min_size=1, max_size=40)


def sign(beats: int, turns: int) -> bytes:
    return pulse.FORMAT.pack(beats, turns)


def fresh(heartbeat: float = HEARTBEAT) -> pulse.Pulse:
    return pulse.Pulse(0.0, heartbeat, STUCK)


@given(GAPS, st.sampled_from([pulse.SIGN, f"{pulse.SIGN}.1"]))
def test_silence_is_noticed_between_one_and_a_half_and_two_heartbeats(gaps: list[float], name: str) -> None:
    beat, now, silent_since = fresh().look({name: sign(1, 1)}, 0.0), 0.0, 0.0
    for gap in gaps * 40:
        now += gap
        beat = beat.look({name: sign(1, 1)}, now)
        if beat.verdict():
            assert 1.5 * HEARTBEAT < now - silent_since <= 2 * HEARTBEAT
            assert beat.verdict().startswith("stuck: no sign of life")
            return
        assert now - silent_since <= 1.5 * HEARTBEAT + 1e-6
        if now > 3 * HEARTBEAT:
            break


@given(GAPS, st.floats(0, 1e6))
def test_a_daemon_that_was_away_blames_nobody_for_it(gaps: list[float], away: float) -> None:
    """The worker beats as it must; the daemon, or the whole machine, stood still for a while."""
    beat, now = fresh().look({pulse.SIGN: sign(1, 1)}, 0.0), 0.0
    now += away
    beat = beat.look({pulse.SIGN: sign(1, 1)}, now)  # a machine that slept: no beat in all that time
    assert not beat.verdict()
    since = now
    for gap in gaps:
        now += gap
        beats = 1 + int((now - since) / LOOK)
        beat = beat.look({pulse.SIGN: sign(beats, 1)}, now)
        assert not beat.verdict()


def test_a_main_loop_that_hangs_is_noticed_though_the_thread_lives() -> None:
    beat, now = fresh(), 0.0
    for number in range(200):
        now = number * 1.0
        beat = beat.look({pulse.SIGN: sign(number, min(number, 50))}, now)
        assert bool(beat.verdict()) == (now - 50 > STUCK)
    assert beat.verdict().startswith("stuck: no progress for 149 s")


def test_before_the_first_sign_only_the_longer_time_counts() -> None:
    beat = fresh()
    for number in range(1, 101):
        beat = beat.look({}, float(number))
        assert not beat.verdict()
    assert not beat.look({pulse.SIGN: b"half"}, 100.5).verdict(), "a sign half written is none"
    assert "no progress" in beat.look({}, 103.0).verdict()
    assert not beat.look({pulse.SIGN: sign(1, 0)}, 103.0).verdict()


def test_one_silent_rank_of_two_is_named() -> None:
    beat = fresh()
    for number in range(20):
        beat = beat.look({"life.0": sign(number, number), "life.1": sign(min(number, 3), number)}, float(number))
    assert beat.verdict() == "stuck: no sign of life of life.1 for 16 s"


def test_workers_of_before_are_not_judged() -> None:
    beat = fresh(heartbeat=0.0)
    for number in range(10):
        beat = beat.look({}, number * 1000.0)
        assert not beat.verdict()


def test_a_worker_beats_from_a_thread_and_turns_from_its_main_loop(tmp_path: pathlib.Path) -> None:
    teller = Teller(tmp_path, heartbeat_seconds=0.05)
    path = tmp_path / pulse.SIGN

    def beats() -> tuple[int, int]:
        told: tuple[int, int] = pulse.FORMAT.unpack(path.read_bytes())
        return told

    eventually(lambda: beats()[0] >= 3, 10, "three beats while the main loop does nothing")
    assert beats()[1] == 0
    teller.stop_if_asked()
    teller.say("a line")
    eventually(lambda: beats()[1] == 2, 10, "two turns")
    assert (tmp_path / launch.RESERVE).stat().st_size > 0
    teller.last_word(training_pb2.Fact(failed=trainer_pb2.JobError(reason="DISK_FULL")))
    assert not (tmp_path / launch.RESERVE).exists()
