"""The base and adapters on one prompt: at once and side by side on a terminal, one after another elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from qlorad import aio
from qlorad._messages import Answer
from qlorad.cli import output as out
from qlorad.cli.output import Format
from qlorad.cli.talk import closing_line, whole
from qlorad.v1 import inference_pb2, messages_pb2


def run(voices: Sequence[str], turns: list[messages_pb2.Message], chosen: dict[str, Any], output: Format) -> None:
    """Lets every voice answer and shows it."""
    if output is Format.table and out.terminal(sys.stdout):
        asyncio.run(_at_once(voices, turns, chosen))
    else:
        asyncio.run(_in_turn(voices, turns, chosen, output))


async def _at_once(voices: Sequence[str], turns: list[messages_pb2.Message], chosen: dict[str, Any]) -> None:
    from qlorad.cli import live

    async with aio.connect() as client:
        with live.side_by_side(voices) as shown:

            async def one(index: int) -> None:
                answer = Answer()
                async for event in client.inference.chat(turns, adapter=voices[index], **chosen):
                    answer.add(event)
                    if isinstance(event, inference_pb2.Delta):
                        shown.grow(index, event.text)
                shown.note(index, closing_line(answer))

            await asyncio.gather(*(one(index) for index in range(len(voices))))


async def _in_turn(
    voices: Sequence[str], turns: list[messages_pb2.Message], chosen: dict[str, Any], output: Format
) -> None:
    told = []
    async with aio.connect() as client:
        for voice in voices:
            answer = Answer()
            if output is Format.table:
                print(f"=== {voice}")
            async for event in client.inference.chat(turns, adapter=voice, **chosen):
                answer.add(event)
                if output is Format.table and isinstance(event, inference_pb2.Delta):
                    print(event.text, end="", flush=True)
            told.append({"adapter": voice, **whole(answer)})
            if output is Format.table:
                print(f"\n{closing_line(answer)}", flush=True)
            elif output is Format.jsonl:
                out.emit_json(told[-1])
    if output is Format.json:
        out.emit_json({"answers": told})
