"""`qlorad score`: likelihoods as a table, or token by token."""

from __future__ import annotations

from collections.abc import Sequence

from qlorad.cli import output as out
from qlorad.cli.output import Format
from qlorad.v1 import inference_pb2 as pb


def show(voices: Sequence[str], told: Sequence[pb.ScoreResponse], tokens: bool, output: Format) -> None:
    """Prints what each says of the text."""
    named = [
        (voice or out.short(answer.adapter_digest) or "base", answer)
        for voice, answer in zip(voices, told, strict=True)
    ]
    if output is Format.jsonl:
        for voice, answer in named:
            out.emit_json({"adapter": voice, **out.as_dict(answer)})
    elif output is Format.json:
        out.emit_json({"scores": [{"adapter": voice, **out.as_dict(answer)} for voice, answer in named]})
    else:
        for voice, answer in named if tokens else ():
            print(f"=== {voice}")
            out.table(["TOKEN", "ID", "LOG-PROBABILITY", "LIKELIEST"], [_token(token) for token in answer.tokens])
        rows = [
            [voice, str(len(a.tokens)), str(a.scored_tokens), f"{a.log_probability:.4f}", f"{a.perplexity:.4f}"]
            for voice, a in named
        ]
        out.table(["ADAPTER", "TOKENS", "SCORED", "LOG-PROBABILITY", "PERPLEXITY"], rows)


def _token(token: pb.ScoredToken) -> list[str]:
    likeliest = ", ".join(f"{a.text!r} {a.log_probability:.2f}" for a in token.alternatives)
    return [repr(token.text), str(token.id), f"{token.log_probability:.4f}" if token.is_scored else "-", likeliest]
