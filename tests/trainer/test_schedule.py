"""Courses of the learning rate: continuous, bounded, and where they end."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2

KINDS = [n.removeprefix("SCHEDULE_KIND_") for n, number in trainer_pb2.ScheduleKind.items() if number]


@pytest.fixture(scope="module")
def schedule():  # type: ignore[no-untyped-def]
    from services.trainer.worker import schedule

    return schedule


@given(
    st.sampled_from(KINDS), st.integers(1, 200), st.integers(0, 60), st.floats(0, 0.9),
    st.floats(0, 1), st.floats(0.01, 1),
)  # fmt: skip
def test_rates_rise_then_follow_their_course_to_its_floor(  # type: ignore[no-untyped-def]
    schedule, kind: str, total: int, steps: int, share: float, floor: float, decay: float
) -> None:
    steps = min(steps, total - 1)
    course = schedule.Course(kind, 2.0, steps, share, floor, decay)
    warmup = course.warmup(total)
    assert warmup == (steps or int(share * total)) < total
    rates = [course.rate(s, total) for s in range(1, total + 11)]
    assert all(0 < r <= 2.0 and math.isfinite(r) for r in rates[:total])
    assert rates[warmup] == 2.0 and rates[:warmup] == sorted(rates[:warmup])
    down = rates[warmup:]
    assert down == sorted(down, reverse=True) and (kind == "CONSTANT" or min(down) >= 2.0 * floor - 1e-12)
    if kind in ("LINEAR", "COSINE", "STABLE_DECAY"):
        assert rates[total:] == [pytest.approx(2.0 * floor)] * 10, "there it stays"
    span = total - warmup
    if kind == "STABLE_DECAY":
        span = min(span, max(1, round(decay * total)))
        assert down[: total - warmup - span + 1] == [2.0] * (total - warmup - span + 1)
    if kind == "INVERSE_SQRT":
        assert all(
            math.isclose(r, 2.0 * max(floor, math.sqrt((warmup + 1) / s))) for s, r in enumerate(rates, 1) if s > warmup
        )
        steepest = 2.0 * (1 - math.sqrt((warmup + 1) / (warmup + 2)))
    else:
        steepest = 0.0 if kind == "CONSTANT" else 2.0 * (1 - floor) * math.pi / 2 / span
    assert all(a - b <= steepest + 1e-9 for a, b in itertools.pairwise(down)), "no jump"


@given(st.sampled_from(["CONSTANT", "LINEAR", "COSINE"]), st.integers(1, 300), st.integers(0, 40))
def test_the_courses_of_before_are_what_they_were_to_the_bit(  # type: ignore[no-untyped-def]
    schedule, kind: str, total: int, warmup: int
) -> None:
    warmup, full = min(warmup, total - 1), 2e-4
    for step in range(1, total + 1):
        done = (step - warmup - 1) / max(1, total - warmup)
        then = {
            "CONSTANT": full, "LINEAR": full * (1.0 - done), "COSINE": full * 0.5 * (1.0 + math.cos(math.pi * done))
        }[kind]  # fmt: skip
        if step <= warmup:
            then = full * step / (warmup + 1)
        assert schedule.Course(kind, full, warmup).rate(step, total) == then


def test_a_spec_says_which_course(schedule) -> None:  # type: ignore[no-untyped-def]
    spec = trainer_pb2.TrainSpec()
    spec.optimizer.learning_rate, spec.schedule.warmup_share = 0.5, 0.25
    spec.schedule.kind, spec.schedule.floor_share = trainer_pb2.SCHEDULE_KIND_STABLE_DECAY, 0.1
    course = schedule.course_of(spec)
    third = 0.5 / 3
    assert [course.rate(s, 8) for s in range(1, 10)] == pytest.approx([third, 2 * third, *[0.5] * 6, 0.05])
    spec.schedule.decay_share = 0.5
    other = schedule.course_of(spec)
    assert [other.rate(s, 8) for s in range(4, 10)] == pytest.approx([0.5, 0.5, 0.3875, 0.275, 0.1625, 0.05])
