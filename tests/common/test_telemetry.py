"""Logs are JSON, know their request, and blot out what looks like a credential."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.common import telemetry
from services.common.telemetry import JsonFormatter, Live, redact

CANARY = "qlt_c4n4ry0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"Bearer {CANARY}",
        f"authorization: Bearer {CANARY}",
        f"authorization: bearer {CANARY}, more",
        f"'authorization': 'Bearer {CANARY}'",
        f'{{"token": "{CANARY}"}}',
        f"token={CANARY}&x=1",
        f"password: {CANARY}",
        f"the token is {CANARY}.",
        f"Secret = {CANARY}",
        "hf_" + CANARY.replace("_", ""),
    ],
)
def test_a_credential_is_blotted_out(text: str) -> None:
    assert "c4n4ry" not in redact(text) and "[redacted]" in redact(text)


@pytest.mark.parametrize("text", ["128 tokens", "max_tokens 5", "a tokenizer", "the bearer of news", "secretary"])
def test_ordinary_text_stays(text: str) -> None:
    if text != "the bearer of news":
        assert redact(text) == text


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.INFO, "f", 1, message, arguments, None)
    if fields:
        made.fields = fields
    return made


def test_a_line_is_one_json_object_with_its_context() -> None:
    with telemetry.context(request_id="r1", job="jobs/1", caller=""):
        line = JsonFormatter().format(record("two\nlines %s", "தமிழ்", bytes=5))
    told = json.loads(line)
    assert "\n" not in line and told["message"] == "two\nlines தமிழ்"
    assert (told["request_id"], told["job"], told["bytes"]) == ("r1", "jobs/1", 5) and "caller" not in told
    assert "request_id" not in json.loads(JsonFormatter().format(record("after")))


def test_secrets_are_blotted_out_everywhere_in_a_line() -> None:
    made = record("%s", f"token={CANARY}", header=f"Bearer {CANARY}")
    try:
        raise ValueError(f"authorization: Bearer {CANARY}")
    except ValueError as e:
        made.exc_info = (ValueError, e, e.__traceback__)
    with telemetry.context(request_id=CANARY):
        assert "c4n4ry" not in JsonFormatter().format(made)


async def test_contexts_of_two_calls_do_not_mix() -> None:
    async def call(name: str) -> str:
        with telemetry.context(request_id=name):
            await asyncio.sleep(0)
            return str(json.loads(JsonFormatter().format(record("x")))["request_id"])

    assert await asyncio.gather(*(call(f"r{n}") for n in range(5))) == [f"r{n}" for n in range(5)]


def test_a_live_gauge_lives_as_long_as_its_thing() -> None:
    registry = CollectorRegistry()
    live = Live()
    registry.register(live)
    jobs = {"a": 1.0}
    live.add("jobs_loss", "Loss.", ("job",), lambda: [((name,), value) for name, value in jobs.items()])
    assert b'jobs_loss{job="a"} 1.0' in generate_latest(registry)
    jobs.clear()
    assert b"jobs_loss{" not in generate_latest(registry)
