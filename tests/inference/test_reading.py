"""What the engine reads of a request, before the model is asked anything."""

from __future__ import annotations

import pathlib

import pytest

from qlorad.v1 import messages_pb2
from services.common.errors import Fault
from services.common.frames.v1 import engine_pb2
from services.common.shelf import Shelf
from services.inference.messages import MAX_TOLD
from services.inference.worker.reading import Reader
from tests.inference.kit import turn


@pytest.fixture
def reader(starter_home: pathlib.Path) -> Reader:
    """The starter's, with a context in which everything fits."""
    made = Reader(
        "models/starter-test", Shelf(starter_home / "store").open("models", "starter-test").payload, "2026-01-31"
    )
    made.context_tokens, made.vocabulary = 1 << 30, 1 << 30
    return made


def test_a_score_that_no_client_takes_is_refused_before_it_is_computed(reader: Reader) -> None:
    text = "\x01" * 30_000
    with pytest.raises(Fault, match="alternatives: got 20 for each of 30000 tokens"):
        reader.scored(engine_pb2.EngineScore(prompt=text, alternatives=20))
    assert len(reader.scored(engine_pb2.EngineScore(prompt=text, alternatives=15))[0]) == 30_000


def test_a_rendering_that_no_client_takes_is_refused(reader: Reader) -> None:
    said = messages_pb2.Conversation(messages=[turn(messages_pb2.ROLE_USER, "\x01" * MAX_TOLD)])
    with pytest.raises(Fault, match="conversation: got 500"):
        reader.rendered(engine_pb2.EngineRender(conversation=said))
