"""How tokens are chosen: what is accepted, and which of several sayings counts.

Law of this room: pure. A request, a preset, an adapter and the house may each
say how; the first that says something about a field is heard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from qlorad.v1 import inference_pb2
from services.common.errors import Violation, show

Options = inference_pb2.GenerationOptions

MAX_STOPS = 8
MAX_STOP_CHARACTERS = 64
MAX_ALTERNATIVES = 20
_LARGEST = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class _Range:
    """What a number may be."""

    field: str
    low: float
    high: float
    accepted: str
    above: bool = False
    """Whether the low end itself is refused."""

    def good(self, value: float) -> bool:
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value <= self.high


_RANGES = (
    _Range("temperature", 0.0, 2.0, "0 to 2"),
    _Range("top_p", 0.0, 1.0, "above 0, at most 1", above=True),
    _Range("min_p", 0.0, 1.0, "0 to 1"),
    _Range("repetition_penalty", 0.0, 2.0, "above 0, at most 2", above=True),
    _Range("presence_penalty", -2.0, 2.0, "-2 to 2"),
    _Range("frequency_penalty", -2.0, 2.0, "-2 to 2"),
    _Range("log_probabilities", 0, MAX_ALTERNATIVES, f"0 to {MAX_ALTERNATIVES}"),
)


def check(options: Options, context_tokens: int = 0, prefix: str = "options") -> list[Violation]:
    """Violations of the options; none if they are fine. `context_tokens` 0 = not known."""
    wrong: list[Violation] = []

    def refuse(field: str, given: object, accepted: str) -> None:
        wrong.append(Violation(f"{prefix}.{field}", show(given), accepted))

    longest = context_tokens or _LARGEST
    if options.HasField("max_tokens") and not 1 <= options.max_tokens <= longest:
        refuse("max_tokens", options.max_tokens, f"1 to {longest}{' (the context)' * bool(context_tokens)}")
    for bound in _RANGES:
        value = getattr(options, bound.field)
        if options.HasField(bound.field) and not bound.good(value):  # type: ignore[arg-type]
            refuse(bound.field, value, bound.accepted)
    if len(options.stop) > MAX_STOPS:
        refuse("stop", f"{len(options.stop)} strings", f"at most {MAX_STOPS}")
    for number, stop in enumerate(options.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            refuse(f"stop[{number}]", f"{len(stop)} characters", f"1 to {MAX_STOP_CHARACTERS} characters")
    return wrong


def house(seed: int) -> Options:
    """What holds where nobody says anything. Log-probabilities are not told."""
    return Options(
        max_tokens=128,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=seed,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )


def resolved(*sayings: Options) -> Options:
    """One saying of several, the weightiest first: field by field, the first that has it; lists whole."""
    answer = Options()
    for saying in reversed(sayings):
        for field, value in saying.ListFields():
            if field.is_repeated:
                answer.ClearField(field.name)  # type: ignore[arg-type]
                getattr(answer, field.name).extend(value)
            else:
                setattr(answer, field.name, value)
    return answer


def within(options: Options, context_tokens: int) -> Options:
    """Inherited options bent to a model: no more tokens than its context. What a request says is never bent."""
    bent = Options()
    bent.CopyFrom(options)
    if context_tokens and bent.max_tokens > context_tokens:
        bent.max_tokens = context_tokens
    return bent


def to_plain(options: Options) -> dict[str, Any]:
    """Options as a manifest keeps them: what is set, by the proto's field names."""
    told: dict[str, Any] = json_format.MessageToDict(options, preserving_proto_field_name=True)
    return told


def from_plain(told: Mapping[str, Any], refuse: Callable[[str], Exception]) -> Options:
    """Options of a manifest, sound; `refuse` makes the error that says what is wrong with them.

    Fields that a later version wrote are passed over.
    """
    try:
        options = json_format.ParseDict(dict(told), Options(), ignore_unknown_fields=True)
    except json_format.ParseError as e:
        raise refuse(f"its generation options are not readable: {e}") from None
    wrong = check(options)
    if wrong:
        raise refuse("its generation options are wrong: " + "; ".join(map(str, wrong)))
    return options
