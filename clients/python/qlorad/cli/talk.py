"""`qlorad generate`, `chat`, `compare`: ask what is loaded; load what is not."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import output as out
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlorad._messages import Answer, Event
    from qlorad.v1 import messages_pb2

Model = Annotated[str, typer.Option(help="The base; else the one that is loaded, or the adapter's.")]
Adapter = Annotated[str, typer.Option(help="An adapter, or base for none; else the default that switch set.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="At most so many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 = always the likeliest; at most 2.")]
TopP = Annotated[float | None, typer.Option(help="Above 0, at most 1.")]
TopK = Annotated[int | None, typer.Option(min=0, help="0 = all.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same draws.")]
Stop = Annotated[list[str] | None, typer.Option(help="Ends before this; may be repeated.")]
System = Annotated[str, typer.Option(help="Standing instructions.")]


def add_to(app: typer.Typer) -> None:
    """Adds the three commands to the root."""
    app.command("generate")(generate)
    app.command("chat")(chat)
    app.command("compare")(compare)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    adapter: Adapter = "",
    model: Model = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is; no chat template.")] = False,
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    output: Output = Format.table,
) -> None:
    """Answers one prompt, token by token."""
    from qlorad.cli import resident

    text = _read(prompt)
    chosen = _options(max_tokens, temperature, top_p, top_k, seed, stop)
    with connected() as client:
        resident.ready(client, model, [adapter])
        events = (
            client.inference.generate(text, adapter=adapter, **chosen)
            if raw
            else client.inference.chat(_turns(system, text), adapter=adapter, **chosen)
        )
        _stream(output, events)


def chat(
    adapter: Adapter = "",
    model: Model = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    output: Output = Format.table,
) -> None:
    """Talks with a model. /adapter NAME, /base, /reset and /quit are commands; Ctrl-C stops an answer."""
    from qlorad.cli import resident
    from qlorad.cli.conversation import Conversation

    chosen = _options(max_tokens, temperature, top_p, top_k, seed, stop)
    with connected() as client:
        resident.ready(client, model, [adapter])

        def answer(turns: list[messages_pb2.Message], who: str) -> Answer:
            return _stream(output, client.inference.chat(turns, adapter=who, **chosen))

        def load(name: str) -> None:
            resident.adapter(client, name)

        Conversation(system, adapter, answer, load).run(_typed())


def compare(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    adapter: Annotated[list[str], typer.Option(help="An adapter; may be repeated. The base always answers too.")],
    model: Model = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    output: Output = Format.table,
) -> None:
    """Lets the base and adapters answer one prompt, side by side."""
    from qlorad.cli import comparing, resident

    turns = _turns(system, _read(prompt))
    chosen = _options(max_tokens, temperature, top_p, top_k, seed, stop)
    voices = ["base", *(name for name in adapter if name != "base")]
    with connected() as client:
        resident.ready(client, model, voices)
    comparing.run(voices, turns, chosen, output)


def _read(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _turns(system: str, text: str) -> list[messages_pb2.Message]:
    from qlorad._messages import message

    return [*([message("system", system)] if system else []), message("user", text)]


def _options(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or [],
    }


def _stream(output: Format, events: Iterator[Event]) -> Answer:
    """Prints an answer as it comes, in the format asked for, and returns it."""
    from qlorad._messages import Answer
    from qlorad.v1 import inference_pb2 as pb

    answer = Answer()
    with contextlib.closing(events):  # type: ignore[type-var]
        for event in events:
            answer.add(event)
            if output is Format.jsonl:
                out.emit_json({_kind(event): out.as_dict(event)})
            elif output is Format.table and isinstance(event, pb.Delta):
                print(event.text, end="", flush=True)
    if output is Format.json:
        out.emit_json(whole(answer))
    elif output is Format.table:
        print(flush=True)
        if out.terminal(sys.stderr):
            out.say(closing_line(answer))
    return answer


def whole(answer: Answer) -> dict[str, Any]:
    """An answer as plain data."""
    return {
        "text": answer.text,
        "ids": answer.ids,
        "started": out.as_dict(answer.started),
        "finish": out.as_dict(answer.finish),
    }


def closing_line(answer: Answer) -> str:
    """Who answered, and how fast."""
    from qlorad.v1 import inference_pb2 as pb

    done = answer.finish
    who = out.short(answer.started.adapter_digest) or "base"
    pace = done.completion_tokens / done.total_seconds if done.total_seconds > 0 else 0.0
    reason = out.word(pb.FinishReason, "FINISH_REASON_", done.reason).lower()
    first = f"first after {done.first_token_seconds:.2f} s"
    return f"[{who}, {done.completion_tokens} tokens, {pace:.0f} tok/s, {first}, {reason}]"


def _kind(event: Event) -> str:
    return type(event).__name__.lower()


def _typed() -> Iterator[str]:
    """Lines that a person types, with a prompt and line editing on a terminal."""
    if out.terminal(sys.stdin):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
    while True:
        try:
            yield input("> " if out.terminal(sys.stdin) else "")
        except EOFError:
            return
