"""The recipe: a QLoRA run from the order to the adapter, top to bottom.

Law of this room: reads the sealed ledger and nothing else; writes only into its
attempt's folder; tells a fact before it goes on. The same order gives the same
bytes on a CPU with the same threads, cut and resumed or not.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import torch

from qlorad.v1 import trainer_pb2
from services.common import facts
from services.common.errors import corrupt
from services.common.frames.v1 import training_pb2
from services.common.prompt import ledger, tally
from services.common.shelf import Shelf
from services.common.worker.load import load_base
from services.trainer import launch
from services.trainer.guards import SMOOTH
from services.trainer.plan import Form, chosen_of, decide, form_of, use
from services.trainer.worker import checkpoint, device_facts, engines, losses
from services.trainer.worker.admission import admit, stay_within
from services.trainer.worker.aim import aim_of
from services.trainer.worker.batches import Plan, per_step_of
from services.trainer.worker.evaluation import ends_early, evaluate, judged
from services.trainer.worker.facts import Cancelled, Teller
from services.trainer.worker.fast.install import install
from services.trainer.worker.lora import with_lora
from services.trainer.worker.results import describe, finish, write_checkpoint
from services.trainer.worker.step import BadData, Troubled, after_step, check_epoch, one_step, tell_step

METHODS = {
    trainer_pb2.QUANTIZATION_METHOD_NF4: "nf4",
    trainer_pb2.QUANTIZATION_METHOD_INT8: "int8",
    trainer_pb2.QUANTIZATION_METHOD_NONE: "none",
}
TYPES = {
    trainer_pb2.COMPUTE_TYPE_BF16: "bf16",
    trainer_pb2.COMPUTE_TYPE_FP32: "fp32",
    trainer_pb2.COMPUTE_TYPE_FP16: "fp16",
}


def train(order: training_pb2.Order, teller: Teller) -> None:
    """Runs the whole order. Raises Cancelled when asked to stop."""
    spec, begun = trainer_pb2.TrainSpec(), time.monotonic()
    spec.CopyFrom(order.spec)  # what device and memory decide is written into it, and told by Planned
    torch.set_num_threads(launch.threads_of(spec))
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

    # The device: what it cannot do as it was asked is done otherwise, and told.
    known = facts.from_manifest(facts.ModelFacts, base_artifact.manifest)
    if not order.checkpoint_digest:  # later attempts do as the first one did
        _settle(spec, order.device, known, teller)

    # The model: frozen base, fresh LoRA weights from the seed.
    teller.stop_if_asked()
    teller.say("loading the base")
    method, compute = spec.quantization.method, spec.quantization.compute_type
    base = load_base(
        base_artifact.payload, METHODS[method], spec.quantization.double_quantization, TYPES[compute], order.device
    )
    torch.manual_seed(spec.seed)
    model = with_lora(base, spec)
    slow = install(model, spec)
    if slow:
        teller.say(f"the model's own forward is used: {slow}")
    loss_of, why = losses.of(model, aim_of(spec, base_artifact.payload, known.vocabulary))
    if why:
        teller.say(f"all logits are held at once: {why}")

    # The memory: what a full micro-batch takes is measured before the first step.
    if spec.parallelism.ranks <= 1 and not order.checkpoint_digest:
        admit(model, loss_of, rows, spec, base_artifact.payload, known, order.device, teller)

    # The plan: fixed before the first step, the same on every attempt.
    plan = _plan(spec, rows.lengths().tolist(), teller)
    engine = engines.of(model, spec, loss_of)
    loss_of = engine.loss
    if engine.world > 1:
        teller.say(engine.holds())
    total = plan.total_steps()
    teller.tell(
        training_pb2.Fact(
            planned=trainer_pb2.Planned(
                ledger=told,
                total_steps=total,
                trainable_parameters=engine.trained,
                base_parameters=known.parameters,
                device=order.device,
                threads=torch.get_num_threads(),
                packing_efficiency=plan.efficiency(),
                chosen=chosen_of(spec),
            )
        )
    )
    about = describe(order, base_artifact, told, known, engine.trained)

    # The start: from nothing, or from the last sealed checkpoint.
    progress, best = checkpoint.Progress(job=order.job), None
    wishes, keeps_best = spec.evaluation, spec.evaluation.keep_best_adapter and len(held_out) > 0

    def assess() -> bool:
        """Evaluates where the run is; True where it has the lowest loss so far and that is to be kept."""
        nonlocal progress, best
        loss = evaluate(model, loss_of, held_out, progress.step, spec, order.device, engine, teller)
        progress = judged(progress, loss, wishes.min_improvement)
        lowest = keeps_best and 0 < progress.step == progress.best_step
        if lowest:
            best = {name: weight.cpu().clone() for name, weight in engine.weights().items()}
        return lowest

    if order.checkpoint_digest:
        saved = shelf.open("checkpoints", order.checkpoint_digest, verify=True)
        progress = checkpoint.read(saved.payload, order.job, engine)
        teller.say(f"goes on from step {progress.step}")
        if progress.evaluated < 0:  # it was written before this was noted
            progress = dataclasses.replace(progress, evaluated=min(order.evaluated_step, progress.step))
        if keeps_best and progress.best_step:
            best = _best_so_far(shelf, order, progress, engine)
        if _due(wishes.every_steps, progress.step) and progress.evaluated < progress.step and len(held_out):
            assess()  # the last attempt ended between this step and its evaluation
    elif len(held_out):
        assess()

    # The loop, and the last evaluation. Whoever asks to stop finds the newest whole step in a checkpoint.
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
            if ends_early(progress, wishes.patience):
                end = trainer_pb2.END_REASON_EARLY_STOP
                break
            if late:
                end = trainer_pb2.END_REASON_TIME_LIMIT
                break
            model.train()
            done = one_step(engine, loss_of, rows, step, total, spec, order.device, teller, progress)
            rng = checkpoint.get_rng(order.device)
            taken = time.monotonic() - clock
            mean = SMOOTH * mean + (1 - SMOOTH) * taken if mean else taken
            progress = after_step(progress, step, done)
            tell_step(teller, step, total, done, progress, taken, mean, order.device)
            stay_within(spec.memory.budget_bytes, order.device)
            if step.index + 1 == step.of:
                teller.say(check_epoch(step.epoch, progress, counts, tally.text_of(rows.rows_number())))
            lowest = _due(wishes.every_steps, step.number) and len(held_out) > 0 and assess()
            if lowest or _due(spec.checkpoints.every_steps, step.number):
                write_checkpoint(progress, engine, rng, about, teller)
                saved_at = step.number
        if len(held_out) and progress.evaluated != progress.step:
            assess()
    except (Cancelled, Troubled) as stop:
        engine.forget()
        if saved_at != progress.step and (progress.step or isinstance(stop, Cancelled)):
            write_checkpoint(progress, engine, rng, about, teller)
        if isinstance(stop, Troubled):
            raise
        teller.tell(training_pb2.Fact(stopped=training_pb2.Stopped(step=progress.step)))
        return

    # The end: last checkpoint, the adapter.
    if saved_at != progress.step:
        write_checkpoint(progress, engine, rng, about, teller)
    weights = engine.weights()
    if best is not None and progress.best_step != progress.step:
        weights = best
        teller.say(f"the adapter is that of step {progress.best_step}, hold-out loss {progress.best_loss:.6g}")
    if engine.rank == 0:
        finish(end, weights, about, base_artifact, teller)


def _settle(spec: trainer_pb2.TrainSpec, device: str, known: facts.ModelFacts, teller: Teller) -> None:
    """Writes what the device can do of the spec into it; tells of what it cannot."""

    def weights(form: Form) -> int:
        other = trainer_pb2.TrainSpec()
        use(other, form)
        return launch.weight_bytes(known, other)

    decided = decide(form_of(spec), device_facts.gather(device), weights)
    use(spec, decided.used)
    for fallback in decided.fallbacks:
        teller.tell(training_pb2.Fact(fallback=fallback))


def _plan(spec: trainer_pb2.TrainSpec, lengths: list[int], teller: Teller) -> Plan:
    """Every step; where a step's tokens are told, what it takes to have them is written into the spec."""
    ranks = max(1, spec.parallelism.ranks)
    plan = Plan(
        lengths, spec.seed, spec.data.packing, spec.data.micro_batch_tokens,
        spec.data.accumulation * ranks, spec.schedule.max_steps, spec.schedule.epochs, spec.data.length_grouping,
    )  # fmt: skip
    if not spec.data.accumulation:
        plan.per_step, enough = per_step_of(plan, spec.data.step_tokens, ranks)
        spec.data.accumulation = plan.per_step // ranks
        if not enough:
            fallback = trainer_pb2.Fallback(
                asked=f"steps of at least {spec.data.step_tokens} tokens",
                used=f"an epoch a step, {sum(lengths)} tokens",
                why="a step never crosses an epoch",
            )
            teller.tell(training_pb2.Fact(fallback=fallback))
    return plan


def _best_so_far(shelf: Shelf, order: training_pb2.Order, progress: checkpoint.Progress, engine) -> dict:
    """The adapter of the lowest hold-out loss, from the checkpoint that was written for it."""
    if progress.best_step == progress.step:
        return {name: weight.cpu().clone() for name, weight in engine.weights().items()}
    saved = shelf.open("checkpoints", order.best_checkpoint_digest, verify=True)
    weights, step = checkpoint.read_weights(saved.payload)
    if step != progress.best_step:
        raise corrupt("checkpoint", f"is of step {step}, the lowest hold-out loss was at {progress.best_step}")
    return weights


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _progress(teller: Teller):
    """Tells of the ledger's stages once each; looks for the wish to stop on the way."""
    seen: set[str] = set()

    def tell(stage: str, done: int, total: int) -> None:
        teller.stop_if_asked()
        if stage not in seen:
            seen.add(stage)
            teller.say(f"ledger: {stage}" + (f" {total} rows" if total else ""))

    return tell
