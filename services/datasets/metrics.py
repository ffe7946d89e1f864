"""What qlorad-datasets counts.

Law of this room: one object, made in app on the daemon's own registry.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from qlorad.v1 import datasets_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.forms import NAMES

_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200)


class Metrics:
    """Every series of this daemon."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.uploads = Counter(
            "qlorad_datasets_uploads", "Uploads by what became of them.", ["outcome"], registry=registry
        )
        self.upload_bytes = Counter("qlorad_datasets_upload_bytes", "Bytes received in uploads.", registry=registry)
        self.rows = Counter(
            "qlorad_datasets_rows", "Rows by form and what became of them.", ["format", "outcome"], registry=registry
        )
        self.findings = Counter(
            "qlorad_datasets_findings", "Findings by rule and severity.", ["rule", "severity"], registry=registry
        )
        self.stage_seconds = Histogram(
            "qlorad_datasets_stage_seconds",
            "Seconds that a run spent in a stage.",
            ["stage"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.worker_memory = Gauge(
            "qlorad_datasets_worker_peak_bytes", "Largest resident size of the newest ingest worker.", registry=registry
        )
        self.workers = Gauge("qlorad_datasets_workers", "Workers that run now.", ["work"], registry=registry)
        self.worker_seconds = Histogram(
            "qlorad_datasets_worker_seconds",
            "Seconds a worker ran, by how it ended.",
            ["work", "outcome"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.fetches = Counter(
            "qlorad_datasets_fetches",
            "Sources fetched, by kind (hub, folder, web, chroma) and what became of them: done, lost, or a reason.",
            ["source", "outcome"],
            registry=registry,
        )
        self.document_items = Counter(
            "qlorad_datasets_document_items",
            "Items found in documents, by rule, in datasets that were sealed.",
            ["rule"],
            registry=registry,
        )
        for outcome in ("started", "completed", "corrupt"):
            self.uploads.labels(outcome)

    def count_run(self, done: ingest_pb2.IngestDone) -> None:
        """Counts what a worker found, and what it took."""
        for counted in done.finding_counts:
            severity = datasets_pb2.Severity.Name(counted.severity).removeprefix("SEVERITY_").lower()
            self.findings.labels(counted.rule, severity).inc(counted.count)
        for stage, seconds in done.stage_seconds.items():
            self.stage_seconds.labels(stage).observe(seconds)
        self.worker_memory.set(done.peak_memory_bytes)

    def count_refused(self, counts: Iterable[ingest_pb2.FindingCount]) -> None:
        """Counts what a worker found in rows that were refused."""
        for counted in counts:
            severity = datasets_pb2.Severity.Name(counted.severity).removeprefix("SEVERITY_").lower()
            self.findings.labels(counted.rule, severity).inc(counted.count)

    def count_rows(self, form: datasets_pb2.RowFormat.ValueType, stats: datasets_pb2.DatasetStats) -> None:
        """Counts what a sealed dataset was made of."""
        name = NAMES[form]
        for rule, count in stats.document_items.items():
            self.document_items.labels(rule).inc(count)
        self.rows.labels(name, "kept").inc(sum(stats.rows.values()))
        self.rows.labels(name, "skipped").inc(stats.skipped_rows)
        self.rows.labels(name, "duplicate").inc(stats.duplicate_rows)
        self.rows.labels(name, "near_duplicate").inc(stats.near_dropped_rows)
        self.rows.labels(name, "stepped_out").inc(sum(stats.dropped_by_step.values()))
        self.rows.labels(name, "below_score").inc(stats.below_score_papers)
