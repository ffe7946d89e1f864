"""Whole answers to greedy requests, kept to be told again.

Law of this room: pure. What is told again is what the engine told for the very
same question to the very same weights, word for word; nothing is kept of a
request that draws, or that asks for log-probabilities. What was asked for longest
ago makes room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from qlorad.v1 import inference_pb2
from services.common.frames.v1 import engine_pb2

_OVERHEAD_BYTES = 256
"""Of a kept answer beside its text and ids."""
_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole answer."""

    prompt_tokens: int
    text: str
    ids: tuple[int, ...]
    reason: inference_pb2.FinishReason.ValueType

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        return _OVERHEAD_BYTES + 4 * len(self.text) + _ID_BYTES * len(self.ids)


def key_of(
    submit: engine_pb2.EngineSubmit, model_digest: str, precision: inference_pb2.Precision.ValueType
) -> bytes | None:
    """What an answer depends on; None if it may not be kept."""
    if submit.options.temperature != 0.0 or submit.options.HasField("log_probabilities"):
        return None
    asked = engine_pb2.EngineSubmit()
    asked.CopyFrom(submit)
    asked.ClearField("priority")
    asked.ClearField("who")
    asked.options.ClearField("seed")  # nothing is drawn
    digest = hashlib.sha256(f"{model_digest}\n{precision}\n".encode())
    digest.update(asked.SerializeToString(deterministic=True))
    return digest.digest()


class GenerationCache:
    """Answers by key, at most so many bytes; 0 = keeps nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: dict[bytes, Kept] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def on(self) -> bool:
        return self._limit > 0

    def get(self, key: bytes | None) -> Kept | None:
        """The answer, which is now the one asked for last."""
        if key is None or key not in self._kept:
            return None
        kept = self._kept.pop(key)
        self._kept[key] = kept
        return kept

    def put(self, key: bytes | None, kept: Kept) -> None:
        """Keeps an answer; one that is larger than the whole room is not kept."""
        if key is None or kept.size > self._limit:
            return
        if key in self._kept:
            self.bytes -= self._kept.pop(key).size
        while self.bytes + kept.size > self._limit:
            self.bytes -= self._kept.pop(next(iter(self._kept))).size
        self._kept[key] = kept
        self.bytes += kept.size


class Recorder:
    """Gathers an answer as it passes, to keep it once it is whole."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []

    def add(self, text: str, ids: Sequence[int]) -> None:
        self._texts.append(text)
        self._ids.extend(ids)

    def whole(self, prompt_tokens: int, reason: inference_pb2.FinishReason.ValueType) -> Kept:
        return Kept(prompt_tokens, "".join(self._texts), tuple(self._ids), reason)
