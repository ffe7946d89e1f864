"""`qlorad model`: bases on the shelf and in memory."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import output as out
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected

if TYPE_CHECKING:
    from qlorad.v1 import inference_pb2, registry_pb2

app = typer.Typer(help="Make, import, list and load base models.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A model: its alias or sha256:….")]


@app.command("starter")
def starter(
    size: Annotated[str, typer.Option(help="test (seconds) or demo (minutes).")] = "test",
    name: Annotated[str, typer.Option(help="The alias to give; else starter-test or starter-demo.")] = "",
    output: Output = Format.table,
) -> None:
    """Makes a small base model on the spot, without a download."""
    from qlorad.cli import progress

    with connected() as client, progress.shown(f"starter-{size}") as tell:
        made = client.models.make_starter(size, name=name, progress=tell)
    _show(output, made)


@app.command("import")
def import_(
    path: Annotated[pathlib.Path, typer.Argument(help="A Hugging Face folder on the registry's host.")],
    name: Annotated[str, typer.Option(help="The alias to give.")],
    output: Output = Format.table,
) -> None:
    """Checks and seals a model folder."""
    from qlorad.cli import progress

    with connected() as client, progress.shown(f"models/{name}") as tell:
        made = client.models.import_folder(path, name, progress=tell)
    _show(output, made)


@app.command("list")
def list_(output: Output = Format.table) -> None:
    """Lists models, newest first."""
    columns: list[out.Column] = [
        ("NAME", lambda m: out.bare(m.name)),
        ("STATE", lambda m: _state(m)),
        ("FAMILY", lambda m: m.family),
        ("WEIGHTS", lambda m: out.count(m.parameters)),
        ("SIZE", lambda m: out.size(m.size_bytes)),
        ("NF4", lambda m: out.size(m.nf4_bytes)),
        ("CONTEXT", lambda m: str(m.context_tokens)),
        ("DIGEST", lambda m: out.short(m.digest)),
    ]
    with connected() as client:
        out.many(output, "models", client.models.list(), columns, "no model yet; `qlorad model starter` makes one")


@app.command("show")
def show(name: Name, output: Output = Format.table) -> None:
    """Shows one model."""
    with connected() as client:
        _show(output, client.models.get(name))


@app.command("delete")
def delete(name: Name, output: Output = Format.table) -> None:
    """Removes an alias, and the files once nothing holds them."""
    with connected() as client:
        out.freed(output, client.models.delete(name))


@app.command("load")
def load(
    name: Name,
    precision: Annotated[str, typer.Option(help="nf4, bf16, fp32, int8 or int4; else the daemon chooses.")] = "",
    pin: Annotated[bool, typer.Option("--pin", help="Keep it from making room for others.")] = False,
    output: Output = Format.table,
) -> None:
    """Brings a model into memory."""
    with connected() as client:
        _show_loaded(output, client.inference.load_model(name, precision=precision, pin=pin))


@app.command("unload")
def unload(
    name: Annotated[str, typer.Argument(help="A model; else the one that is loaded.")] = "",
    output: Output = Format.table,
) -> None:
    """Frees a model with its adapters and gives the device back."""
    with connected() as client:
        out.freed(output, client.inference.unload_model(name))


@app.command("loaded")
def loaded(output: Output = Format.table) -> None:
    """Lists models in memory."""
    columns: list[out.Column] = [
        ("MODEL", lambda m: out.bare(m.model)),
        ("PRECISION", lambda m: _precision(m)),
        ("DEVICE", lambda m: m.device),
        ("MEMORY", lambda m: out.size(m.memory_bytes)),
        ("CONTEXT", lambda m: str(m.context_tokens)),
        ("PINNED", lambda m: "yes" if m.pinned else ""),
        ("DIGEST", lambda m: out.short(m.digest)),
    ]
    with connected() as client:
        out.many(output, "models", client.inference.loaded_models(), columns, "no model is loaded")


def _show(wanted: Format, model: registry_pb2.Model) -> None:
    rows = [
        ("name", model.name),
        ("state", _state(model)),
        ("error", model.error),
        ("digest", model.digest),
        ("architecture", model.architecture),
        ("weights", out.count(model.parameters)),
        ("size", f"{out.size(model.size_bytes)}, about {out.size(model.nf4_bytes)} as NF4"),
        ("context", f"{model.context_tokens} tokens, vocabulary {model.vocabulary}"),
        ("target modules", ", ".join(model.target_modules)),
        ("tokenizer", model.tokenizer_digest),
        ("template", model.template_digest + (" with generation marks" if model.template_has_generation_marks else "")),
        ("created", out.when(model.create_time)),
    ]
    out.one(wanted, model, rows)


def _show_loaded(wanted: Format, model: inference_pb2.LoadedModel) -> None:
    rows = [
        ("model", model.model),
        ("digest", model.digest),
        ("precision", _precision(model) + (f" ({model.precision_reason})" if model.precision_reason else "")),
        ("device", model.device),
        ("memory", out.size(model.memory_bytes)),
        ("load", f"{model.load_seconds:.2f} s{', from kept weights' * model.from_prepared}"),
        ("pinned", "yes" if model.pinned else ""),
        ("context", f"{model.context_tokens} tokens"),
    ]
    out.one(wanted, model, rows)


def _state(model: registry_pb2.Model) -> str:
    from qlorad.v1 import registry_pb2 as pb

    return out.word(pb.ModelState, "MODEL_STATE_", model.state)


def _precision(model: inference_pb2.LoadedModel) -> str:
    from qlorad.v1 import inference_pb2 as pb

    return out.word(pb.Precision, "PRECISION_", model.precision).lower()
