"""Where the trainer's things lie, and what attempts are given."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Places:
    """Of one home."""

    jobs: pathlib.Path
    leases: pathlib.Path
    devices: tuple[str, ...]
    """The slots: a job takes one, or one for each rank."""
    extensions: str
    backoff_seconds: float
    exit_grace_seconds: float
    heartbeat_seconds: float
    stuck_seconds: float
    min_free_bytes: int

    def attempt(self, job: str, number: int) -> pathlib.Path:
        """An attempt's folder."""
        return self.jobs / job / "attempts" / str(number)
