"""What Prometheus sees of inference.

Law of this room: bounded labels; no adapter, model or request is ever a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram

from services.common.errors import Fault, Reason

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters and histograms; gauges are read live, see app."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.prompt_tokens = Counter(
            "qlorad_inference_prompt_tokens", "Prompt tokens of requests that began.", registry=registry
        )
        self.generated_tokens = Counter("qlorad_inference_generated_tokens", "Tokens made.", registry=registry)
        self.first_token = Histogram(
            "qlorad_inference_first_token_seconds",
            "Seconds from arrival to the first token.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.between_tokens = Histogram(
            "qlorad_inference_inter_token_seconds",
            "Seconds between two tokens of one request.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.refusals = Counter(
            "qlorad_inference_refusals", "Requests and loads that were refused.", ("reason",), registry=registry
        )
        self.finished = Counter(
            "qlorad_inference_finished_requests", "Requests answered to the end.", ("reason",), registry=registry
        )
        self.generation_cache = Counter(
            "qlorad_inference_generation_cache",
            "Greedy requests whose whole answer was at hand, or was not.",
            ("result",),
            registry=registry,
        )
        self.restarts = Counter("qlorad_inference_engine_losses", "Engines that died by themselves.", registry=registry)

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Counts a Fault on its way out."""
        try:
            yield
        except Fault as fault:
            self.refusals.labels(Reason.Name(fault.reason).removeprefix("REASON_")).inc()
            raise
