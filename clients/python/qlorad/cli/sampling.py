"""How to choose tokens, as options of a command: said once here, offered by every verb that asks a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

_OPTIONS: dict[str, Any] = {
    "max_tokens": Annotated[int | None, typer.Option(min=1, help="At most so many tokens.")],
    "temperature": Annotated[float | None, typer.Option(help="0 = always the likeliest; at most 2.")],
    "top_p": Annotated[float | None, typer.Option(help="Above 0, at most 1.")],
    "top_k": Annotated[int | None, typer.Option(min=0, help="0 = all.")],
    "min_p": Annotated[float | None, typer.Option(help="Leaves out what is less likely than this part of the best.")],
    "seed": Annotated[int | None, typer.Option(min=0, help="Same seed, same draws.")],
    "stop": Annotated[list[str] | None, typer.Option(help="Ends before this; may be repeated.")],
    "repetition_penalty": Annotated[float | None, typer.Option(help="1 = off; above 0, at most 2.")],
    "presence_penalty": Annotated[float | None, typer.Option(help="-2 to 2; off tokens made before.")],
    "frequency_penalty": Annotated[float | None, typer.Option(help="-2 to 2; off for each time.")],
    "log_probabilities": Annotated[
        int | None, typer.Option(min=0, help="Tell how likely each token was, and so many of the likeliest.")
    ],
    "ignore_end": Annotated[bool, typer.Option("--ignore-end", help="Go on past the end token; for measuring.")],
}


def _is_said(value: Any) -> bool:
    """Whether it was given: 0 is, which a preset's own value must not replace."""
    return value is not None and value is not False and value != []


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with all of these options in the place of its parameter `how`, which is told what was given."""
    shown = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in shown.parameters.values():
        if parameter.name != "how":
            parameters.append(parameter)
            continue
        for name, annotation in _OPTIONS.items():
            default = False if name == "ignore_end" else None
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        how = {name: given.pop(name) for name in _OPTIONS}
        return command(**given, how={name: value for name, value in how.items() if _is_said(value)})

    run.__signature__ = shown.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {}
    return run
