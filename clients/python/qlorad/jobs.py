"""Jobs: make them, follow them over whatever dies, wait for them.

Made from aio/jobs.py by clients/python/unasync.py; change that file.
"""

# ruff: noqa: UP028

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from qlorad import errors
from qlorad._connection import new_request_id
from qlorad._wire import Wire, sleep
from qlorad._wire_core import (
    DEFAULT_PATIENCE_SECONDS,
    Cursor,
    Gap,
    Patience,
    enum_value,
    full_name,
    optional_name,
    verdict,
    worth_repeating,
)
from qlorad.v1 import trainer_pb2 as pb
from qlorad.v1.trainer_pb2_grpc import TrainerServiceStub

Reattaching = Callable[[errors.QloradError, float], None]
"""Told why a watch was cut and in how many seconds it is taken up again."""


Gone = Callable[[int, int], None]
"""Told the last number seen and the oldest that is still kept: what lay between is not kept any more."""


def _no_matter(after: int, oldest: int) -> None:
    """Says nothing about events that are gone."""


def _quiet(error: errors.QloradError, seconds: float) -> None:
    """Says nothing about a cut."""


class Jobs:
    """TrainerService."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _stub(self) -> TrainerServiceStub:
        return TrainerServiceStub(self._wire.channel)

    def create(
        self,
        spec: pb.TrainSpec | pb.JobSpec,
        *,
        template: str = "",
        job_id: str = "",
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        experiment: str = "",
        validate_only: bool = False,
        request_id: str = "",
    ) -> pb.Job:
        """Puts a job in the queue; `spec` holds what differs from the template.

        The request_id is kept over repetitions, so one call is one job.
        """
        request = pb.CreateJobRequest(
            request_id=request_id or new_request_id(),
            job_id=job_id.removeprefix("jobs/"),
            template=template,
            spec=spec if isinstance(spec, pb.JobSpec) else pb.JobSpec(train=spec),
            priority=priority,
            labels=labels or {},
            experiment=experiment,
            validate_only=validate_only,
        )
        return (self._wire.call(self._stub.CreateJob, request)).job

    def estimate(self, spec: pb.TrainSpec | pb.JobSpec, *, template: str = "") -> pb.EstimateJobResponse:
        """What a job would take, by part, and what fits common budgets; makes no job."""
        request = pb.EstimateJobRequest(
            template=template, spec=spec if isinstance(spec, pb.JobSpec) else pb.JobSpec(train=spec)
        )
        return self._wire.call(self._stub.EstimateJob, request)

    def get(self, job: str) -> pb.Job:
        """One job as it is now."""
        return (self._wire.call(self._stub.GetJob, pb.GetJobRequest(name=full_name("jobs", job)))).job

    def list(self, *, states: Sequence[str | int] = (), experiment: str = "") -> Iterator[pb.Job]:
        """All jobs (in these states, of this experiment), newest first, page by page."""
        wanted = [enum_value(pb.JobState, "JOB_STATE_", "states", state) for state in states]
        token = ""
        while True:
            request = pb.ListJobsRequest(page_token=token, states=wanted, experiment=experiment)
            page = self._wire.call(self._stub.ListJobs, request)
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    def watch(
        self,
        job: str,
        *,
        after_sequence: int = 0,
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
        on_reattach: Reattaching = _quiet,
        on_gone: Gone | None = None,
    ) -> Iterator[pb.Event]:
        """Every event after a number, in order, once; ends when the job has ended.

        A cut (the daemon restarts, the reader was slow) is mended by attaching
        again after the last number seen, for as long as patience lasts since the
        last event. Where events after the number are not kept any more it raises
        OutOfRange, or, with `on_gone`, says so and goes on with the oldest there is.
        """
        cursor, patience, name = Cursor(after_sequence), Patience(patience_seconds), full_name("jobs", job)
        while True:
            try:
                request = pb.WatchJobRequest(name=name, after_sequence=cursor.last)
                for update in self._wire.stream(self._stub.WatchJob, request):
                    patience.renew()
                    event = cursor.take(update)
                    if event is not None:
                        yield event
                if cursor.ended:
                    return
                cut = errors.Unavailable(f"{self._wire.target} ended the watch before {name} ended")
            except Gap:
                cut = errors.Unavailable(f"{self._wire.target} left out the event after {cursor.last} of {name}")
            except errors.OutOfRange as e:
                if on_gone is None:
                    raise
                after = cursor.last
                on_gone(after, cursor.skip_gone(e))
                continue
            except errors.QloradError as e:
                if not worth_repeating(e):
                    raise
                cut = e  # type: ignore[assignment]
            seconds = patience.wait(cut)
            on_reattach(cut, seconds)
            sleep(seconds)
            self._wire.look_again()

    def wait(self, job: str, *, check: bool = True, patience_seconds: float = DEFAULT_PATIENCE_SECONDS) -> pb.Job:
        """The job once it has ended; raises JobFailed unless it SUCCEEDED (or `check` is False).

        A paused job has not ended: this waits until somebody resumes or cancels it.
        """
        now = self.get(job)
        if not now.is_terminal:
            news = self.watch(
                job, after_sequence=now.last_sequence, patience_seconds=patience_seconds, on_gone=_no_matter
            )
            for _ in news:
                pass
            now = self.get(job)
        failed = verdict(now)
        if check and failed is not None:
            raise failed
        return now

    def log(
        self,
        job: str,
        *,
        attempt: int = 0,
        offset_bytes: int = 0,
        follow: bool = False,
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    ) -> Iterator[str]:
        """What the worker of an attempt (0 = the newest) wrote, some lines at a time; with `follow` to its end.

        A cut is mended by going on after the last line seen, in the same attempt.
        """
        patience, name = Patience(patience_seconds), full_name("jobs", job)
        while True:
            try:
                request = pb.WatchLogRequest(name=name, attempt=attempt, offset_bytes=offset_bytes, follow=follow)
                for piece in self._wire.stream(self._stub.WatchLog, request):
                    patience.renew()
                    attempt, offset_bytes = piece.attempt, piece.next_offset_bytes
                    yield piece.text
                return
            except errors.QloradError as e:
                if not worth_repeating(e):
                    raise
                sleep(patience.wait(e))
                self._wire.look_again()

    def checkpoints(self, job: str) -> Sequence[pb.Checkpoint]:
        """The checkpoints that a job keeps, oldest first."""
        request = pb.ListCheckpointsRequest(name=full_name("jobs", job))
        return (self._wire.call(self._stub.ListCheckpoints, request)).checkpoints

    def publish(self, job: str, step: int, *, adapter: str = "", request_id: str = "") -> pb.PublishCheckpointResponse:
        """Makes an adapter of a checkpoint, while the job runs or later; `adapter` is the alias that it gets."""
        request = pb.PublishCheckpointRequest(
            request_id=request_id or new_request_id(),
            name=f"{full_name('jobs', job)}/checkpoints/{step}",
            adapter=optional_name("adapters", adapter),
        )
        return self._wire.call(self._stub.PublishCheckpoint, request)

    def cancel(self, job: str, *, request_id: str = "") -> pb.Job:
        """Asks a job to stop and keep its work; returns it as the wish was noted."""
        request = pb.CancelJobRequest(request_id=request_id or new_request_id(), name=full_name("jobs", job))
        return (self._wire.call(self._stub.CancelJob, request)).job

    def pause(self, job: str, *, request_id: str = "") -> pb.Job:
        """Holds a job back and keeps its work; returns it as the wish was noted (PAUSING, soon PAUSED)."""
        request = pb.PauseJobRequest(request_id=request_id or new_request_id(), name=full_name("jobs", job))
        return (self._wire.call(self._stub.PauseJob, request)).job

    def resume(self, job: str, *, ranks: int | None = None, request_id: str = "") -> pb.Job:
        """Puts a paused job back in the queue; it goes on from its newest checkpoint, in so many processes if told."""
        request = pb.ResumeJobRequest(
            request_id=request_id or new_request_id(), name=full_name("jobs", job), ranks=ranks
        )
        return (self._wire.call(self._stub.ResumeJob, request)).job

    def delete(self, job: str, *, request_id: str = "") -> int:
        """Removes an ended job; returns the bytes freed. Its artifacts stay."""
        request = pb.DeleteJobRequest(request_id=request_id or new_request_id(), name=full_name("jobs", job))
        return (self._wire.call(self._stub.DeleteJob, request)).freed_bytes

    def templates(self) -> Sequence[pb.JobTemplate]:
        """The named templates."""
        return (self._wire.call(self._stub.ListTemplates, pb.ListTemplatesRequest())).templates

    def objectives(self) -> Sequence[pb.ObjectiveKind]:
        """What a job may learn, plug-ins too."""
        return (self._wire.call(self._stub.ListObjectives, pb.ListObjectivesRequest())).objectives
