"""Readers of a stranger's bytes: P17, under hypothesis always, under atheris where it is installed."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlorad.v1 import artifacts_pb2, inference_pb2, messages_pb2
from services.common import artifacts, frames
from tests.house import ROOT
from tests.inference.kit import turn
from tests.inference.parsers import PARSERS
from tests.inference.test_asks import CHECKS

NEEDS_ATHERIS = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
TALK = messages_pb2.Conversation(
    messages=[turn(messages_pb2.ROLE_SYSTEM, "s"), turn(messages_pb2.ROLE_USER, "hello")],
    tools=[messages_pb2.Tool(name="add", description="d", parameters_json='{"a": [1, {"b": null}]}')],
)


def seeds(name: str) -> list[bytes]:
    """What is near to right for a reader."""
    if name == "requests":
        chat = inference_pb2.ChatRequest(conversation=TALK, options=inference_pb2.GenerationOptions(top_p=0.5))
        items = [inference_pb2.BatchItem(prompt="x", adapter="base"), inference_pb2.BatchItem(conversation=TALK)]
        told = {
            inference_pb2.ChatRequest: chat,
            inference_pb2.GenerateRequest: inference_pb2.GenerateRequest(prompt="x", adapter="adapters/ada"),
            inference_pb2.GenerateBatchRequest: inference_pb2.GenerateBatchRequest(items=items),
        }
        return [bytes([number]) + told.get(kind, kind()).SerializeToString() for number, kind in enumerate(CHECKS)]
    if name == "manifests":
        manifest = artifacts_pb2.Manifest(format=artifacts.FORMAT, kind=artifacts_pb2.ARTIFACT_KIND_MODEL)
        return [artifacts.write_manifest(manifest)]
    return {
        "conversations": [TALK.SerializeToString()],
        "frames": [frames.pack(b"body") * 2, bytes(16)],
        "safetensors": [
            b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8)
        ],
        "pages": [b"", b"bWRs"],
        "presets": [inference_pb2.Preset(name="presets/a", template="x {input}").SerializeToString()],
        "limits": [
            b'"*": {max_in_flight: 2}\n',
            b"a: 2001-13-45\n",
            b"a: !!timestamp x\n",
            b"? [a]\n: 1\n",
            b"&a [*a]",
        ],
        "tokens": [b"0" * 64 + b" ada\n"],
    }[name]


@pytest.mark.parametrize("name", PARSERS)
def test_p17_readers_refuse_what_they_cannot_read(name: str) -> None:
    parse, near = PARSERS[name](), seeds(name)
    for seed in near:
        parse(seed)

    @given(st.sampled_from(near), st.integers(0, 200), st.integers(0, 20), st.binary(max_size=24))
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def bent(seed: bytes, at: int, gone: int, come: bytes) -> None:
        at = min(at, len(seed))
        parse(seed[:at] + come + seed[at + gone :])

    bent()


def fuzz(name: str, folder: pathlib.Path, runs: int) -> int:
    """Runs atheris on a reader; how many times it was called. Fails with what was found."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    flags = [f"-runs={runs}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-seed=17"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.inference.fuzzing", name, *flags, f"-artifact_prefix={folder}/", str(corpus)],
        cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = re.search(r"Done (\d+) runs", done.stderr)
    assert found is not None, done.stderr[-2000:]
    return int(found[1])


@NEEDS_ATHERIS
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PARSERS)
def test_p17_readers_under_atheris(name: str, tmp_path: pathlib.Path) -> None:
    assert fuzz(name, tmp_path, 20_000) >= 20_000


@NEEDS_ATHERIS
@pytest.mark.storm
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PARSERS)
def test_p17_readers_storm(name: str, tmp_path: pathlib.Path) -> None:
    assert fuzz(name, tmp_path, 200_000) >= 200_000
