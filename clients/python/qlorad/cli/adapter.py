"""`qlorad adapter`: adapters on the shelf and in memory."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import output as out
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.v1 import inference_pb2, registry_pb2

app = typer.Typer(help="List, move, load and switch adapters.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="An adapter: its alias or sha256:….")]


@app.command("list")
def list_(
    model: Annotated[str, typer.Option(help="Only adapters of this model.")] = "", output: Output = Format.table
) -> None:
    """Lists adapters, newest first."""
    columns: list[out.Column] = [
        ("NAME", lambda a: out.bare(a.name)),
        ("RANK", lambda a: str(a.rank)),
        ("MODULES", lambda a: ",".join(a.target_modules)),
        ("SIZE", lambda a: out.size(a.size_bytes)),
        ("BASE", lambda a: out.short(a.lineage.base_digest)),
        ("JOBS", lambda a: ",".join(j.removeprefix("jobs/") for j in a.jobs)),
        ("DIGEST", lambda a: out.short(a.digest)),
    ]
    with connected() as client:
        out.many(output, "adapters", client.adapters.list(base_model=model), columns, "no adapter yet")


@app.command("show")
def show(name: Name, output: Output = Format.table) -> None:
    """Shows one adapter."""
    with connected() as client:
        _show(output, client.adapters.get(name))


@app.command("import")
def import_(
    folder: Annotated[pathlib.Path, typer.Argument(help="A PEFT folder on this machine.")],
    base: Annotated[str, typer.Option(help="The model it was trained on.")],
    name: Annotated[str, typer.Option(help="The alias to give.")],
    move: Annotated[bool, typer.Option(help="If the alias exists, move it.")] = False,
    output: Output = Format.table,
) -> None:
    """Checks and seals an adapter folder."""
    with connected() as client:
        _show(output, client.adapters.import_folder(folder, name, base, move_alias=move))


@app.command("download")
def download(
    name: Name,
    to: Annotated[pathlib.Path, typer.Option(help="The folder to write.")],
    output: Output = Format.table,
) -> None:
    """Writes an adapter into a folder that plain peft loads."""
    with connected() as client:
        client.adapters.download(name, to)
    if output is not Format.table:
        out.emit_json({"folder": str(to)})
    else:
        print(f"{name} is in {to}")


@app.command("alias")
def alias(
    alias: Annotated[str, typer.Argument(help="The alias to make or move.")],
    adapter: Annotated[str, typer.Argument(help="The adapter to point to.")],
    generation: Annotated[int | None, typer.Option(min=0, help="Only if it is still this one; 0 = new.")] = None,
    output: Output = Format.table,
) -> None:
    """Points an alias at an adapter, atomically."""
    with connected() as client:
        made = client.adapters.set_alias(alias, adapter, expected_generation=generation)
    out.one(output, made, [("alias", made.name), ("digest", made.digest), ("generation", str(made.generation))])


@app.command("delete")
def delete(name: Name, output: Output = Format.table) -> None:
    """Removes an alias, and the files once nothing holds them."""
    with connected() as client:
        out.freed(output, client.adapters.delete(name))


@app.command("load")
def load(
    name: Name,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it from making room for others.")] = False,
    output: Output = Format.table,
) -> None:
    """Brings an adapter, and its base where need be, into memory."""
    from qlorad.cli import resident

    with connected() as client:
        loaded = resident.adapter(client, name, pin)
    rows = [
        ("adapter", loaded.adapter),
        ("digest", loaded.digest),
        ("rank", str(loaded.rank)),
        ("memory", out.size(loaded.memory_bytes)),
        ("load", f"{loaded.load_seconds:.2f} s"),
        ("effect", f"{loaded.probe_effect:.4g} on a probe's logits"),
    ]
    out.one(output, loaded, rows)


@app.command("unload")
def unload(name: Name, output: Output = Format.table) -> None:
    """Frees an adapter."""
    with connected() as client:
        out.freed(output, client.inference.unload_adapter(name))


@app.command("switch")
def switch(
    name: Annotated[str, typer.Argument(help="An adapter, or base for none.")], output: Output = Format.table
) -> None:
    """Sets the adapter that answers where a request names none; loads it where need be."""
    from qlorad.cli import resident

    with connected() as client:
        if name != "base":
            resident.adapter(client, name)
        made = client.inference.switch_adapter(name)
    rows = [("default", made.digest or "base"), ("before", made.previous_digest or "base")]
    out.one(output, made, rows)


@app.command("loaded")
def loaded(output: Output = Format.table) -> None:
    """Lists adapters in memory."""
    columns: list[out.Column] = [
        ("ADAPTER", lambda a: out.bare(a.adapter)),
        ("STATE", _state),
        ("DEFAULT", lambda a: "yes" if a.is_default else ""),
        ("RANK", lambda a: str(a.rank)),
        ("MEMORY", lambda a: out.size(a.memory_bytes)),
        ("LOADED", lambda a: out.when(a.load_time)),
        ("DIGEST", lambda a: out.short(a.digest)),
    ]
    with connected() as client:
        out.many(output, "adapters", client.inference.loaded_adapters(), columns, "no adapter is loaded")


@app.command("watch")
def watch(output: Output = Format.table) -> None:
    """Tells where each adapter is, and every change as it comes; Ctrl-C ends it."""
    with connected() as client:
        for news in client.inference.watch_adapters():
            if output is not Format.table:
                out.emit_json(out.as_dict(news))
            elif news.HasField("adapter"):
                print(_news(news.adapter), flush=True)


def _news(adapter: inference_pb2.LoadedAdapter) -> str:
    marks = [w for w, there in (("default", adapter.is_default), ("pinned", adapter.pinned)) if there]
    busy = f"{adapter.in_flight} in flight" if adapter.in_flight else ""
    said = ", ".join(w for w in (*marks, busy, adapter.state_reason) if w)
    name = f"{out.bare(adapter.adapter)} ({out.short(adapter.digest)})"
    return f"{_state(adapter):<9}  {name}{': ' * bool(said)}{said}"


def _state(adapter: inference_pb2.LoadedAdapter) -> str:
    from qlorad.v1 import inference_pb2 as pb

    return out.word(pb.AdapterState, "ADAPTER_STATE_", adapter.state)


def _show(wanted: Format, adapter: registry_pb2.Adapter) -> None:
    from qlorad.cli.presets import options_line

    rows = [
        ("name", adapter.name),
        ("digest", adapter.digest),
        ("base", adapter.lineage.base_digest),
        ("template", adapter.lineage.template_digest),
        (
            "rank",
            f"{adapter.rank}, alpha {adapter.alpha:g}{', rank-stabilised' * adapter.rslora}{', DoRA' * adapter.dora}",
        ),
        ("modules", ", ".join(adapter.target_modules)),
        ("weights", out.count(adapter.parameters)),
        ("size", out.size(adapter.size_bytes)),
        ("generation", options_line(adapter.generation)),
        ("jobs", ", ".join(adapter.jobs)),
        ("aliases", ", ".join(f"{a.name} (generation {a.generation})" for a in adapter.aliases)),
        ("created", out.when(adapter.create_time)),
    ]
    out.one(wanted, adapter, rows)
