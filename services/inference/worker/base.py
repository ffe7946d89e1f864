"""The resident base: model, reader, adapters and rows, put together.

Law of this room: brought in once a process, proven before it is told of.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import psutil
import torch

from qlorad.v1 import inference_pb2
from services.common import facts
from services.common.errors import Fault, rejected
from services.common.frames.v1 import engine_pb2
from services.common.safetensors_header import read_model_headers
from services.common.worker.bfloat import has_bf16
from services.common.worker.load import weight_bytes
from services.inference import precision
from services.inference.worker import proof, said, straight, weights
from services.inference.worker.forward import Forward, Whole
from services.inference.worker.lanes import Lanes
from services.inference.worker.lora import Lora
from services.inference.worker.prefix import Prefixes
from services.inference.worker.prepared import Prepared
from services.inference.worker.reading import Reader
from services.inference.worker.rows import Answering, Scoring
from services.inference.worker.scheduler import Scheduler

_FULL = inference_pb2.PRECISION_FP32
_SMALL_BITS = (inference_pb2.PRECISION_INT8, inference_pb2.PRECISION_INT4)

_SMALL = 8_000_000
"""Parameters below which threads wait for one another longer than they compute."""

Report = engine_pb2.EngineReport


class Base:
    """One base in memory. Made by `bring`; the engine's loop owns all but `reader` and `prepare`."""

    def __init__(self, load: engine_pb2.EngineLoad) -> None:
        payload = pathlib.Path(load.payload)
        told = facts.from_manifest(facts.ModelFacts, load.manifest)
        threads = load.threads or (1 if told.parameters < _SMALL else 0)
        if threads:
            torch.set_num_threads(threads)
        place = precision.Place(load.device, _free_bytes(load.device), has_bf16(load.device))
        self.precision, self._reason = precision.choose(load.precision, told, place)
        name = inference_pb2.Precision.Name(self.precision).removeprefix("PRECISION_")
        if self.precision in _SMALL_BITS and not place.is_processor:
            raise rejected(load.name, f"is held as {name} on processors only; on {load.device} accepted: NF4")
        self.reader = Reader(load.name, payload, told.template_date)
        self._payload, self._headers = payload, read_model_headers(payload)
        kept = Prepared(load.prepared, load.manifest.digest, name, load.prepared_bytes)
        brought = weights.bring(
            payload, self.precision, load.device, kept, lambda model: said.ask(model, told.vocabulary, load.name)
        )
        self.model, self._from_prepared = brought.model, brought.from_kept
        device = next(self.model.parameters()).device
        self.reader.context_tokens = self.context_tokens = _context(self.model.config, told.context_tokens)
        self.reader.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.lora = Lora(
            self.model, torch.float32 if self.precision == _FULL else torch.bfloat16, load.device_adapter_bytes
        )
        self._probe = proof.Probe(self.model, brought.said, told.vocabulary, load.name)
        limit = load.cache_bytes or _free_bytes(load.device) // 2
        lanes = Lanes(brought.said.shapes, self._probe.dtype, device, limit)
        forward = self._probe.proven(self._forwards())
        self.scheduler = Scheduler(
            forward, self.lora, lanes, Prefixes(load.prefix_bytes), load.max_rows, self.context_tokens,
            frozenset(told.eos_token_ids), device, _reach(told.parameters, self.model.config, brought.said.shapes),
        )  # fmt: skip

    def _forwards(self) -> Iterator[Forward]:
        """Ways to compute this model, the quickest first."""
        written_out = straight.of(self.model, self.lora)
        if written_out is not None:
            yield written_out
            self.lora.forget_sites()
        self.lora.hook()
        yield Whole(self.model)

    def told(self, seconds: float) -> engine_pb2.EngineLoaded:
        """What the daemon learns of it."""
        return engine_pb2.EngineLoaded(
            precision=self.precision,
            memory_bytes=weight_bytes(self.model),
            context_tokens=self.context_tokens,
            load_seconds=seconds,
            reason=self._reason,
            from_prepared=self._from_prepared,
        )

    # requests

    def submit(self, call: int, submit: engine_pb2.EngineSubmit, ids: Sequence[int]) -> list[Report]:
        """Queues a request whose prompt was read."""
        self._need(submit.adapter_digest)
        row = Answering(
            call, submit.adapter_digest, list(ids), submit.priority, submit.who,
            options=submit.options, decode=self.reader.tokenizer.decode, bytes_of=self.reader.bytes_of,
            spell=self.reader.spell, end=self.reader.end_text(submit),
        )  # fmt: skip
        self.scheduler.submit(row)
        return [Report(call=call, accepted=engine_pb2.EngineAccepted(prompt_tokens=len(ids)))]

    def submit_score(
        self, call: int, order: engine_pb2.EngineScore, ids: Sequence[int], counted: Sequence[bool]
    ) -> list[Report]:
        """Queues what is to be scored."""
        self._need(order.adapter_digest)
        row = Scoring(
            call, order.adapter_digest, list(ids), order.priority, order.who,
            counted=counted, alternatives=order.alternatives, spell=self.reader.spell,
        )  # fmt: skip
        self.scheduler.submit(row)
        return [Report(call=call, accepted=engine_pb2.EngineAccepted(prompt_tokens=len(ids)))]

    def _need(self, digest: str) -> None:
        if digest and digest not in self.lora:
            raise rejected(digest, "is not in the engine")

    # adapters

    def prepare(self, order: engine_pb2.EngineLoadAdapter) -> proof.Prepared:
        """Reads and checks an adapter without changing the model. Any thread."""
        prepared = proof.prepare(
            order.name, pathlib.Path(order.payload), order.manifest, self._payload, self._headers,
            self.reader.renderer_of,
        )  # fmt: skip
        return dataclasses.replace(prepared, gains=self.lora.gains(prepared.tensors, prepared.scaling))

    def add(self, call: int, prepared: proof.Prepared) -> Report:
        """Takes an adapter in and proves its effect; on failure it is out again."""
        size = self.lora.add(prepared.digest, prepared.tensors, prepared.scaling, prepared.gains)
        self.reader.learn(prepared.digest, prepared.renderer)
        try:
            effect = self._probe.effect(self.lora, prepared.digest, prepared.name)
        except BaseException:
            self.remove(prepared.digest)
            raise
        loaded = engine_pb2.EngineAdapterLoaded(memory_bytes=size, rank=prepared.rank, probe_effect=effect)
        return Report(call=call, adapter_loaded=loaded)

    def remove(self, digest: str) -> int:
        """Lets an adapter go that no request uses; bytes freed."""
        self.reader.forget(digest)
        return self.lora.remove(digest)


def bring(load: engine_pb2.EngineLoad) -> Base:
    """The base of an order, in memory and proven; a Fault says why not."""
    torch.set_grad_enabled(False)  # of this thread, for good: the loop runs on it
    try:
        return Base(load)
    except Fault:
        raise
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise rejected(load.name, f"does not fit into the memory of {load.device}: {e}"[:500]) from e
    except Exception as e:  # whatever a family's code raises on weights or a cache that are not as it expects
        raise rejected(load.name, f"cannot be served by this engine: {type(e).__name__}: {e}"[:500]) from e


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _reach(parameters: int, config, shapes: Sequence[tuple[int, int]]) -> float:
    """The context with which a token's attention takes as long as its products with the weights.

    Two operations a weight, four a number of each head and token looked back upon; these run half as quick.
    """
    return parameters / (4 * config.num_attention_heads * sum(width for _, width in shapes))


def _context(config, told: int) -> int:
    """The longest context that is served alike for everybody.

    Positions that are stretched only beyond the length of training would be stretched for every row as soon as
    one is that long, so that length is the limit then.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return min(told, int(rope.get("original_max_position_embeddings") or told))
    return told
