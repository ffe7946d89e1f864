"""What a run leaves: checkpoints and the adapter, each written whole and then told of.

Law of this room: an adapter is checked here as its readers will check it.
"""

from __future__ import annotations

import json

import torch

from qlorad.v1 import artifacts_pb2
from services.common import facts
from services.common.errors import rejected
from services.common.frames.v1 import training_pb2
from services.common.prompt import formats, golden
from services.common.prompt.render import Renderer
from services.common.safetensors_header import read_model_headers
from services.common.worker import adapter
from services.trainer.worker import checkpoint
from services.trainer.worker.facts import Teller, synced


def write_checkpoint(progress: checkpoint.Progress, engine, rng, teller: Teller) -> None:
    """Writes the full state, then tells of it."""
    name = f"checkpoints/{progress.step}"
    folder = teller.fresh_folder(name)
    checkpoint.write(folder, progress, engine.parameters, engine.optimizer, rng)
    written = training_pb2.CheckpointWritten(step=progress.step, folder=name, files=synced(folder))
    if progress.evaluated == progress.step and progress.eval_loss is not None:
        written.eval_loss = progress.eval_loss
    teller.tell(training_pb2.Fact(checkpoint=written))


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
