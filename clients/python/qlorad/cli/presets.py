"""`qlorad preset`: tasks in words."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlorad.cli import output as out
from qlorad.cli import sampling
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.v1 import inference_pb2

app = typer.Typer(help="List, make and delete presets: tasks in words.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A preset's name.")]


@app.command("list")
def list_(output: Output = Format.table) -> None:
    """Lists presets, shipped ones first."""
    columns: list[out.Column] = [
        ("NAME", lambda p: out.bare(p.name)),
        ("SHIPPED", lambda p: "yes" if p.is_shipped else ""),
        ("OPTIONS", _options),
        ("DESCRIPTION", lambda p: p.description),
    ]
    with connected() as client:
        out.many(output, "presets", client.inference.presets(), columns)


@app.command("show")
def show(name: Name, output: Output = Format.table) -> None:
    """Shows the words of a preset."""
    from qlorad import errors
    from qlorad._wire_core import full_name

    wanted = full_name("presets", name)
    with connected() as client:
        found = next((p for p in client.inference.presets() if p.name == wanted), None)
    if found is None:
        raise errors.NotFound(f"{wanted!r} does not exist; see `qlorad preset list`", resource=wanted)
    _show(output, found)


@app.command("create")
@sampling.options
def create(
    name: Name,
    template: Annotated[str, typer.Option(help="The user's turn, with {input} once; @FILE reads it from a file.")],
    system: Annotated[str, typer.Option(help="Standing instructions; @FILE reads them from a file.")] = "",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    *,
    how: dict[str, Any],
    output: Output = Format.table,
) -> None:
    """Keeps a preset."""
    with connected() as client:
        made = client.inference.create_preset(
            name, _words("--template", template), description=description, system=_words("--system", system), **how
        )
    _show(output, made)


@app.command("delete")
def delete(name: Name, output: Output = Format.table) -> None:
    """Forgets a preset of one's own."""
    with connected() as client:
        client.inference.delete_preset(name)
    if output is not Format.table:
        out.emit_json({"deleted": name})
    else:
        print(f"{name} is gone")


def _show(output: Format, preset: inference_pb2.Preset) -> None:
    rows = [
        ("name", preset.name),
        ("description", preset.description),
        ("system", preset.system),
        ("template", preset.template),
        ("options", _options(preset)),
        ("shipped", "yes" if preset.is_shipped else ""),
    ]
    out.one(output, preset, rows)


def _options(preset: inference_pb2.Preset) -> str:
    return options_line(preset.options)


def options_line(options: inference_pb2.GenerationOptions) -> str:
    """Options that are set, as in "max_tokens 320, temperature 0.2"."""
    told = []
    for field, value in options.ListFields():
        shown = (
            ", ".join(map(repr, value)) if field.is_repeated else f"{value:g}" if isinstance(value, float) else value
        )
        told.append(f"{field.name} {shown}")
    return ", ".join(told)


def _words(option: str, text: str) -> str:
    from qlorad import errors

    if not text.startswith("@"):
        return text
    try:
        return pathlib.Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise errors.invalid(option, text, f"a text, or @FILE with UTF-8 text that can be read ({e})") from None
