"""`qlorad job`: training jobs."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import output as out
from qlorad.cli import parameters
from qlorad.cli.output import Format, Output
from qlorad.cli.session import connected, pairs

if TYPE_CHECKING:
    from qlorad.client import Client
    from qlorad.v1 import trainer_pb2

app = typer.Typer(help="Start, follow, pause and stop training jobs.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A job: its id.")]


@app.command("start")
def start(
    model: Annotated[str, typer.Option(help="The base model.")] = "",
    dataset: Annotated[str, typer.Option(help="The dataset.")] = "",
    template: Annotated[str, typer.Option(help="A named template; see `qlorad job templates`.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="PATH=VALUE, as in lora.rank=8; may be repeated.")
    ] = None,
    file: Annotated[pathlib.Path | None, typer.Option(help="A YAML file of settings; --set goes over it.")] = None,
    name: Annotated[str, typer.Option(help="The alias that the adapter gets.")] = "",
    job_id: Annotated[str, typer.Option(help="An id of your own.")] = "",
    priority: Annotated[int, typer.Option(help="From -100 to 100; higher goes first.")] = 0,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    experiment: Annotated[str, typer.Option(help="Groups jobs that are compared.")] = "",
    free_serving: Annotated[bool, typer.Option(help="First unload the models that serving holds in memory.")] = False,
    watch: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
    check: Annotated[bool, typer.Option(help="Only check the spec and show it resolved.")] = False,
    output: Output = Format.table,
) -> None:
    """Starts a job and follows it. Ctrl-C detaches; the job goes on."""
    request = _asked(file, set_, model, dataset)
    train = request.spec.train
    train.adapter = f"adapters/{name.removeprefix('adapters/')}" if name else train.adapter
    with connected() as client:
        if free_serving and not check and (loaded := client.inference.loaded_models()):
            freed = sum(client.inference.unload_model(model.digest) for model in loaded)
            out.say(f"serving gave back {out.size(freed)}")
        job = client.jobs.create(
            train,
            template=template or request.template,
            job_id=job_id,
            priority=priority or request.priority,
            labels={**request.labels, **pairs(label or [], "--label")},
            experiment=experiment or request.experiment,
            validate_only=check,
        )
        if not watch or check:
            _show(output, job)
            return
        out.say(f"{job.name} is {_state(job)}")
        _follow(client, job.name, output, 0)


@app.command("estimate")
def estimate(
    model: Annotated[str, typer.Option(help="The base model.")] = "",
    dataset: Annotated[str, typer.Option(help="The dataset.")] = "",
    template: Annotated[str, typer.Option(help="A named template; see `qlorad job templates`.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="PATH=VALUE, as in lora.rank=8; may be repeated.")
    ] = None,
    file: Annotated[pathlib.Path | None, typer.Option(help="A YAML file of settings; --set goes over it.")] = None,
    output: Output = Format.table,
) -> None:
    """Tells what a job would take, by part, and what fits 8, 12, 16 and 24 GB. Starts nothing."""
    request = _asked(file, set_, model, dataset)
    with connected() as client:
        told = client.jobs.estimate(request.spec.train, template=template or request.template)
    if output is not Format.table:
        out.emit_json(out.as_dict(told))
        return
    rows = [[p.name, out.size(p.size_bytes), p.made_of] for p in told.memory]
    each = f", {told.processes} processes of the above" if told.processes > 1 else ""
    taken_back = told.memory_bytes - told.needed_bytes
    given = f"; {out.size(taken_back)} of it the system takes back when memory is short" if taken_back else ""
    rows.append(["in all", out.size(told.memory_bytes), f"on {told.device}{each}{given}"])
    out.table(["MEMORY", "SIZE", "WHAT IT IS"], rows)
    print()
    rows = [[p.name, out.size(p.size_bytes), p.made_of] for p in told.disk]
    out.table(["DISK, AT MOST", "SIZE", "WHAT IT IS"], [*rows, ["in all", out.size(told.disk_bytes), ""]])
    print()
    rows = [
        [
            f"{f.budget_bytes / 1e9:g} GB",
            str(f.micro_batch_tokens or "none"),
            f"{f.needed_bytes / 1e9:.2f} GB",
            f.advice,
        ]
        for f in told.fits
    ]
    out.table(["BUDGET", "MICRO-BATCH", "NEEDS", "WHAT TO DO"], rows)


@app.command("list")
def list_(
    state: Annotated[list[str] | None, typer.Option(help="Only these, as in running; may be repeated.")] = None,
    experiment: Annotated[str, typer.Option(help="Only of this experiment.")] = "",
    output: Output = Format.table,
) -> None:
    """Lists jobs, newest first."""
    columns: list[out.Column] = [
        ("JOB", lambda j: j.name.removeprefix("jobs/")),
        ("STATE", lambda j: _state(j)),
        ("STEP", lambda j: f"{j.metrics.step}/{j.total_steps}" if j.total_steps else ""),
        ("LOSS", lambda j: f"{j.metrics.loss_smoothed:.4f}" if j.metrics.step else ""),
        ("ATTEMPT", lambda j: str(j.attempt or "")),
        ("QUEUE", lambda j: _queue(j.queue) if j.HasField("queue") else ""),
        ("CREATED", lambda j: out.when(j.create_time)),
        ("ADAPTER", lambda j: j.result.adapter.removeprefix("adapters/") or out.short(j.result.adapter_digest)),
    ]
    with connected() as client:
        found = client.jobs.list(states=state or [], experiment=experiment)
        out.many(output, "jobs", found, columns, "no job yet; `qlorad job start --model M --dataset D`")


@app.command("show")
def show(name: Name, output: Output = Format.table) -> None:
    """Shows one job."""
    with connected() as client:
        _show(output, client.jobs.get(name))


@app.command("watch")
def watch(
    name: Name,
    after: Annotated[int, typer.Option(min=0, help="Begin after this event; 0 = from the start.")] = 0,
    output: Output = Format.table,
) -> None:
    """Follows a job until it ends. Ctrl-C detaches; the job goes on."""
    with connected() as client:
        _follow(client, name, output, after)


@app.command("log")
def log(
    name: Name,
    attempt: Annotated[int, typer.Option(min=0, help="Which attempt; 0 = the newest.")] = 0,
    follow: Annotated[bool, typer.Option(help="Go on as long as the attempt does.")] = False,
) -> None:
    """Prints what a job's worker wrote: its own words, without what looks like a credential."""
    with connected() as client:
        for text in client.jobs.log(name, attempt=attempt, follow=follow):
            print(text, end="", flush=True)


@app.command("checkpoints")
def checkpoints(name: Name, output: Output = Format.table) -> None:
    """Lists the checkpoints that a job keeps."""
    from qlorad.v1 import trainer_pb2 as pb

    columns: list[out.Column] = [
        ("STEP", lambda c: str(c.step)),
        ("DIGEST", lambda c: out.short(c.digest)),
        ("SIZE", lambda c: out.size(c.size_bytes)),
        ("HOLD-OUT LOSS", lambda c: f"{c.eval_loss:.4f}" if c.HasField("eval_loss") else ""),
        ("KEPT AS", lambda c: ", ".join(out.word(pb.KeptAs, "KEPT_AS_", why).lower() for why in c.kept_as)),
        ("SEALED", lambda c: out.when(c.create_time)),
    ]
    with connected() as client:
        found = client.jobs.checkpoints(name)
        out.many(output, "checkpoints", found, columns, "no checkpoint yet")


@app.command("publish")
def publish(
    name: Name,
    step: Annotated[int, typer.Option(min=0, help="The checkpoint's step; 0 = the newest.")] = 0,
    adapter: Annotated[str, typer.Option("--name", help="The alias that the adapter gets.")] = "",
    output: Output = Format.table,
) -> None:
    """Makes an adapter of a checkpoint, while the job runs or later."""
    from qlorad import errors

    with connected() as client:
        if not step:
            kept = client.jobs.checkpoints(name)
            if not kept:
                raise errors.NotFound(f"{name} keeps no checkpoint yet", reason="NOT_FOUND")
            step = kept[-1].step
        made = client.jobs.publish(name, step, adapter=adapter)
    out.one(output, made, [("adapter", made.adapter), ("digest", made.digest), ("size", out.size(made.size_bytes))])


@app.command("cancel")
def cancel(name: Name, output: Output = Format.table) -> None:
    """Stops a job and keeps its work."""
    with connected() as client:
        _show(output, client.jobs.cancel(name))


@app.command("pause")
def pause(name: Name, output: Output = Format.table) -> None:
    """Holds a job back and keeps its work; the device becomes free."""
    with connected() as client:
        _show(output, client.jobs.pause(name))


@app.command("resume")
def resume(
    name: Name,
    ranks: Annotated[int | None, typer.Option(min=1, help="Go on in so many processes.")] = None,
    output: Output = Format.table,
) -> None:
    """Puts a paused job back in the queue; it goes on where it was."""
    with connected() as client:
        _show(output, client.jobs.resume(name, ranks=ranks))


@app.command("delete")
def delete(name: Name, output: Output = Format.table) -> None:
    """Removes an ended job. Its artifacts stay."""
    with connected() as client:
        out.freed(output, client.jobs.delete(name))


@app.command("templates")
def templates(output: Output = Format.table) -> None:
    """Lists the named templates."""
    columns: list[out.Column] = [
        ("TEMPLATE", lambda t: t.name),
        ("EXTENDS", lambda t: t.extends),
        ("FOR", lambda t: t.description),
    ]
    with connected() as client:
        out.many(output, "templates", client.jobs.templates(), columns)


@app.command("objectives")
def objectives(output: Output = Format.table) -> None:
    """Lists what a job may learn (objective in its spec), plug-ins too, with the parameters."""
    columns: list[out.Column] = [
        ("OBJECTIVE", lambda o: o.name),
        ("LEARNS", lambda o: o.description),
        ("PARAMETERS", lambda o: parameters.told(o.parameters_schema_json)),
        ("PACKAGE", lambda o: o.package),
    ]
    with connected() as client:
        out.many(output, "objectives", client.jobs.objectives(), columns)


@app.command("logs")
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    output: Output = Format.table,
) -> None:
    """Prints what the worker wrote and what became of the job."""
    from qlorad.cli import watching

    with connected() as client:
        now = client.jobs.get(name)
        if not now.last_sequence:
            return
        for event in client.jobs.watch(name):
            if output is not Format.table:
                out.emit_json(out.as_dict(event))
            elif event.WhichOneof("fact") != "step":
                print(f"{out.when(event.time)}  {watching.line(event)}", flush=True)
            if event.sequence >= now.last_sequence and not follow:
                return


def _follow(client: Client, name: str, output: Format, after: int) -> None:
    from qlorad import _wire_core
    from qlorad.cli import watching

    bare = name.removeprefix("jobs/")
    try:
        job = watching.follow(client, bare, output, after)
    except KeyboardInterrupt:
        out.say(f"\ndetached; jobs/{bare} goes on. To attach again: qlorad job watch {bare}")
        raise typer.Exit(130) from None
    failed = _wire_core.verdict(job)
    if output is Format.json:
        out.emit_json(out.as_dict(job))
    if failed is not None:
        if output is Format.table:
            out.emit_error(output, failed)
            if job.error.log_tail:
                out.say(job.error.log_tail.rstrip())
        raise typer.Exit(6)


def _asked(file: pathlib.Path | None, set_: list[str] | None, model: str, dataset: str) -> trainer_pb2.CreateJobRequest:
    """What the words of the command line ask for, over what the file says."""
    from qlorad.cli import spec as specs
    from qlorad.v1 import trainer_pb2 as pb

    request = _from_file(file) if file else pb.CreateJobRequest()
    train = request.spec.train
    specs.fill(train, specs.words(set_ or []))
    train.model = f"models/{model.removeprefix('models/')}" if model else train.model
    train.dataset = f"datasets/{dataset.removeprefix('datasets/')}" if dataset else train.dataset
    return request


def _from_file(path: pathlib.Path) -> trainer_pb2.CreateJobRequest:
    """A YAML file: settings of TrainSpec, or those under `train`, or a whole CreateJobRequest with `spec`."""
    import yaml

    from qlorad import errors
    from qlorad.cli import spec as specs
    from qlorad.v1 import trainer_pb2 as pb

    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise errors.invalid("--file", str(path), f"a YAML file that can be read ({e})") from None
    if not isinstance(tree, dict):
        raise errors.invalid("--file", str(path), "a mapping of settings")
    request = pb.CreateJobRequest()
    if "spec" in tree:
        request.labels.update({str(k): str(v) for k, v in (tree.pop("labels", None) or {}).items()})
        specs.fill(request, specs.leaves(tree), "--file")
    elif "train" in tree:
        specs.fill(request.spec, specs.leaves(tree), "--file")
    else:
        specs.fill(request.spec.train, specs.leaves(tree), "--file")
    return request


def _show(wanted: Format, job: trainer_pb2.Job) -> None:
    metrics, result = job.metrics, job.result
    train = job.spec.train
    before_after = ""
    if result.HasField("eval_loss_before") and result.HasField("eval_loss_after"):
        before_after = f"{result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"
    rows = [
        ("name", job.name),
        ("state", _state(job)),
        ("error", f"{job.error.reason}: {job.error.message}" if job.error.reason else ""),
        ("queue", _queue(job.queue) if job.HasField("queue") else ""),
        ("attempt", str(job.attempt or "")),
        ("template", job.template),
        ("model", train.model),
        ("dataset", train.dataset),
        ("lora", _lora(train.lora)),
        ("step", f"{metrics.step}/{job.total_steps}" if job.total_steps else ""),
        ("loss", f"{metrics.loss_smoothed:.4f}" if metrics.step else ""),
        ("hold-out loss", before_after),
        ("adapter", " ".join(w for w in (result.adapter_digest, result.adapter) if w)),
        ("checkpoint", result.checkpoint_digest),
        ("created", out.when(job.create_time)),
        ("started", out.when(job.start_time)),
        ("ended", out.when(job.end_time)),
    ]
    out.one(wanted, job, rows)


def _state(job: trainer_pb2.Job) -> str:
    from qlorad.v1 import trainer_pb2 as pb

    return out.word(pb.JobState, "JOB_STATE_", job.state)


def _queue(place: trainer_pb2.QueuePlace) -> str:
    from qlorad.cli import watching

    return watching.queue(place)


def _lora(lora: trainer_pb2.Lora) -> str:
    kinds = ", rank-stabilised" * lora.rslora + ", DoRA" * lora.dora
    return f"rank {lora.rank}, alpha {lora.alpha:g}{kinds}, {','.join(lora.target_modules.names)}"
