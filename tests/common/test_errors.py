"""Every reason reaches a stock client with all of its details."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2

from qlorad.v1 import errors_pb2
from services.common import errors
from services.common.errors import Fault, Violation

REASONS = [value for name, value in errors_pb2.Reason.items() if name != "REASON_UNSPECIFIED"]


def details(status: status_pb2.Status) -> dict[str, object]:
    """The packed details by type name."""
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RetryInfo,
    )
    found: dict[str, object] = {}
    for packed in status.details:
        for kind in kinds:
            message = kind()
            if packed.Unpack(message):
                found[kind.DESCRIPTOR.name] = message
    assert len(found) == len(status.details)
    return found


@pytest.mark.parametrize("reason", REASONS, ids=lambda r: errors_pb2.Reason.Name(r))
def test_a_reason_is_packed_and_unpacked(reason: int) -> None:
    fault = Fault(
        reason,
        "why",
        violations=(Violation("lora.rank", "0", "1 to 512"),),
        resource="models/x",
        blockers=(("jobs/1", "uses it"),),
        retry_seconds=1.5,
        metadata={"owner": "jobs/1"},
    )
    found = details(status_pb2.Status.FromString(errors.to_status(fault).SerializeToString()))
    info = found["ErrorInfo"]
    assert (info.domain, "REASON_" + info.reason) == ("qlorad", errors_pb2.Reason.Name(reason))
    assert dict(info.metadata) == {"owner": "jobs/1"}
    bad = found["BadRequest"].field_violations
    assert [(v.field, v.description) for v in bad] == [("lora.rank", "got 0; accepted: 1 to 512")]
    assert found["ResourceInfo"].resource_name == "models/x"
    assert [(v.subject, v.description) for v in found["PreconditionFailure"].violations] == [("jobs/1", "uses it")]
    assert found["RetryInfo"].retry_delay.ToNanoseconds() == 1_500_000_000


def test_what_is_absent_is_not_packed() -> None:
    assert set(details(errors.to_status(Fault(errors_pb2.REASON_NOT_FOUND, "gone")))) == {"ErrorInfo"}


@pytest.mark.parametrize("count", [1, 30, 1000])
def test_a_status_fits_a_stock_client(count: int) -> None:
    fault = errors.invalid(Violation(f"field_{n}", "தமிழ்" * 40, "y" * 900) for n in range(count))
    status = errors.to_status(fault)
    assert status.ByteSize() < 5000
    listed = details(status)["BadRequest"].field_violations
    assert len(listed) == count or f"and {count - len(listed) + 1} more" in listed[-1].description


def test_forty_ordinary_violations_are_all_listed() -> None:
    fault = errors.invalid(Violation(f"lora.rank_{n}", "0", "1 to 512") for n in range(40))
    assert len(details(errors.to_status(fault))["BadRequest"].field_violations) == 40


def test_a_text_that_is_no_utf8_is_carried_anyway() -> None:
    status = errors.to_status(errors.corrupt("file-\udcff", "odd"))
    assert "file-?" in status.message


def test_a_near_name_is_hinted() -> None:
    assert "did you mean 'models/starter-test'" in str(errors.not_found("models/starter-tset", ["models/starter-test"]))
    assert "did you mean" not in str(errors.not_found("models/x", ["models/starter-test"]))


def test_a_value_is_shown_quoted_and_cut() -> None:
    assert errors.show("a\nb") == r"'a\nb'"
    assert len(errors.show("x" * 5000)) == 80


def test_an_error_names_what_is_and_what_would_do() -> None:
    assert str(errors.wrong_state("jobs/1", "RUNNING", ["FAILED", "CANCELLED"])) == (
        "'jobs/1' is RUNNING; the call needs: FAILED, CANCELLED"
    )
    assert str(errors.in_use("models/x", ["jobs/1", "jobs/2"])) == "'models/x' is in use by jobs/1, jobs/2"
    assert str(errors.too_large("prompt", 9, 8, "tokens")) == "prompt: 9 tokens; accepted: at most 8 tokens"
