"""Errors of a daemon come out of the client as they went in."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad import _connection, errors
from qlorad.v1 import errors_pb2
from services.common import errors as daemon_errors

CLASSES = {
    "INVALID_ARGUMENT": errors.InvalidArgument,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "DATA_LOSS": errors.DataLoss,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "OUT_OF_RANGE": errors.OutOfRange,
    "ABORTED": errors.Aborted,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.Cancelled,
    "INTERNAL": errors.Internal,
    "UNIMPLEMENTED": errors.Unimplemented,
}
REASONS = [r for r in errors_pb2.Reason.values() if r]
TEXT = st.text(max_size=40)


def sent(fault: daemon_errors.Fault) -> errors.QloradError:
    """The fault as a client gets it."""
    from google.rpc import code_pb2

    status = daemon_errors.to_status(fault)
    return errors.build(code_pb2.Code.Name(status.code), status.message, status.SerializeToString(), "there")


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_becomes_the_class_of_its_code(reason: errors_pb2.Reason.ValueType) -> None:
    got = sent(daemon_errors.Fault(reason, "because"))
    assert got.reason == errors_pb2.Reason.Name(reason).removeprefix("REASON_")
    assert type(got) is CLASSES[got.code]
    assert str(got) == got.message == "because"


@given(
    st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=5),
    st.lists(st.tuples(TEXT, TEXT), max_size=5),
    st.dictionaries(TEXT, TEXT, max_size=3),
    st.floats(0.001, 1000),
)
def test_nothing_of_the_details_is_lost(
    violations: list[tuple[str, str, str]],
    blockers: list[tuple[str, str]],
    metadata: dict[str, str],
    retry: float,
) -> None:
    got = sent(
        daemon_errors.Fault(
            errors_pb2.REASON_WRONG_STATE,
            "no",
            violations=tuple(daemon_errors.Violation(*v) for v in violations),
            resource="jobs/x",
            blockers=tuple(blockers),
            retry_seconds=retry,
            metadata=metadata,
        )
    )
    assert [v.field for v in got.violations] == [v[0] for v in violations]
    assert [(b.subject, b.description) for b in got.blockers] == blockers
    assert got.metadata == metadata and got.resource == "jobs/x"
    assert got.retry_after == pytest.approx(retry, abs=1e-6)
    told = got.as_dict()
    assert told["code"] == "FAILED_PRECONDITION" and told["reason"] == "WRONG_STATE"
    assert len(told.get("violations", ())) == len(violations)


@given(st.binary(max_size=200))
def test_details_that_cannot_be_read_do_no_harm(details: bytes) -> None:
    got = errors.build("NOT_FOUND", "gone", details)
    assert isinstance(got, errors.NotFound) and got.message == "gone"


def test_a_plain_unavailable_says_that_tls_looks_the_same_and_a_reasoned_one_does_not() -> None:
    plain = errors.build("UNAVAILABLE", "connection refused", b"", "qlorad-trainer at 127.0.0.1:1")
    assert isinstance(plain, errors.Unavailable)
    for word in ("qlorad-trainer at 127.0.0.1:1", "TLS or certificate mismatch", "qlorad up", "connection refused"):
        assert word in plain.message
    told = sent(daemon_errors.worker_lost("the engine", "killed"))
    assert "TLS" not in told.message and told.retry_after == 1.0


def test_an_unknown_code_is_still_a_qlorad_error() -> None:
    got = errors.build("SOMETHING_NEW", "what", b"")
    assert type(got) is errors.QloradError and got.code == "SOMETHING_NEW"


def test_a_stream_that_broke_off_is_unavailable_and_an_internal_error_stays_one() -> None:
    """grpc's asyncio client calls the death of the other side, in the middle of a stream of requests, INTERNAL."""
    nothing, here = grpc.aio.Metadata(), _connection.Target("datasets", "127.0.0.1:1", False, "argument")
    for told, kind in (("Internal error from Core", errors.Unavailable), ("a log id", errors.Internal)):
        broken = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, told)
        assert type(_connection.failure(broken, here)) is kind
