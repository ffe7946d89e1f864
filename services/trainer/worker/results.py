"""What a run leaves: checkpoints and the adapter, each written whole and then told of.

Law of this room: an adapter is checked here as its readers will check it.
"""

from __future__ import annotations

import json
import time

from qlorad.v1 import artifacts_pb2
from services.common import facts, generation
from services.common.errors import rejected
from services.common.frames.v1 import training_pb2
from services.common.prompt import formats, golden
from services.common.prompt.render import Renderer
from services.common.safetensors_header import read_model_headers
from services.common.worker import adapter
from services.trainer.worker import checkpoint
from services.trainer.worker.facts import Teller, synced


def describe(order: training_pb2.Order, base_artifact, told, known: facts.ModelFacts, trained: int) -> checkpoint.About:
    """What the adapter of this run is, its golden renderings with it: made once, told of by every checkpoint."""
    spec = order.spec
    renderer = Renderer.open(base_artifact.payload, known.template_date, spec.data.prompt_format)
    found = facts.AdapterFacts(
        rank=spec.lora.rank,
        alpha=spec.lora.alpha,
        target_modules=tuple(sorted(spec.lora.target_modules.names)),
        parameters=trained,
        golden=golden.make(renderer),
        prompt_format=formats.name_of(spec.data.prompt_format),
        rslora=spec.lora.rslora,
        dora=spec.lora.dora,
        generation=generation.to_plain(spec.generation),
    )
    lineage = artifacts_pb2.Lineage(
        base_digest=base_artifact.digest,
        tokenizer_digest=told.tokenizer_digest,
        template_digest=told.template_digest,
    )
    return checkpoint.About(spec.lora, facts.to_facts(found), lineage)


def write_checkpoint(progress: checkpoint.Progress, engine, rng, about: checkpoint.About, teller: Teller) -> None:
    """Writes the full state, every rank its part; once all lies on disk, tells of it."""
    begun = time.monotonic()
    name = f"checkpoints/{progress.step}"
    folder = teller.attempt / name
    if engine.rank == 0:
        teller.fresh_folder(name)
    engine.barrier()
    checkpoint.write(folder, progress, engine, rng, about)
    engine.barrier()
    if engine.rank == 0:
        written = training_pb2.CheckpointWritten(step=progress.step, folder=name, files=synced(folder))
        if progress.evaluated == progress.step and progress.eval_loss is not None:
            written.eval_loss = progress.eval_loss
        written.seconds = time.monotonic() - begun
        teller.tell(training_pb2.Fact(checkpoint=written))


def finish(end, weights, about: checkpoint.About, base_artifact, teller: Teller) -> None:
    """Writes the adapter, checks it as its readers will, tells of it."""
    folder = teller.fresh_folder("adapter")
    fault = adapter.first_fault(about.write(folder, weights), base_artifact.payload)
    if fault:
        raise rejected("the trained adapter", fault)
    adapter.check_adapter(folder, read_model_headers(base_artifact.payload))
    finished = training_pb2.Finished(
        end=end, folder="adapter", files=synced(folder), lineage=about.lineage, facts_json=json.dumps(about.facts)
    )
    teller.tell(training_pb2.Fact(finished=finished))
