"""The pure half of a watch: each event once, in order, whatever is cut; and how long one waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad import errors
from qlorad._wire_core import Cursor, Gap, Patience, enum_value, full_name
from qlorad.v1 import inference_pb2
from qlorad.v1 import trainer_pb2 as pb


def event(number: int) -> pb.WatchJobResponse:
    """An update that holds an event."""
    return pb.WatchJobResponse(event=pb.Event(sequence=number, log=pb.LogLine(text=str(number))))


SNAPSHOT = pb.WatchJobResponse(snapshot=pb.Job(name="jobs/x", last_sequence=3))
HEARTBEAT = pb.WatchJobResponse(heartbeat=pb.Heartbeat(last_sequence=3))


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5)), max_size=20), st.data())
def test_any_cuts_and_repetitions_give_each_event_once_in_order(
    total: int, cuts: list[tuple[int, int]], data: st.DataObject
) -> None:
    cursor, seen = Cursor(0), []
    for length, again in [*cuts, (total, 0)]:
        begin = max(0, cursor.last - again)  # a daemon that sends some twice does no harm
        stream = [SNAPSHOT, *(event(n) for n in range(begin + 1, min(total, begin + again + length) + 1)), HEARTBEAT]
        for update in stream:
            taken = cursor.take(update)
            if taken is not None:
                seen.append(taken.sequence)
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) == total


@given(st.integers(0, 20), st.integers(2, 20))
def test_a_gap_is_noticed_and_nothing_is_lost_by_it(last: int, skip: int) -> None:
    cursor = Cursor(last)
    with pytest.raises(Gap):
        cursor.take(event(last + skip))
    assert cursor.last == last


@pytest.mark.parametrize("state", [pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED])
def test_the_end_is_known_by_the_last_change_of_state(state: pb.JobState.ValueType) -> None:
    cursor = Cursor(0)
    changed = pb.StateChanged(to=state)
    cursor.take(pb.WatchJobResponse(event=pb.Event(sequence=1, state_changed=changed)))
    assert cursor.ended


def test_a_snapshot_of_an_ended_job_ends_the_watch_only_if_all_was_seen() -> None:
    ended = pb.WatchJobResponse(snapshot=pb.Job(is_terminal=True, last_sequence=5))
    early, late = Cursor(4), Cursor(5)
    early.take(ended)
    late.take(ended)
    assert not early.ended and late.ended


def test_patience_is_short_before_the_first_sign_and_whole_after_it() -> None:
    lost = errors.Unavailable("gone")
    fresh = Patience(100.0)
    waited = 0.0
    with pytest.raises(errors.Unavailable):
        while True:
            waited += fresh.wait(lost)
    assert 1.9 <= waited <= 2.2
    known = Patience(100.0)
    known.renew()
    waited = 0.0
    with pytest.raises(errors.Unavailable):
        while True:
            waited += known.wait(lost)
    assert 99.0 <= waited <= 101.0


def test_patience_is_renewed_by_progress_and_heeds_the_daemons_wish() -> None:
    patience = Patience(10.0)
    assert patience.wait(errors.Unavailable("x", reason="WORKER_LOST", retry_after=4.0)) == 4.0
    patience.renew()
    assert patience.wait(errors.Unavailable("x")) == 0.1


def test_names_and_words() -> None:
    assert full_name("models", "x") == full_name("models", "models/x") == "models/x"
    with pytest.raises(errors.InvalidArgument, match="models/NAME"):
        full_name("models", "")
    for given_, wanted in (("nf4", 1), ("PRECISION_BF16", 2), ("FP32", 3), (2, 2), ("", 0)):
        assert enum_value(inference_pb2.Precision, "PRECISION_", "precision", given_) == wanted
    with pytest.raises(errors.InvalidArgument, match="accepted: nf4, bf16, fp32, int8, int4"):
        enum_value(inference_pb2.Precision, "PRECISION_", "precision", "int2")


def test_a_history_that_is_gone_is_gone_on_from_at_its_oldest_event() -> None:
    cursor = Cursor(3)
    assert cursor.skip_gone(errors.OutOfRange("gone", metadata={"oldest_sequence": "10"})) == 10
    taken = cursor.take(event(10))
    assert taken is not None and taken.sequence == 10
    for metadata in ({}, {"oldest_sequence": "11"}, {"oldest_sequence": "4"}):
        with pytest.raises(errors.OutOfRange):
            cursor.skip_gone(errors.OutOfRange("gone", metadata=metadata))
    assert cursor.last == 10
