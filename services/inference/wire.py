"""A Fault on its way from the engine to the daemon.

Law of this room: pure; what the engine raised is what the caller sees.
"""

from __future__ import annotations

from services.common.errors import Fault, Violation
from services.common.frames.v1 import engine_pb2


def pack(fault: Fault) -> engine_pb2.EngineRefusal:
    """The fault as a frame."""
    refusal = engine_pb2.EngineRefusal(reason=fault.reason, message=fault.message, resource=fault.resource)
    for v in fault.violations:
        refusal.violations.add(field=v.field, given=v.given, accepted=v.accepted)
    return refusal


def unpack(refusal: engine_pb2.EngineRefusal) -> Fault:
    """The frame as a fault."""
    return Fault(
        refusal.reason,
        refusal.message,
        violations=tuple(Violation(v.field, v.given, v.accepted) for v in refusal.violations),
        resource=refusal.resource,
        blockers=((refusal.resource, refusal.message),) if refusal.resource and not refusal.violations else (),
    )
