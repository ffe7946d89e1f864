"""What /metrics of the trainer shows.

Law of this room: read from memory when asked, or counted when an event is on
disk. A series with a job's name lives only as long as the job runs.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from qlorad.v1 import trainer_pb2
from services.common.frames.v1 import training_pb2
from services.common.telemetry import Live
from services.trainer import jobs
from services.trainer.notify import Hub
from services.trainer.runner import Runner

Series = list[tuple[tuple[str, ...], float]]
_STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_WAIT_SECONDS = (1, 10, 60, 300, 1800, 7200, 43200, 172800)
_CHECKPOINT_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)
_CHECKPOINT_BYTES = tuple(float(10**n) for n in range(5, 12))
_RATIOS = (0.5, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.5, 2)


class Meters:
    """What is counted from events. Each is heard once in the life of this process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queued: dict[str, int] = {}
        """Since when a job waits, in nanoseconds, where this process saw it begin to."""
        self._waits = Histogram(
            "qlorad_job_queue_wait_seconds", "Seconds from the queue to a start.", buckets=_WAIT_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._steps = Histogram(
            "qlorad_step_seconds", "Seconds of a step, of all jobs.", buckets=_STEP_SECONDS, registry=registry
        )
        self._tokens = Counter(
            "qlorad_tokens", "Real tokens of all steps; those done again after a loss count again.", registry=registry
        )
        self._checkpoint_seconds = Histogram(
            "qlorad_checkpoint_seconds", "Seconds from the wish for a checkpoint to its seal.",
            buckets=_CHECKPOINT_SECONDS, registry=registry,
        )  # fmt: skip
        self._checkpoint_bytes = Histogram(
            "qlorad_checkpoint_bytes", "Bytes of a checkpoint.", buckets=_CHECKPOINT_BYTES, registry=registry
        )
        self._restarts = Counter("qlorad_job_restarts", "Attempts after a first one.", registry=registry)
        self._ratio = Histogram(
            "qlorad_memory_measured_ratio", "Measured over estimated memory of a job.", buckets=_RATIOS,
            registry=registry,
        )  # fmt: skip

    def take(self, job: str, event: trainer_pb2.Event, record: training_pb2.JobRecord) -> None:
        """Counts an event."""
        match event.WhichOneof("fact"):
            case "state_changed":
                self._moved(job, event)
            case "attempt_started" if event.attempt_started.attempt > 1:
                self._restarts.inc()
            case "step":
                self._steps.observe(event.step.step_seconds)
                self._tokens.inc(event.step.tokens)
            case "checkpoint_sealed":
                self._checkpoint_seconds.observe(event.checkpoint_sealed.seconds)
                self._checkpoint_bytes.observe(event.checkpoint_sealed.size_bytes)
            case "admitted" if event.admitted.predicted_bytes > 0:
                self._ratio.observe(event.admitted.measured_bytes / event.admitted.predicted_bytes)

    def _moved(self, job: str, event: trainer_pb2.Event) -> None:
        if event.state_changed.to == trainer_pb2.JOB_STATE_QUEUED:
            self._queued[job] = event.time.ToNanoseconds()
            return
        since = self._queued.pop(job, None)
        if since is not None and event.state_changed.to == trainer_pb2.JOB_STATE_PREPARING:
            self._waits.observe(max(0, event.time.ToNanoseconds() - since) / 1e9)


def add_metrics(registry: CollectorRegistry, hub: Hub, runner: Runner) -> None:
    """Adds what is read when somebody asks."""

    def by_state() -> Series:
        return [((jobs.word(s),), float(hub.counts[s])) for s in sorted(jobs.LAW)]

    def running(read: Callable[[trainer_pb2.Job], float]) -> Callable[[], Series]:
        return lambda: [
            ((r.job.name.removeprefix("jobs/"),), float(read(r.job)))
            for r in hub.live()
            if r.job.state == trainer_pb2.JOB_STATE_RUNNING and r.job.HasField("metrics")
        ]

    live = Live()
    live.add("qlorad_jobs", "Jobs by state.", ("state",), by_state)
    live.add("qlorad_job_queue_depth", "Jobs that wait.", (), lambda: [((), hub.counts[trainer_pb2.JOB_STATE_QUEUED])])
    for name, help, read in (
        ("loss", "Loss of the newest step.", lambda j: j.metrics.loss),
        ("step", "Newest step.", lambda j: j.metrics.step),
        ("step_seconds", "Seconds of the newest step.", lambda j: j.metrics.step_seconds),
        ("tokens_per_second", "Real tokens per second of the newest step.", lambda j: j.metrics.tokens_per_second),
        ("worker_memory_bytes", "Resident memory of the worker.", lambda j: j.metrics.host_memory_bytes),
        (
            "device_memory_bytes",
            "Peak allocated memory of the device; 0 on a processor.",
            lambda j: j.metrics.device_memory_bytes,
        ),
        ("tokens", "Tokens that went in, over the attempts that count.", lambda j: j.result.tokens),
    ):
        live.add(f"qlorad_job_{name}", help, ("job",), running(read))
    live.add_counter("qlorad_job_attempts_begun", "Attempts begun.", (), lambda: [((), runner.attempts_begun)])
    live.add_counter(
        "qlorad_job_attempts_lost", "Attempts that lost their worker.", (), lambda: [((), runner.attempts_lost)]
    )
    live.add_counter(
        "qlorad_job_attempts_stuck",
        "Attempts ended because they showed no life, or no progress.",
        (),
        lambda: [((), runner.attempts_stuck)],
    )
    live.add_counter("qlorad_job_events_written", "Events written.", (), lambda: [((), hub.events_written)])
    live.add("qlorad_job_watchers", "Open watches.", (), lambda: [((), hub.watchers)])
    registry.register(live)
