"""The recipe: a QLoRA run from the order to the adapter, top to bottom.

Law of this room: reads the sealed ledger and nothing else; writes only into its
attempt's folder; tells a fact before it goes on. The same order gives the same
bytes on a CPU with the same threads, cut and resumed or not.
"""

from __future__ import annotations

import pathlib
import time

import torch

from qlorad.v1 import trainer_pb2
from services.common import facts
from services.common.frames.v1 import training_pb2
from services.common.prompt import ledger, tally
from services.common.shelf import Shelf
from services.common.worker.load import load_base
from services.trainer.worker import checkpoint, losses
from services.trainer.worker.batches import Plan
from services.trainer.worker.engines import Ranked, Solo
from services.trainer.worker.evaluation import evaluate
from services.trainer.worker.facts import Cancelled, Teller
from services.trainer.worker.fast.install import install
from services.trainer.worker.lora import with_lora
from services.trainer.worker.results import finish, write_checkpoint
from services.trainer.worker.step import SMOOTH, BadData, after_step, check_epoch, one_step, tell_step


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
    slow = install(model, spec)
    if slow:
        teller.say(f"the model's own forward is used: {slow}")
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


def _progress(teller: Teller):
    """Tells of the ledger's stages once each; looks for the wish to stop on the way."""
    seen: set[str] = set()

    def tell(stage: str, done: int, total: int) -> None:
        teller.stop_if_asked()
        if stage not in seen:
            seen.add(stage)
            teller.say(f"ledger: {stage}" + (f" {total} rows" if total else ""))

    return tell
