"""What Prometheus sees of inference.

Law of this room: bounded labels; no adapter, model or request is ever a label.
Who wants to know of one adapter asks ListAdapters or WatchAdapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram

from services.common.errors import Fault, Reason
from services.common.frames.v1 import engine_pb2

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)


class Metrics:
    """Counters and histograms; gauges are read live, see gauges."""

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
        self.queue_wait = Histogram(
            "qlorad_inference_queue_seconds",
            "Seconds that requests waited in an engine for a row.",
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
        self.losses = Counter("qlorad_inference_engine_losses", "Engines that died by themselves.", registry=registry)
        self.restarts = Counter(
            "qlorad_inference_engine_restarts", "Engines that came back after a loss.", registry=registry
        )
        self.loads = Counter(
            "qlorad_inference_loads",
            "Bases and adapters brought into memory, refused (rejected) or not brought for another reason (failed).",
            ("kind", "result"),
            registry=registry,
        )
        self.load_seconds = Histogram(
            "qlorad_inference_load_seconds",
            "Seconds from asking to being there, proofs included.",
            ("kind",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.evictions = Counter(
            "qlorad_inference_evictions", "Bases and adapters that made room for others.", ("kind",), registry=registry
        )
        self.step_seconds = Histogram(
            "qlorad_inference_step_seconds", "Seconds of one step of an engine.", registry=registry, buckets=_STEPS
        )
        self.step_tokens = Counter(
            "qlorad_inference_step_tokens", "Tokens that went through the model, prompts included.", registry=registry
        )
        self.prefix_hits = Counter(
            "qlorad_inference_prefix_hit_tokens", "Prompt tokens whose keys and values were at hand.", registry=registry
        )
        self.prefix_misses = Counter(
            "qlorad_inference_prefix_miss_tokens", "Prompt tokens that had to be read.", registry=registry
        )

    def step(self, before: engine_pb2.EngineGauges, gauges: engine_pb2.EngineGauges) -> None:
        """Counts one step of an engine; what it counts since its start is told as what came on top."""
        # Without a step in between, the last one is told again.
        if gauges.step_tokens and gauges.step_seconds != before.step_seconds:
            self.step_seconds.observe(gauges.step_seconds)
            self.step_tokens.inc(gauges.step_tokens)
        self.prefix_hits.inc(max(0, gauges.prefix_hit_tokens - before.prefix_hit_tokens))
        self.prefix_misses.inc(max(0, gauges.prefix_miss_tokens - before.prefix_miss_tokens))

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Counts a Fault on its way out."""
        try:
            yield
        except Fault as fault:
            self.refusals.labels(Reason.Name(fault.reason).removeprefix("REASON_")).inc()
            raise
