"""What is true of the log of every job, whatever died while it was written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.trainer import jobs
from tests.house import ROOT


def published_law() -> dict[int, frozenset[int]]:
    """The law of states as JobState's comment tells it."""
    text = (ROOT / "protos/qlorad/v1/trainer.proto").read_text()
    comment = text[text.index("// Where a job is.") : text.index("enum JobState")]
    found: dict[int, frozenset[int]] = {}
    for left, right in re.findall(r"//\s+([A-Z][A-Z, ]+?)\s*->\s*(.*)", comment):
        onward = [] if right.startswith("(") else right.split()
        for state in re.findall(r"[A-Z]+", left):
            found[trainer_pb2.JobState.Value(f"JOB_STATE_{state}")] = frozenset(
                trainer_pb2.JobState.Value(f"JOB_STATE_{s}") for s in onward
            )
    return found


def check_log(created: trainer_pb2.Job, events: Sequence[trainer_pb2.Event], job: trainer_pb2.Job) -> None:
    """Numbers without gap or double, moves by the published law, attempts that never go back; and the fold is the job.

    `created` is CreateJob's answer; `events` are all up to the moment when `job` was read.
    """
    assert [e.sequence for e in events] == list(range(1, job.last_sequence + 1)), "a gap, a double, or out of order"
    law, state, attempt = published_law(), 0, 0
    for event in events:
        if event.HasField("state_changed"):
            change = event.state_changed
            if event.sequence == 1:
                assert change.to == trainer_pb2.JOB_STATE_QUEUED
            else:
                assert getattr(change, "from") == state and change.to in law[state], event
            state = change.to
        if event.HasField("attempt_started"):
            assert event.attempt_started.attempt == attempt + 1, "one attempt after another"
            attempt += 1
        assert event.attempt <= attempt + 1
    record = training_pb2.JobRecord(job=created)
    record.job.last_sequence = 0
    record.job.ClearField("queue")
    for event in events:
        record = jobs.fold(record, event)
    assert record.job == job, "a job is the fold of its events"
