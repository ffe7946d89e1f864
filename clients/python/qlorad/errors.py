"""What a caller catches: one class for each gRPC code, built from google.rpc details.

Law of this room: knows no gRPC, only codes by name and the details of the
status. Decide by class and `reason`, never by the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from qlorad.v1 import trainer_pb2

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field of a request."""

    field: str
    description: str
    """What was given and what would be accepted."""


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing that stands in the way: a state or a holder."""

    subject: str
    description: str


class QloradError(Exception):
    """A failed call.

    Promises: `code` is a gRPC code's name, `reason` one of qlorad.v1.Reason
    without prefix ("" where the failure did not come from a daemon), and
    `violations` are all there are. Never holds a token.
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        violations: Sequence[Violation] = (),
        blockers: Sequence[Blocker] = (),
        resource: str = "",
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason
        self.violations = tuple(violations)
        self.blockers = tuple(blockers)
        self.resource = resource
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})

    def as_dict(self) -> dict[str, Any]:
        """The failure as plain data, for JSON."""
        told: dict[str, Any] = {"code": self.code, "reason": self.reason, "message": self.message}
        if self.violations:
            told["violations"] = [{"field": v.field, "description": v.description} for v in self.violations]
        if self.blockers:
            told["blockers"] = [{"subject": b.subject, "description": b.description} for b in self.blockers]
        if self.resource:
            told["resource"] = self.resource
        if self.retry_after is not None:
            told["retry_after_seconds"] = self.retry_after
        if self.metadata:
            told["metadata"] = self.metadata
        return told


class InvalidArgument(QloradError):
    """The request is wrong; `violations` says where."""

    code = "INVALID_ARGUMENT"


class NotFound(QloradError):
    """The named thing does not exist."""

    code = "NOT_FOUND"


class AlreadyExists(QloradError):
    """The id, or the request_id, is taken."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(QloradError):
    """A state forbids the call, or the bytes were refused; `blockers` says what."""

    code = "FAILED_PRECONDITION"


class DataLoss(QloradError):
    """Bytes are not what they should be."""

    code = "DATA_LOSS"


class ResourceExhausted(QloradError):
    """Device busy, queue full, disk full or too large; see `reason` and `retry_after`."""

    code = "RESOURCE_EXHAUSTED"


class Unauthenticated(QloradError):
    """No token, or one that is not known there."""

    code = "UNAUTHENTICATED"


class PermissionDenied(QloradError):
    """Outside what the daemon was allowed."""

    code = "PERMISSION_DENIED"


class OutOfRange(QloradError):
    """History is gone; metadata["oldest_sequence"] is where it begins."""

    code = "OUT_OF_RANGE"


class Aborted(QloradError):
    """Something moved meanwhile; read again."""

    code = "ABORTED"


class Unavailable(QloradError):
    """Not reachable now: down, draining, a lost worker, or TLS that does not match."""

    code = "UNAVAILABLE"


class DeadlineExceeded(QloradError):
    """The deadline passed."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(QloradError):
    """The call was given up."""

    code = "CANCELLED"


class Internal(QloradError):
    """A fault of qlorad; metadata["log_id"] finds it in the daemon's log."""

    code = "INTERNAL"


class Unimplemented(QloradError):
    """The daemon has no such method."""

    code = "UNIMPLEMENTED"


class JobFailed(QloradError):
    """A job that was waited for ended FAILED or CANCELLED; `job` is how it stands."""

    code = "JOB_FAILED"

    def __init__(self, job: trainer_pb2.Job, message: str) -> None:
        super().__init__(message, reason=job.error.reason, resource=job.name)
        self.job = job


_CLASSES: dict[str, type[QloradError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        DataLoss,
        ResourceExhausted,
        Unauthenticated,
        PermissionDenied,
        OutOfRange,
        Aborted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        Internal,
        Unimplemented,
    )
}


def invalid(field: str, given: object, accepted: str) -> InvalidArgument:
    """A request that is wrong before it is sent."""
    description = f"got {given!r}; accepted: {accepted}"
    return InvalidArgument(
        f"{field}: {description}", reason="INVALID_REQUEST", violations=[Violation(field, description)]
    )


def unreachable(message: str, target: str) -> str:
    """The text of a plain UNAVAILABLE, which gRPC gives for very different things."""
    return (
        f"{target} cannot be reached ({message or 'no answer'}). Is it up? See `qlorad status`; `qlorad up` starts "
        "it. If it is up, a TLS or certificate mismatch looks just the same: check ca, cert and key on both sides."
    )


def build(code: str, message: str, details: bytes = b"", target: str = "") -> QloradError:
    """The error for a code's name, its text and a serialised google.rpc.Status.

    Does not fail on details that it does not know or cannot read: they are left out.
    """
    kind = _CLASSES.get(code, QloradError)
    fields: dict[str, Any] = {}
    for detail in _details(details):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            fields["reason"] = detail.reason
            fields["metadata"] = dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest):
            fields["violations"] = [Violation(v.field, v.description) for v in detail.field_violations]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            fields["retry_after"] = detail.retry_delay.ToNanoseconds() / 1e9
        elif isinstance(detail, error_details_pb2.ResourceInfo):
            fields["resource"] = detail.resource_name
        elif isinstance(detail, error_details_pb2.PreconditionFailure):
            fields["blockers"] = [Blocker(v.subject, v.description) for v in detail.violations]
    if code == "UNAVAILABLE" and not fields.get("reason"):
        message = unreachable(message, target or "the daemon")
    return kind(message, code=code, **fields)


_KINDS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ResourceInfo,
    error_details_pb2.PreconditionFailure,
)


def _details(serialised: bytes) -> list[Any]:
    found: list[Any] = []
    try:
        status = status_pb2.Status.FromString(serialised)
        for packed in status.details:
            for kind in _KINDS:
                detail = kind()
                if packed.Unpack(detail):
                    found.append(detail)
    except DecodeError:
        return found
    return found
