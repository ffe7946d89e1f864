"""Devices as slots, and the forecast of the queue: properties of the pure core."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer import jobs, slots

CLAIMS = st.lists(st.builds(slots.Claim, st.integers(1, 3), st.floats(0, 100)), max_size=8)


@given(st.integers(3, 6), CLAIMS, CLAIMS)
def test_no_device_is_promised_twice_and_nobody_overtakes(
    total: int, running: list[slots.Claim], queue: list[slots.Claim]
) -> None:
    under_way, left = [], total
    for claim in running:
        if claim.slots <= left:
            under_way.append(claim)
            left -= claim.slots
    found = slots.starts(total, under_way, queue, 1000.0)
    assert len(found) == len(queue) and None not in found
    begun = [f for f in found if f is not None]
    assert begun == sorted(begun) and all(f >= 1000.0 for f in begun)
    spans = [(1000.0, 1000.0 + c.seconds, c.slots) for c in under_way]
    spans += [(f, f + c.seconds, c.slots) for f, c in zip(begun, queue, strict=True)]
    for at in {s[0] for s in spans}:
        assert sum(n for start, end, n in spans if start <= at < end) <= total


def test_what_cannot_be_judged_is_not_told() -> None:
    one = slots.Claim(1, 10.0)
    assert slots.starts(1, [one], [one, one], 0.0) == [10.0, 20.0]
    assert slots.starts(1, [slots.Claim(1, inf)], [one], 0.0) == [None]
    assert slots.starts(1, [one], [slots.Claim(1, inf), one], 0.0) == [10.0, None]
    assert slots.starts(2, [slots.Claim(1, inf)], [one, one], 0.0) == [0.0, 10.0]
    assert slots.starts(2, [one], [slots.Claim(3, 1.0), one], 0.0) == [None, None]
    assert slots.starts(1, [], [slots.Claim(1, 5.0, not_before=30.0), one], 0.0) == [30.0, 0.0]
    three, two = slots.Claim(3, 5.0), slots.Claim(2, 5.0)
    assert slots.starts(3, [slots.Claim(1, 20.0)], [three, two, one], 0.0) == [20.0, 25.0, 25.0], "nobody overtakes"


def ended(model: str, seconds: int, steps: int) -> training_pb2.JobRecord:
    record = training_pb2.JobRecord()
    record.job.spec.train.model = model
    record.job.start_time.FromSeconds(100)
    record.job.end_time.FromSeconds(100 + seconds)
    record.job.result.steps = steps
    return record


def test_how_long_a_job_takes_is_told_by_those_of_its_model() -> None:
    history = [ended("models/a", 100, 50), ended("models/a", 300, 100), ended("models/b", 9000, 3)]
    record = training_pb2.JobRecord()
    record.job.spec.train.model = "models/a"
    assert slots.usual_seconds(record, history) == 75 * 2.5
    record.job.spec.train.schedule.max_steps = 10
    assert slots.usual_seconds(record, history) == 25
    record.marks.add(step=8)
    assert slots.usual_seconds(record, history) == 5
    record.job.spec.train.model = "models/new"
    assert slots.usual_seconds(record, history) == inf
    record.job.state = trainer_pb2.JOB_STATE_RUNNING
    record.job.metrics.eta_seconds = 7
    assert slots.seconds_left(record, history) == 7


@pytest.mark.parametrize(
    ("devices", "here", "word"),
    [
        (("tpu:9",), ("cpu",), "accepted: cpu, or shares of the processor"),
        (("cuda:0", "cuda:0"), ("cuda:0", "cpu"), "each device once"),
        (("cuda:0", "cpu:0"), ("cuda:0", "cpu"), "of one kind"),
        (("cpu", "cpu:0"), ("cpu",), "whole or in shares"),
    ],
)
def test_a_list_of_devices_that_cannot_work_is_refused(
    devices: tuple[str, ...], here: tuple[str, ...], word: str
) -> None:
    assert word in "; ".join(slots.faults(devices, here))


def test_a_list_of_devices_that_can() -> None:
    for devices in ((), ("cpu",), ("cpu:0", "cpu:1"), ("cuda:0", "cuda:1")):
        assert slots.faults(devices, ("cuda:0", "cuda:1", "cpu")) == []
    assert [slots.torch_name(d) for d in ("cpu", "cpu:3", "cuda:1", "mps")] == ["cpu", "cpu", "cuda:1", "mps"]
    four = trainer_pb2.TrainSpec(parallelism=trainer_pb2.Parallelism(ranks=4))
    assert slots.needed(four, ("cuda:0",)) == 4 and slots.needed(four, ("cpu:0", "cpu:1")) == 1


def test_a_place_is_told_again_when_it_is_news() -> None:
    def place(start: int = 0, position: int = 1) -> trainer_pb2.QueuePlace:
        made = trainer_pb2.QueuePlace(position=position)
        if start:
            made.estimated_start.FromSeconds(start)
        return made

    assert not slots.worth_telling(place(1000), place(1020), 0)
    assert slots.worth_telling(place(1000), place(1200), 0)
    assert not slots.worth_telling(place(100_000), place(100_900), 0)
    assert slots.worth_telling(place(1000), place(), 0) and slots.worth_telling(place(), place(1000), 0)
    assert slots.worth_telling(place(1000, 2), place(1000, 1), 0)


def test_reasons_of_the_queue() -> None:
    def waiting(name: str, not_before: float = 0.0) -> jobs.Waiting:
        record = training_pb2.JobRecord()
        record.job.name = name
        return jobs.Waiting(record, not_before)

    queue = [waiting("jobs/a", 50.0), waiting("jobs/b"), waiting("jobs/c")]
    busy = trainer_pb2.QueuePlace(reason=trainer_pb2.QUEUE_REASON_DEVICE_BUSY, owner="inference/engine", owner_bytes=9)
    told = jobs.places(queue, 10.0, busy, [50.0, 11.0, None])
    assert [p.reason for p in told] == [
        trainer_pb2.QUEUE_REASON_BACKOFF,
        trainer_pb2.QUEUE_REASON_DEVICE_BUSY,
        trainer_pb2.QUEUE_REASON_POSITION,
    ]
    assert [p.position for p in told] == [1, 2, 3] and told[1].owner == "inference/engine"
    assert [p.HasField("estimated_start") for p in told] == [True, False, False], "who holds it does not say how long"
    assert not jobs.places(queue[1:], 10.0, None, [11.0, 12.0])[0].owner
