"""A reader that falls behind: tokens come as one, in pieces that any client takes."""

from __future__ import annotations

import pytest

from qlorad.v1 import inference_pb2
from services.common.frames.v1 import engine_pb2
from services.inference.engine import Answers, Report

JOINED = 256


def tokens(ident: int, alternatives: int, width: int) -> Report:
    """What an engine tells of one token."""
    made = engine_pb2.EngineTokens(ids=[ident], text="x" * width)
    told = made.log_probabilities.add(id=ident, log_probability=-1.5)
    for other in range(alternatives):
        told.alternatives.add(id=other, text="y" * width, log_probability=-2.5)
    return Report(call=1, tokens=made)


@pytest.mark.parametrize("waits", [[(1, 0, 3)], [(40, 0, 3), (300, 20, 400), (5, 1, 9)], [(700, 0, 1)]])
async def test_what_waits_is_joined_and_no_piece_is_too_large(waits: list[tuple[int, int, int]]) -> None:
    seen: list[Report] = []
    answers = Answers(seen.append)
    reports = [tokens(n, *how) for n, (count, *how) in enumerate(waits) for _ in range(count)]
    whole = engine_pb2.EngineTokens()
    for report in reports:
        answers.put(report)
        whole.ids.extend(report.tokens.ids)
        whole.text += report.tokens.text
        whole.log_probabilities.extend(report.tokens.log_probabilities)
    answers.put(Report(call=1, ended=engine_pb2.EngineEnded(reason=inference_pb2.FINISH_REASON_LENGTH)))
    joined, pieces = engine_pb2.EngineTokens(), 0
    while (report := await answers.next()).HasField("tokens"):
        assert len(report.tokens.ids) <= JOINED and report.ByteSize() < 4 << 20, "what any client takes by itself"
        pieces += 1
        joined.ids.extend(report.tokens.ids)
        joined.text += report.tokens.text
        joined.log_probabilities.extend(report.tokens.log_probabilities)
    assert joined == whole and len(seen) == len(reports) + 1
    assert pieces == -(-len(reports) // JOINED), "what fits into one comes as one"
