"""What /metrics of the trainer shows.

Law of this room: read from memory when asked. A series with a job's name lives
only as long as the job runs.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from qlorad.v1 import trainer_pb2
from services.common.telemetry import Live
from services.trainer import jobs
from services.trainer.notify import Hub
from services.trainer.runner import Runner

Series = list[tuple[tuple[str, ...], float]]


def add_metrics(registry: CollectorRegistry, hub: Hub, runner: Runner) -> None:
    """Adds the trainer's series."""

    def by_state() -> Series:
        return [((jobs.word(s),), float(hub.counts[s])) for s in sorted(jobs.LAW)]

    def running(read: str) -> Series:
        return [
            ((r.job.name.removeprefix("jobs/"),), float(getattr(r.job.metrics, read)))
            for r in hub.live()
            if r.job.state == trainer_pb2.JOB_STATE_RUNNING and r.job.HasField("metrics")
        ]

    live = Live()
    live.add("qlorad_jobs", "Jobs by state.", ("state",), by_state)
    live.add("qlorad_job_queue_depth", "Jobs that wait.", (), lambda: [((), hub.counts[trainer_pb2.JOB_STATE_QUEUED])])
    for name, help, read in (
        ("loss", "Loss of the newest step.", "loss"),
        ("step", "Newest step.", "step"),
        ("step_seconds", "Seconds of the newest step.", "step_seconds"),
        ("tokens_per_second", "Real tokens per second of the newest step.", "tokens_per_second"),
        ("worker_memory_bytes", "Resident memory of the worker.", "host_memory_bytes"),
    ):
        live.add(f"qlorad_job_{name}", help, ("job",), lambda read=read: running(read))  # type: ignore[misc]
    live.add(
        "qlorad_job_tokens",
        "Tokens that went in, over the attempts that count.",
        ("job",),
        lambda: [
            ((r.job.name.removeprefix("jobs/"),), float(r.job.result.tokens))
            for r in hub.live()
            if r.job.state == trainer_pb2.JOB_STATE_RUNNING
        ],
    )
    live.add_counter("qlorad_job_attempts_begun", "Attempts begun.", (), lambda: [((), runner.attempts_begun)])
    live.add_counter(
        "qlorad_job_attempts_lost", "Attempts that lost their worker.", (), lambda: [((), runner.attempts_lost)]
    )
    live.add_counter("qlorad_job_events_written", "Events written.", (), lambda: [((), hub.events_written)])
    live.add("qlorad_job_watchers", "Open watches.", (), lambda: [((), hub.watchers)])
    registry.register(live)
