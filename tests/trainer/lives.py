"""A job's life without its daemon: real attempts of the recipe in this process, folded as the daemon folds them.

An attempt can be cut at a fact of one's choice: as kill -9 would cut it, or by the
wish to stop. What the daemon does with facts is done by its own pure code.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from qlorad.v1 import trainer_pb2
from services.common import facts, frames, shards
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf
from services.trainer import jobs, launch, sealing, spec
from services.trainer.app import TEMPLATES, read_templates

Moment = Callable[[training_pb2.Fact], bool]


class Killed(BaseException):
    """As kill -9: no code of the recipe catches it."""


def resolved(home: pathlib.Path, override: trainer_pb2.JobSpec, template: str = "standard") -> trainer_pb2.JobSpec:
    """The spec as CreateJob would have it."""
    shelf, train = Shelf(home / "store"), override.train
    model = shelf.open("models", train.model.removeprefix("models/"))
    known = facts.from_manifest(facts.ModelFacts, model.manifest)
    dataset = shelf.open("datasets", train.dataset.removeprefix("datasets/"))
    rows = {s: len(shards.ShardReader(dataset.payload, s)) for s in shards.splits_in(dataset.payload)}
    made = spec.resolve(
        read_templates(TEMPLATES)[template],
        override,
        spec.ModelKnown(model.digest, known.context_tokens, known.target_modules),
        spec.DatasetKnown(dataset.digest, rows),
        spec.Host("cpu", 1),
    )
    assert not made.violations, made.violations
    return made.spec


class Life:
    """One job."""

    def __init__(self, home: pathlib.Path, folder: pathlib.Path, override: trainer_pb2.JobSpec, **more: str) -> None:
        self.home, self.folder = home, folder
        self.record = training_pb2.JobRecord()
        self.record.job.name = "jobs/lived"
        self.record.job.spec.CopyFrom(resolved(home, override, **more))
        self.events: list[trainer_pb2.Event] = []
        self._write(jobs.moved(self.record, trainer_pb2.JOB_STATE_QUEUED))

    @property
    def job(self) -> trainer_pb2.Job:
        return self.record.job

    def attempt(self, killed: Moment | None = None, stopped: Moment | None = None) -> list[training_pb2.Fact]:
        """One attempt, to its end or to a moment; what it told."""
        from services.trainer.worker import recipe
        from services.trainer.worker.facts import Teller
        from services.trainer.worker.train import error_of

        number = self.job.attempt + 1
        folder = self.folder / str(number)
        folder.mkdir(parents=True)
        self._write(jobs.moved(self.record, trainer_pb2.JOB_STATE_PREPARING))
        started = trainer_pb2.AttemptStarted(attempt=number, from_step=jobs.resume_from(self.record).step)
        self._write(trainer_pb2.Event(attempt_started=started, attempt=number))

        class Cutting(Teller):
            def tell(self, fact: training_pb2.Fact) -> None:
                super().tell(fact)
                if stopped is not None and stopped(fact):
                    (folder / launch.STOP).touch()
                if killed is not None and killed(fact):
                    raise Killed

        teller = Cutting(folder)
        try:
            recipe.train(launch.order_of(self.record, str(self.home / "store"), ["cpu"], 0.0, 0.0), teller)
        except Killed:
            pass
        except Exception as error:
            teller.tell(training_pb2.Fact(failed=error_of(error)))
        bodies, _ = frames.unpack_all((folder / launch.FACTS).read_bytes())
        told = [training_pb2.Fact.FromString(body) for body in bodies]
        for fact in told:
            self._fold(folder, fact)
        if not any(jobs.is_outcome(fact) for fact in told):
            self._write(*jobs.after_lost(self.record, "killed", ""))
        return told

    def adapter(self) -> bytes:
        """The weights that the newest attempt ended with."""
        return (self.folder / str(self.job.attempt) / "adapter" / "adapter_model.safetensors").read_bytes()

    def _fold(self, folder: pathlib.Path, fact: training_pb2.Fact) -> None:
        match fact.WhichOneof("fact"):
            case "checkpoint":
                told = fact.checkpoint
                sealed = sealing.seal_checkpoint(Shelf(self.home / "store"), folder, told, "lived", {})
                event = trainer_pb2.CheckpointSealed(step=told.step, digest=sealed.digest)
                if told.HasField("eval_loss"):
                    event.eval_loss = told.eval_loss
                before = {m.digest for m in self.record.marks}
                self._write(trainer_pb2.Event(checkpoint_sealed=event))
                gone = before - {m.digest for m in self.record.marks}
                sealing.remove_checkpoints(Shelf(self.home / "store"), gone)
            case "stopped":
                for wish in (jobs.wish_to_pause, jobs.wish_to_resume):
                    event = wish(self.record)
                    assert event is not None
                    self._write(event)
                    if wish is jobs.wish_to_pause:
                        self._write(*jobs.after_stopped(self.record))
            case "failed":
                self._write(jobs.moved(self.record, trainer_pb2.JOB_STATE_FAILED, error=fact.failed))
            case _:
                self._write(*jobs.events_of(self.record, fact))

    def _write(self, *events: trainer_pb2.Event) -> None:
        for event in events:
            event.sequence = self.job.last_sequence + 1
            event.time.FromSeconds(event.sequence)
            self.record = jobs.fold(self.record, event)
            self.events.append(event)


def at(kind: str, step: int) -> Moment:
    """The moment at which a fact of a step was told."""
    return lambda fact: fact.WhichOneof("fact") == kind and getattr(fact, kind).step == step
