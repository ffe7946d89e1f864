"""Settings of the engine, turned: keys and values, prompts seen before, kept weights, threads."""

from __future__ import annotations

import pathlib
import shutil

import psutil
import pytest

from qlorad.v1 import inference_pb2
from services.common.shelf import Shelf
from services.inference import kept
from tests.house import house
from tests.inference import kit

LONG = "def add(a, b):\n    return a + b\n\n\n" * 10


@pytest.mark.slow
def test_prompts_seen_before_and_room_for_keys_and_values(serving_home: pathlib.Path) -> None:
    with house(serving_home) as h:
        _, stub = kit.start(h, "--prefix-bytes", str(1 << 20), "--cache-bytes", str(1 << 19))
        kit.load(stub, "ada")
        first = kit.generate(stub, LONG, "adapters/ada", max_tokens=8)
        again = kit.generate(stub, LONG, "adapters/ada", max_tokens=8)
        other = kit.generate(stub, LONG, "base", max_tokens=8)
        assert again.ids == first.ids and first.finish.cached_prompt_tokens == other.finish.cached_prompt_tokens == 0
        assert again.finish.cached_prompt_tokens == first.started.prompt_tokens // 64 * 64 >= 64
        refusal = kit.refused(lambda: stub.Generate(request(LONG, 400), timeout=30))
        assert refusal.reason == "REJECTED" and "keys and values" in refusal.message
        assert kit.generate(stub, LONG, "base", max_tokens=2).ids == other.ids[:2]


@pytest.mark.slow
def test_without_room_for_prompts_every_one_is_read(serving_home: pathlib.Path) -> None:
    with house(serving_home) as h:
        daemon, stub = kit.start(h, "--prefix-bytes", "0", "--threads", "2")
        kit.load(stub)
        answers = [kit.generate(stub, LONG, "base", max_tokens=4) for _ in range(2)]
        assert [a.finish.cached_prompt_tokens for a in answers] == [0, 0]
        assert answers[0].ids == answers[1].ids
        assert kit.engine_of(daemon).num_threads() > threads_of_one(serving_home)


def threads_of_one(home: pathlib.Path) -> int:
    """Threads of an engine that may have one, after it answered."""
    shutil.rmtree(home / "state")
    with house(home) as h:
        daemon, stub = kit.start(h, "--threads", "1")
        kit.load(stub)
        kit.generate(stub, LONG, "base", max_tokens=4)
        found: int = psutil.Process(kit.engine_of(daemon).pid).num_threads()
        return found


@pytest.mark.slow
def test_quantised_weights_are_kept_until_their_model_is_gone(serving_home: pathlib.Path) -> None:
    folder = serving_home / "state" / kept.FOLDER

    def load() -> inference_pb2.LoadedModel:
        stub.UnloadModel(inference_pb2.UnloadModelRequest(model=kit.MODEL)) if loaded() else None
        request = inference_pb2.LoadModelRequest(model=kit.MODEL, precision=inference_pb2.PRECISION_NF4)
        return stub.LoadModel(request, timeout=120).model

    def loaded() -> bool:
        return bool(stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models)

    with house(serving_home) as h:
        _, stub = kit.start(h)
        assert not load().from_prepared
        said = kit.generate(stub, "x", "base", max_tokens=12)
        assert load().from_prepared
        assert kit.generate(stub, "x", "base", max_tokens=12).ids == said.ids
    assert len(list(folder.iterdir())) == 1
    (folder / ("0" * 64 + "-nf4-x")).mkdir()
    with house(serving_home) as h:
        daemon, stub = kit.start(h)
        assert "its model is gone" in daemon.log.read_text()
        assert kit.metric(daemon, "qlorad_inference_prepared_bytes") == kept.total(folder) > 10_000
        assert len(list(folder.iterdir())) == 1
        assert load().from_prepared
    digest = Shelf(serving_home / "store").open("models", "starter-test").digest
    assert kept.sweep(folder, {digest.removeprefix("sha256:")}, 0) == []
    with house(serving_home) as h:
        daemon, stub = kit.start(h, "--prepared-bytes", "1000")
        assert not list(folder.iterdir()) and "more than 1000 bytes are kept" in daemon.log.read_text()
        assert not load().from_prepared and not list(folder.iterdir())
        assert kit.metric(daemon, "qlorad_inference_prepared_bytes") == 0


def request(prompt: str, tokens: int) -> inference_pb2.GenerateRequest:
    options = inference_pb2.GenerationOptions(max_tokens=tokens)
    return inference_pb2.GenerateRequest(prompt=prompt, adapter="base", options=options)
