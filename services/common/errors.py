"""The one form of failure inside qlorad, and its translation to google.rpc.

Law of this room: pure; knows no gRPC. The core raises `Fault`; only
common/interceptors turns it into a status on the wire.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from qlorad.v1 import errors_pb2

DOMAIN = "qlorad"

MAX_MESSAGE_BYTES = 1000
MAX_DETAILS_BYTES = 2600
"""A stock client refuses trailing metadata above 8 KiB, and the message counts up to four times in it."""

Reason = errors_pb2.Reason

_CODES: Mapping[int, int] = {
    errors_pb2.REASON_INVALID_REQUEST: code_pb2.INVALID_ARGUMENT,
    errors_pb2.REASON_NOT_FOUND: code_pb2.NOT_FOUND,
    errors_pb2.REASON_ALREADY_EXISTS: code_pb2.ALREADY_EXISTS,
    errors_pb2.REASON_REQUEST_ID_REUSED: code_pb2.ALREADY_EXISTS,
    errors_pb2.REASON_WRONG_STATE: code_pb2.FAILED_PRECONDITION,
    errors_pb2.REASON_IN_USE: code_pb2.FAILED_PRECONDITION,
    errors_pb2.REASON_CORRUPT: code_pb2.DATA_LOSS,
    errors_pb2.REASON_REJECTED: code_pb2.FAILED_PRECONDITION,
    errors_pb2.REASON_DEVICE_BUSY: code_pb2.RESOURCE_EXHAUSTED,
    errors_pb2.REASON_QUEUE_FULL: code_pb2.RESOURCE_EXHAUSTED,
    errors_pb2.REASON_DISK_FULL: code_pb2.RESOURCE_EXHAUSTED,
    errors_pb2.REASON_TOO_LARGE: code_pb2.RESOURCE_EXHAUSTED,
    errors_pb2.REASON_UNAUTHENTICATED: code_pb2.UNAUTHENTICATED,
    errors_pb2.REASON_PERMISSION_DENIED: code_pb2.PERMISSION_DENIED,
    errors_pb2.REASON_HISTORY_GONE: code_pb2.OUT_OF_RANGE,
    errors_pb2.REASON_SLOW_READER: code_pb2.ABORTED,
    errors_pb2.REASON_WRONG_OFFSET: code_pb2.ABORTED,
    errors_pb2.REASON_STALE_GENERATION: code_pb2.ABORTED,
    errors_pb2.REASON_WORKER_LOST: code_pb2.UNAVAILABLE,
    errors_pb2.REASON_SHUTTING_DOWN: code_pb2.UNAVAILABLE,
    errors_pb2.REASON_DEADLINE: code_pb2.DEADLINE_EXCEEDED,
    errors_pb2.REASON_CANCELLED: code_pb2.CANCELLED,
    errors_pb2.REASON_INTERNAL: code_pb2.INTERNAL,
    errors_pb2.REASON_UNIMPLEMENTED: code_pb2.UNIMPLEMENTED,
    errors_pb2.REASON_UPSTREAM: code_pb2.UNAVAILABLE,
    errors_pb2.REASON_RATE_LIMITED: code_pb2.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field: what was given and what would be accepted."""

    field: str
    given: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.field}: got {self.given}; accepted: {self.accepted}"


@dataclass(eq=False)
class Fault(Exception):
    """A failure that a caller may see in full.

    Not frozen: Python itself sets the traceback on an exception.
    """

    reason: errors_pb2.Reason.ValueType
    message: str
    violations: tuple[Violation, ...] = ()
    resource: str = ""
    """Name of the thing, as in "models/x"."""
    blockers: tuple[tuple[str, str], ...] = ()
    """PreconditionFailure: pairs of subject and description."""
    retry_seconds: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def show(value: object, limit: int = 80) -> str:
    """A value as an error shows it: quoted, cut, never a page long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def invalid(violations: Iterable[Violation]) -> Fault:
    """INVALID_ARGUMENT with all violations."""
    found = tuple(violations)
    return Fault(errors_pb2.REASON_INVALID_REQUEST, "; ".join(map(str, found)), violations=found)


def invalid_field(name: str, given: object, accepted: str) -> Fault:
    """INVALID_ARGUMENT for one field."""
    return invalid([Violation(name, show(given), accepted)])


def not_found(name: str, known: Iterable[str] = ()) -> Fault:
    """NOT_FOUND, with the nearest known name where one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return Fault(errors_pb2.REASON_NOT_FOUND, f"{name!r} does not exist{hint}", resource=name)


def already_exists(name: str, hint: str = "") -> Fault:
    """ALREADY_EXISTS for a name."""
    return Fault(
        errors_pb2.REASON_ALREADY_EXISTS, f"{name!r} exists already" + (f"; {hint}" if hint else ""), resource=name
    )


def wrong_state(name: str, state: str, allowed: Iterable[str]) -> Fault:
    """FAILED_PRECONDITION naming the state and those that would do."""
    would = ", ".join(allowed)
    return Fault(
        errors_pb2.REASON_WRONG_STATE,
        f"{name!r} is {state}; the call needs: {would}",
        resource=name,
        blockers=((name, f"state is {state}; allowed: {would}"),),
    )


def in_use(name: str, holders: Iterable[str]) -> Fault:
    """FAILED_PRECONDITION naming every holder."""
    held = tuple(holders)
    return Fault(
        errors_pb2.REASON_IN_USE,
        f"{name!r} is in use by {', '.join(held)}",
        resource=name,
        blockers=tuple((h, f"uses {name}") for h in held),
    )


def rejected(name: str, why: str) -> Fault:
    """FAILED_PRECONDITION: whole bytes that are refused."""
    return Fault(errors_pb2.REASON_REJECTED, f"{name}: {why}", resource=name, blockers=((name, why),))


def corrupt(name: str, why: str) -> Fault:
    """DATA_LOSS: bytes that are not what they should be."""
    return Fault(errors_pb2.REASON_CORRUPT, f"{name}: {why}", resource=name)


def too_large(what: str, given: int, limit: int, unit: str) -> Fault:
    """RESOURCE_EXHAUSTED: above a limit."""
    return Fault(errors_pb2.REASON_TOO_LARGE, f"{what}: {given} {unit}; accepted: at most {limit} {unit}")


def disk_full(what: str) -> Fault:
    """RESOURCE_EXHAUSTED: no space left."""
    return Fault(errors_pb2.REASON_DISK_FULL, f"no space left on the disk while {what}", retry_seconds=30.0)


def worker_lost(what: str, why: str, retry_seconds: float = 1.0) -> Fault:
    """UNAVAILABLE: a worker process died."""
    return Fault(errors_pb2.REASON_WORKER_LOST, f"{what} was lost: {why}", retry_seconds=retry_seconds)


def device_busy(device: str, owner: str, owner_bytes: int, retry_seconds: float = 5.0) -> Fault:
    """RESOURCE_EXHAUSTED: another process holds the device."""
    return Fault(
        errors_pb2.REASON_DEVICE_BUSY,
        f"device {device} is held by {owner} ({owner_bytes} bytes)",
        resource=f"devices/{device}",
        retry_seconds=retry_seconds,
        metadata={"owner": owner, "owner_bytes": str(owner_bytes)},
    )


def _fit(text: str, limit: int) -> str:
    """The text as UTF-8 can carry it, cut to so many bytes."""
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def to_status(fault: Fault) -> status_pb2.Status:
    """The fault as google.rpc.Status, every detail packed."""
    status = status_pb2.Status(code=_CODES[fault.reason], message=_fit(fault.message, MAX_MESSAGE_BYTES))
    name = Reason.Name(fault.reason).removeprefix("REASON_")
    told = {k: _fit(v, 200) for k, v in fault.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=name, domain=DOMAIN, metadata=told)
    status.details.add().Pack(info)
    if fault.violations:
        bad = error_details_pb2.BadRequest()
        for number, v in enumerate(fault.violations):
            if bad.ByteSize() > MAX_DETAILS_BYTES:
                rest = len(fault.violations) - number
                bad.field_violations.add(field="…", description=f"and {rest} more; mend these first")
                break
            text = _fit(f"got {v.given}; accepted: {v.accepted}", 400)
            bad.field_violations.add(field=_fit(v.field, 120), description=text)
        status.details.add().Pack(bad)
    if fault.resource:
        kind = fault.resource.split("/", 1)[0]
        status.details.add().Pack(
            error_details_pb2.ResourceInfo(resource_type=_fit(kind, 80), resource_name=_fit(fault.resource, 300))
        )
    if fault.blockers:
        failure = error_details_pb2.PreconditionFailure()
        kind = Reason.Name(fault.reason).removeprefix("REASON_")
        for number, (subject, why) in enumerate(fault.blockers):
            if failure.ByteSize() > MAX_DETAILS_BYTES:
                rest = len(fault.blockers) - number
                failure.violations.add(type=kind, subject="…", description=f"and {rest} more")
                break
            failure.violations.add(type=kind, subject=_fit(subject, 120), description=_fit(why, 400))
        status.details.add().Pack(failure)
    if fault.retry_seconds > 0:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(fault.retry_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status
