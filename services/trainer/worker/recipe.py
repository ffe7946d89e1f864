"""The recipe: a QLoRA run from the order to the adapter, top to bottom.

Law of this room: reads the sealed ledger and nothing else; writes only into its
attempt's folder; tells a fact before it goes on. The same order gives the same
bytes on a CPU with the same threads, cut and resumed or not.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import psutil
import torch
from peft import LoraConfig, get_peft_model

from qlorad.v1 import artifacts_pb2, trainer_pb2
from services.common import facts
from services.common.errors import rejected
from services.common.frames.v1 import training_pb2
from services.common.prompt import formats, golden, ledger, tally
from services.common.prompt.render import Renderer
from services.common.safetensors_header import read_model_headers
from services.common.shelf import Shelf
from services.common.worker import adapter
from services.common.worker.load import load_base
from services.trainer.worker import checkpoint, losses
from services.trainer.worker.batches import Plan, Step, pack, pad, rate
from services.trainer.worker.engines import Ranked, Solo
from services.trainer.worker.facts import Cancelled, Teller, synced
from services.trainer.worker.tensors import fed, packed, padded

SMOOTH = 0.9


class NotFinite(Exception):
    """A loss or a gradient that is no number."""


class BadData(Exception):
    """Rows that cannot be trained on."""


class NotTheLedger(Exception):
    """An epoch consumed something else than the ledger says."""


def train(order: training_pb2.Order, teller: Teller) -> None:
    """Runs the whole order. Raises Cancelled when asked to stop."""
    spec, begun = order.spec, time.monotonic()
    torch.set_num_threads(1 if spec.parallelism.ranks > 1 else spec.threads)
    shelf = Shelf(pathlib.Path(order.store))

    # The rows: one sealed ledger, built here if nobody built it before.
    base_artifact = shelf.open("models", spec.model.removeprefix("models/"), verify=True)
    dataset = shelf.open("datasets", spec.dataset.removeprefix("datasets/"), verify=True)
    teller.stop_if_asked()
    sealed = ledger.build(
        shelf, dataset, base_artifact, spec.data.max_length_tokens, spec.data.over_length, _progress(teller),
        spec.data.prompt_format,
    )  # fmt: skip
    reader = ledger.LedgerReader.open(sealed)
    rows = reader.split("train")
    held_out = reader.split("validation") if "validation" in reader.splits else ()
    told = reader.proto()
    counts = next(s for s in told.splits if s.split == "train")
    if not counts.rows:
        raise BadData(f"the train split has no row left of at most {spec.data.max_length_tokens} tokens")

    # The model: frozen base, fresh LoRA weights from the seed.
    teller.stop_if_asked()
    teller.say("loading the base")
    base = load_base(
        base_artifact.payload,
        "nf4" if spec.quantization.method == trainer_pb2.QUANTIZATION_METHOD_NF4 else "none",
        spec.quantization.double_quantization,
        "fp32" if spec.quantization.compute_type == trainer_pb2.COMPUTE_TYPE_FP32 else "bf16",
        order.device,
    )
    torch.manual_seed(spec.seed)
    model = with_lora(base, spec)
    loss_of, why = losses.of(model)
    if why:
        teller.say(f"all logits are held at once: {why}")
    engine = (Ranked if spec.parallelism.ranks > 1 else Solo)(model, spec)

    # The plan: fixed before the first step, the same on every attempt.
    plan = Plan(
        rows.lengths().tolist(), spec.seed, spec.data.packing, spec.data.micro_batch_tokens,
        spec.data.accumulation * engine.world, spec.schedule.max_steps, spec.schedule.epochs,
    )  # fmt: skip
    total = plan.total_steps()
    known = facts.from_manifest(facts.ModelFacts, base_artifact.manifest)
    teller.tell(
        training_pb2.Fact(
            planned=trainer_pb2.Planned(
                ledger=told,
                total_steps=total,
                trainable_parameters=sum(p.numel() for p in engine.parameters.values()),
                base_parameters=known.parameters,
                device=order.device,
                threads=torch.get_num_threads(),
                packing_efficiency=plan.efficiency(),
            )
        )
    )
    if engine.world > 1:
        fallback = trainer_pb2.Fallback(
            asked="adapter weights in fp32",
            used="bf16 with an fp32 master",
            why="DeepSpeed ZeRO-2 computes in one type",
        )
        teller.tell(training_pb2.Fact(fallback=fallback))

    # The start: from nothing, or from the last sealed checkpoint.
    progress = checkpoint.Progress(job=order.job)
    evaluated = -1
    if order.checkpoint_digest:
        saved = shelf.open("checkpoints", order.checkpoint_digest, verify=True)
        progress = checkpoint.read(saved.payload, order.job, engine.parameters, engine.optimizer)
        teller.say(f"goes on from step {progress.step}")
        evaluated, every = min(order.evaluated_step, progress.step), spec.evaluation.every_steps
        if every and progress.step % every == 0 and evaluated < progress.step and len(held_out):
            # The last attempt ended between this step and its evaluation.
            evaluate(model, loss_of, held_out, progress.step, spec, order.device, engine, teller)
            evaluated = progress.step
    elif len(held_out):
        evaluate(model, loss_of, held_out, 0, spec, order.device, engine, teller)

    # The loop, and the last evaluation. Whoever asks to stop finds the newest whole step in a checkpoint.
    keeps = engine.world == 1  # a checkpoint of several ranks is not written yet: such a job starts anew
    end = trainer_pb2.END_REASON_STEPS
    saved_at = progress.step if order.checkpoint_digest else -1
    mean, rng = 0.0, checkpoint.get_rng(order.device)
    try:
        for step in plan.steps(total, after=progress.step):
            clock = time.monotonic()
            over = order.HasField("seconds_left") and clock - begun >= order.seconds_left
            asked, late = engine.total(float(teller.asked_to_stop()), float(over))  # all ranks decide alike
            if asked:
                raise Cancelled
            if late:
                end = trainer_pb2.END_REASON_TIME_LIMIT
                break
            model.train()
            done = one_step(engine, loss_of, rows, step, total, spec, order.device, teller)
            rng = checkpoint.get_rng(order.device)
            taken = time.monotonic() - clock
            mean = SMOOTH * mean + (1 - SMOOTH) * taken if mean else taken
            progress = after_step(progress, step, done)
            tell_step(teller, step, total, done, progress, taken, mean, order.device)
            if step.index + 1 == step.of:
                teller.say(check_epoch(step.epoch, progress, counts, tally.text_of(rows.rows_number())))
            if spec.evaluation.every_steps and step.number % spec.evaluation.every_steps == 0 and len(held_out):
                evaluate(model, loss_of, held_out, step.number, spec, order.device, engine, teller)
                evaluated = step.number
            if spec.checkpoints.every_steps and step.number % spec.checkpoints.every_steps == 0 and keeps:
                write_checkpoint(progress, engine, rng, teller)
                saved_at = step.number
        if len(held_out) and evaluated != progress.step:
            evaluate(model, loss_of, held_out, progress.step, spec, order.device, engine, teller)
    except Cancelled:
        engine.forget()
        if keeps and saved_at != progress.step:
            write_checkpoint(progress, engine, rng, teller)
        teller.tell(training_pb2.Fact(stopped=training_pb2.Stopped(step=progress.step)))
        return

    # The end: last checkpoint, the adapter.
    if keeps and saved_at != progress.step:
        write_checkpoint(progress, engine, rng, teller)
    weights = engine.weights()
    if engine.rank == 0:
        finish(order, end, weights, base_artifact, told, known, teller)


def with_lora(base, spec: trainer_pb2.TrainSpec):
    """The base with LoRA weights in fp32 on the chosen modules."""
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=sorted(spec.lora.target_modules.names),
        use_rslora=spec.lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_A." in name or ".lora_B." in name), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name
    if spec.memory.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# Parts of the loop.


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What one step did."""

    loss: float
    grad_norm: float
    parameter_norm: float
    learning_rate: float
    tokens: int
    trained: int
    """Tokens that carried loss."""
    marked: int
    """Tokens that the ledger marks as trained (plain text: also a first token, which cannot carry loss)."""
    rows: int
    """The number of the rows that went in: see tally.py."""


def one_step(engine, loss_of, rows, step: Step, total: int, spec, device: str, teller: Teller) -> Done:
    """Gradient over the step's micro-batches, then the optimiser."""
    trained = sum(int(rows.mask(r)[1:].sum()) for batch in step.micro_batches for r in batch)
    if not trained:
        raise BadData(f"no token of step {step.number} carries loss (rows {sorted(sum(step.micro_batches, ()))[:8]})")
    lay = packed if spec.data.packing else padded
    sums, number = [0.0, 0.0, 0.0], 0
    for numbers, weight in engine.mine(step.micro_batches):
        if engine.world == 1:
            teller.stop_if_asked()
        batch = lay(rows, numbers, "cpu")
        loss = loss_of({name: t.to(device) for name, t in batch.items()}) * weight
        engine.backward(loss, trained)
        if weight:
            number = tally.plus(number, fed(batch))
            sums[0] += float(loss.detach())
            sums[1] += sum(len(rows.ids(n)) for n in numbers)
            sums[2] += sum(int(rows.mask(n).sum()) for n in numbers)
    value, tokens, marked, *pieces = engine.total(*sums, *tally.pieces(number))
    value /= trained
    if not value - value == 0.0:
        raise NotFinite(f"the loss of step {step.number} is {value}")
    s = spec.schedule
    kind = trainer_pb2.ScheduleKind.Name(s.kind).removeprefix("SCHEDULE_KIND_")
    learning_rate = rate(step.number, total, kind, s.warmup_steps, spec.optimizer.learning_rate)
    norm = engine.step(learning_rate)
    if not norm - norm == 0.0:
        raise NotFinite(f"the gradient's norm of step {step.number} is {norm}")
    with torch.no_grad():
        squares = [float(p.float().pow(2).sum()) for p in engine.parameters.values()]
    return Done(
        value, norm, sum(squares) ** 0.5, learning_rate, int(tokens), trained, int(marked), tally.joined(pieces)
    )


def after_step(before: checkpoint.Progress, step: Step, done: Done) -> checkpoint.Progress:
    """Where the run is after one more step."""
    fresh = step.index == 0
    rows = before.epoch_rows
    if (
        fresh or rows
    ):  # a checkpoint of before this was counted does not tell; then it is not known until the next epoch
        rows = tally.text_of(tally.plus(done.rows, 0 if fresh else tally.number_of(rows)))
    return checkpoint.Progress(
        job=before.job,
        step=step.number,
        loss_average=SMOOTH * before.loss_average + (1 - SMOOTH) * done.loss,
        epoch_tokens=done.tokens + (0 if fresh else before.epoch_tokens),
        epoch_trained=done.marked + (0 if fresh else before.epoch_trained),
        epoch_rows=rows,
    )


def check_epoch(epoch: int, progress: checkpoint.Progress, counts, rows_number: str) -> str:
    """What was consumed in a whole epoch is what the ledger says: NotTheLedger, or a line that tells it."""
    consumed = (progress.epoch_tokens, progress.epoch_trained)
    if consumed != (counts.tokens, counts.trained_tokens):
        raise NotTheLedger(
            f"epoch {epoch + 1} consumed {consumed[0]} tokens ({consumed[1]} trained), "
            f"the ledger has {counts.tokens} ({counts.trained_tokens} trained)"
        )
    if progress.epoch_rows and progress.epoch_rows != rows_number:
        raise NotTheLedger(
            f"epoch {epoch + 1} consumed rows whose number is {progress.epoch_rows}, the ledger's rows have "
            f"{rows_number}: some row differs in its tokens or its mask"
        )
    return (
        f"epoch {epoch + 1} consumed what the ledger says: {counts.rows} rows, {consumed[0]} tokens, "
        f"{consumed[1]} trained, rows number {progress.epoch_rows or 'not told'}"
    )


@torch.no_grad()
def evaluate(model, loss_of, held_out, step: int, spec, device: str, engine, teller: Teller) -> None:
    """Mean loss per trained token on the validation split. Changes nothing that trains."""
    model.eval()
    count = min(len(held_out), spec.evaluation.max_rows or len(held_out))
    lay, cut = (packed, pack) if spec.data.packing else (padded, pad)
    lengths = held_out.lengths().tolist()
    loss, trained = 0.0, 0
    for numbers in cut(range(count), lengths, spec.data.micro_batch_tokens):
        if engine.world == 1:
            teller.stop_if_asked()
        loss += float(loss_of(lay(held_out, numbers, device)))
        trained += sum(int(held_out.mask(n)[1:].sum()) for n in numbers)
    model.train()
    if trained:
        told = trainer_pb2.Evaluated(step=step, loss=loss / trained, rows=count, trained_tokens=trained)
        teller.tell(training_pb2.Fact(evaluated=told))


def write_checkpoint(progress: checkpoint.Progress, engine, rng, teller: Teller) -> None:
    """Writes the full state, then tells of it."""
    name = f"checkpoints/{progress.step}"
    folder = teller.fresh_folder(name)
    checkpoint.write(folder, progress, engine.parameters, engine.optimizer, rng)
    written = training_pb2.CheckpointWritten(step=progress.step, folder=name, files=synced(folder))
    teller.tell(training_pb2.Fact(checkpoint=written))


def tell_step(
    teller: Teller,
    step: Step,
    total: int,
    done: Done,
    progress: checkpoint.Progress,
    taken: float,
    mean: float,
    device: str,
) -> None:
    """The facts about a step."""
    metrics = trainer_pb2.StepMetrics(
        step=step.number,
        total_steps=total,
        epoch=step.epoch + (step.index + 1) / step.of,
        loss=done.loss,
        loss_smoothed=progress.loss_average / (1 - SMOOTH**step.number),
        grad_norm=done.grad_norm,
        learning_rate=done.learning_rate,
        tokens=done.tokens,
        trained_tokens=done.trained,
        tokens_per_second=done.tokens / max(taken, 1e-9),
        step_seconds=taken,
        host_memory_bytes=psutil.Process().memory_info().rss,
        device_memory_bytes=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0,
        eta_seconds=mean * (total - step.number),
        parameter_norm=done.parameter_norm,
    )
    teller.tell(training_pb2.Fact(step=metrics))


def finish(
    order: training_pb2.Order, end, weights, base_artifact, told, known: facts.ModelFacts, teller: Teller
) -> None:
    """Writes the adapter, checks it as its readers will, tells of it."""
    spec = order.spec
    folder = teller.fresh_folder("adapter")
    plain = {
        n.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B."): w for n, w in weights.items()
    }
    plain = {n: w.to("cpu", torch.float32).contiguous() for n, w in plain.items()}
    fault = adapter.first_fault(plain)
    if fault:
        raise rejected("the trained adapter", fault)
    targets = list(spec.lora.target_modules.names)
    shape = spec.lora
    adapter.save_tensors(folder, plain, shape.rank, shape.alpha, shape.dropout, targets, shape.rslora)
    adapter.check_adapter(folder, read_model_headers(base_artifact.payload))
    renderer = Renderer.open(base_artifact.payload, known.template_date, spec.data.prompt_format)
    about = facts.AdapterFacts(
        rank=shape.rank,
        alpha=shape.alpha,
        target_modules=tuple(sorted(targets)),
        parameters=sum(w.numel() for w in plain.values()),
        golden=golden.make(renderer),
        prompt_format=formats.name_of(spec.data.prompt_format),
        rslora=shape.rslora,
    )
    lineage = artifacts_pb2.Lineage(
        base_digest=base_artifact.digest,
        tokenizer_digest=told.tokenizer_digest,
        template_digest=told.template_digest,
    )
    finished = training_pb2.Finished(
        end=end, folder="adapter", files=synced(folder), lineage=lineage, facts_json=json.dumps(facts.to_facts(about))
    )
    teller.tell(training_pb2.Fact(finished=finished))


def _progress(teller: Teller):
    """Tells of the ledger's stages once each; looks for the wish to stop on the way."""
    seen: set[str] = set()

    def tell(stage: str, done: int, total: int) -> None:
        teller.stop_if_asked()
        if stage not in seen:
            seen.add(stage)
            teller.say(f"ledger: {stage}" + (f" {total} rows" if total else ""))

    return tell
