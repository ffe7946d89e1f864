"""`qlorad generate`, `chat`, `compare`, `score`: ask what is loaded; load what is not."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import output as out
from qlorad.cli import sampling
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlorad._messages import Answer, Event
    from qlorad.v1 import messages_pb2

Model = Annotated[str, typer.Option(help="The base; else the one that is loaded, or the adapter's.")]
Adapter = Annotated[str, typer.Option(help="An adapter, or base for none; else the default that switch set.")]
System = Annotated[str, typer.Option(help="Standing instructions.")]
Preset = Annotated[str, typer.Option(help="Puts the question into this preset's words.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is; no chat template.")]
Priority = Annotated[int, typer.Option(min=-10, max=10, help="Higher goes first in the queue.")]


def add_to(app: typer.Typer) -> None:
    """Adds the four commands to the root."""
    app.command("generate")(sampling.options(generate))
    app.command("chat")(sampling.options(chat))
    app.command("compare")(sampling.options(compare))
    app.command("score")(score)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")] = "",
    file: Annotated[
        pathlib.Path | None, typer.Option(help="JSONL of prompts, - for stdin; answered as a batch, JSONL out.")
    ] = None,
    adapter: Adapter = "",
    model: Model = "",
    raw: Raw = False,
    system: System = "",
    preset: Preset = "",
    priority: Priority = 0,
    *,
    how: dict[str, Any],
    output: Output = Format.table,
) -> int:
    """Answers one prompt, token by token, or a file of them at once."""
    from qlorad import errors
    from qlorad.cli import batch, resident

    if file is not None:
        if prompt or preset:
            raise errors.invalid("--file", str(file), "a file, or PROMPT (with --preset); not both")
        asked = batch.Asked(adapter, model, raw, system, how)
        lines = sys.stdin.read() if str(file) == "-" else _text_of(file)
        with connected() as client:
            return batch.run(client, batch.read(lines, asked), priority, output)
    _alone("--raw", raw, {"--system": system, "--preset": preset})
    if not prompt and out.terminal(sys.stdin):
        raise errors.invalid("PROMPT", prompt, "a prompt, - for stdin, or --file")
    text = _read(prompt or "-")
    with connected() as client:
        resident.ready(client, model, [adapter])
        events = (
            client.inference.generate(text, adapter=adapter, model=model, priority=priority, **how)
            if raw
            else client.inference.chat(
                _turns(system, text), adapter=adapter, model=model, preset=preset, priority=priority, **how
            )
        )
        _stream(output, events)
    return 0


def chat(
    adapter: Adapter = "",
    model: Model = "",
    system: System = "",
    preset: Preset = "",
    *,
    how: dict[str, Any],
    output: Output = Format.table,
) -> None:
    """Talks with a model. /help tells of commands, as /adapter NAME and /compare A B; Ctrl-C stops an answer."""
    from qlorad.cli import comparing, resident
    from qlorad.cli.conversation import Conversation

    with connected() as client:
        resident.ready(client, model, [adapter])

        def answer(turns: list[messages_pb2.Message], who: str) -> Answer:
            return _stream(output, client.inference.chat(turns, adapter=who, model=model, preset=preset, **how))

        def beside(turns: list[messages_pb2.Message], voices: list[str]) -> list[Answer]:
            told = client.inference.compare(turns, voices, model=model, preset=preset, **how)
            return comparing.show(voices, told, output)

        def load(name: str) -> None:
            resident.adapter(client, name)

        Conversation(system, adapter, answer, beside, load).run(_typed())


def compare(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    adapter: Annotated[list[str], typer.Option(help="An adapter; may be repeated. The base always answers too.")],
    model: Model = "",
    raw: Raw = False,
    system: System = "",
    preset: Preset = "",
    priority: Priority = 0,
    *,
    how: dict[str, Any],
    output: Output = Format.table,
) -> int:
    """Lets the base and adapters answer one prompt in one batch, side by side."""
    from qlorad.cli import comparing, resident

    _alone("--raw", raw, {"--system": system, "--preset": preset})
    text = _read(prompt)
    voices = list(dict.fromkeys(["base", *adapter]))
    with connected() as client:
        resident.ready(client, model, voices)
        asked = text if raw else _turns(system, text)
        told = client.inference.compare(asked, voices, raw=raw, model=model, preset=preset, priority=priority, **how)
        answers = comparing.show(voices, told, output)
    return 1 if any(answer.failed is not None for answer in answers) else 0


def score(
    text: Annotated[str, typer.Argument(help="A text, or with --answer the question; - reads it from stdin.")],
    answer: Annotated[str, typer.Option(help="Score this answer to the text, in the chat template.")] = "",
    adapter: Annotated[list[str] | None, typer.Option(help="An adapter, or base; may be repeated.")] = None,
    model: Model = "",
    system: System = "",
    alternatives: Annotated[int, typer.Option(min=0, help="So many of the likeliest in each place.")] = 0,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show each token.")] = False,
    output: Output = Format.table,
) -> None:
    """Tells how likely a text, or an answer, is: log-probability and perplexity."""
    from qlorad._messages import message
    from qlorad.cli import resident, scoring

    _alone("a text without --answer", not answer, {"--system": system})
    asked = _read(text)
    turns = [*_turns(system, asked), message("assistant", answer)] if answer else None
    voices = adapter or [""]
    with connected() as client:
        resident.ready(client, model, voices)
        told = [
            client.inference.score(asked, messages=turns, adapter=voice, model=model, alternatives=alternatives)
            for voice in voices
        ]
    scoring.show(voices, told, tokens, output)


def _alone(what: str, given: bool, others: dict[str, str]) -> None:
    """Refuses words that would have no effect."""
    from qlorad import errors

    for option, value in others.items():
        if given and value:
            raise errors.invalid(option, value, f"nothing together with {what}, which has no turns")


def _read(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _text_of(path: pathlib.Path) -> str:
    from qlorad import errors

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise errors.invalid("--file", str(path), f"a file of UTF-8 text that can be read ({e})") from None


def _turns(system: str, text: str) -> list[messages_pb2.Message]:
    from qlorad._messages import message

    return [*([message("system", system)] if system else []), message("user", text)]


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
    """An answer as plain data; one that failed says why."""
    from qlorad.v1 import errors_pb2

    told: dict[str, Any] = {"text": answer.text, "ids": answer.ids}
    if answer.started.model_digest:
        told["started"] = out.as_dict(answer.started)
    if answer.log_probabilities:
        told["log_probabilities"] = [out.as_dict(token) for token in answer.log_probabilities]
    if answer.failed is None:
        return told | {"finish": out.as_dict(answer.finish)}
    reason = out.word(errors_pb2.Reason, "REASON_", answer.failed.reason)
    error = {"reason": reason, "message": answer.failed.message, "retry_seconds": answer.failed.retry_seconds}
    return told | {"error": error}


def closing_line(answer: Answer) -> str:
    """Who answered, and how fast; or why nobody did."""
    from qlorad.v1 import errors_pb2
    from qlorad.v1 import inference_pb2 as pb

    if answer.failed is not None:
        return f"[{out.word(errors_pb2.Reason, 'REASON_', answer.failed.reason)}: {answer.failed.message}]"
    done = answer.finish
    who = out.short(answer.started.adapter_digest) or "base"
    pace = done.completion_tokens / done.total_seconds if done.total_seconds > 0 else 0.0
    reason = out.word(pb.FinishReason, "FINISH_REASON_", done.reason).lower()
    first = "was at hand" if done.from_cache else f"first after {done.first_token_seconds:.2f} s"
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
