"""Logs and metrics of a daemon.

Law of this room: one JSON object a line on stderr, with request and job ids
from the context and no secrets; one metrics registry a daemon, made in app,
never the library's global one.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_context: contextvars.ContextVar[tuple[tuple[str, str], ...]] = contextvars.ContextVar("log_context", default=())

_SECRET = re.compile(
    r"(?i)(bearer\s+)[A-Za-z0-9._~+/=-]+|(qlt_)[A-Za-z0-9_-]{8,}|(hf_)[A-Za-z0-9]{8,}|((?:token|password|secret|authorization)[\"']?\s*[:=]\s*[\"']?)(?:bearer\s+)?[^\s\"',}]+"
)


def redact(text: str) -> str:
    """The text with anything that looks like a credential blotted out."""
    return _SECRET.sub(lambda m: next(g for g in m.groups() if g is not None) + "[redacted]", text)


@contextlib.contextmanager
def context(**fields: str) -> Iterator[None]:
    """Adds fields to every line logged inside."""
    token = _context.set((*_context.get(), *fields.items()))
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        line.update((k, redact(v)) for k, v in _context.get() if v)
        line.update((k, redact(v) if isinstance(v, str) else v) for k, v in getattr(record, "fields", {}).items())
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def start_logging(level: str) -> None:
    """Sends every logger of this process to stderr as JSON. Called once, by main."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[out], force=True)


def log_id() -> str:
    """An id that ties an INTERNAL error to its log line."""
    return secrets.token_hex(6)


Family = CounterMetricFamily | GaugeMetricFamily
Read = Callable[[], list[tuple[tuple[str, ...], float]]]
"""Pairs of label values and a number."""


class Live(Collector):
    """Series that are read when someone asks, so that one lives only as long as its thing."""

    def __init__(self) -> None:
        self._series: dict[
            str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, tuple[str, ...], Read]
        ] = {}

    def add(self, name: str, help: str, labels: tuple[str, ...], read: Read) -> None:
        """Adds a gauge."""
        self._series[name] = (GaugeMetricFamily, help, labels, read)

    def add_counter(self, name: str, help: str, labels: tuple[str, ...], read: Read) -> None:
        """Adds what only grows while the process lives; shown as NAME_total."""
        self._series[name] = (CounterMetricFamily, help, labels, read)

    def describe(self) -> list[Family]:
        return [kind(n, h, labels=labels) for n, (kind, h, labels, _) in self._series.items()]

    def collect(self) -> Iterator[Family]:
        for name, (kind, help, labels, read) in self._series.items():
            family = kind(name, help, labels=labels)
            for values, number in read():
                family.add_metric(values, number)
            yield family


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> int:
    """Serves /metrics on a daemon thread until the process ends; returns the bound port."""
    server, _ = start_http_server(port, host, registry)
    return server.server_port
