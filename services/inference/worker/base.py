"""The resident base: model, tokenizer, template, adapters and rows, put together.

Law of this room: brought in once a process, proven before it is told of; what a
request becomes (rendered, tokenised, bounded) is decided here.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import psutil
import torch

from qlorad.v1 import inference_pb2
from services.common import facts
from services.common.errors import Fault, Violation, invalid, rejected, show
from services.common.frames.v1 import engine_pb2
from services.common.prompt import formats
from services.common.prompt.example import ExampleError, as_template_sees
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.tokens import Tokenizer
from services.common.safetensors_header import read_model_headers
from services.common.worker.load import load_base, weight_bytes
from services.inference import precision
from services.inference.worker import proof
from services.inference.worker.lora import Lora
from services.inference.worker.scheduler import Scheduler, make_row

_HOW = {
    inference_pb2.PRECISION_NF4: ("nf4", "bf16"),
    inference_pb2.PRECISION_BF16: ("none", "bf16"),
    inference_pb2.PRECISION_FP32: ("none", "fp32"),
}
_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}

_SMALL = 8_000_000
"""Parameters below which threads wait for one another longer than they compute."""

Report = engine_pb2.EngineReport


class Base:
    """One base in memory. Made by `bring`; the engine's loop owns all but `read` and `prepare`."""

    def __init__(self, load: engine_pb2.EngineLoad) -> None:
        payload = pathlib.Path(load.payload)
        told = facts.from_manifest(facts.ModelFacts, load.manifest)
        if told.parameters < _SMALL:
            torch.set_num_threads(1)
        self.name = load.name
        self.precision = precision.choose(load.precision, told, _free_bytes(load.device))
        method, compute = _HOW[self.precision]
        self._open_renderer = functools.cache(lambda chosen: Renderer.open(payload, told.template_date, chosen))
        self.renderer: Renderer = self._open_renderer(formats.OWN)
        self._renderers: dict[str, Renderer] = {}
        """Of adapters by digest; those that left stay, since a request may still be read."""
        self.tokenizer = Tokenizer.open(payload)
        self._payload, self._headers = payload, read_model_headers(payload)
        self.model = load_base(payload, method, True, compute, load.device)
        self.context_tokens = _context(self.model.config, told.context_tokens)
        self.lora = Lora(self.model, _DTYPE[compute])
        self._probe = proof.Probe(self.model, told.vocabulary)
        self._probe.check_cache(load.name, self.context_tokens)
        self.scheduler = Scheduler(
            self.model, self.lora, load.max_rows, self.context_tokens, frozenset(told.eos_token_ids)
        )

    def told(self, seconds: float) -> engine_pb2.EngineLoaded:
        """What the daemon learns of it."""
        return engine_pb2.EngineLoaded(
            precision=self.precision,
            memory_bytes=weight_bytes(self.model),
            context_tokens=self.context_tokens,
            load_seconds=seconds,
        )

    # requests

    def read(self, submit: engine_pb2.EngineSubmit) -> Sequence[int]:
        """The prompt's tokens; INVALID_ARGUMENT if the template refuses it or it does not fit. Any thread."""
        if submit.WhichOneof("input") == "prompt":
            field, ids = "prompt", self.tokenizer.encode_prompt(submit.prompt)
        else:
            field, ids = "conversation", self.tokenizer.encode(self._render(submit)).ids
        longest = self.context_tokens - 1
        if not 1 <= len(ids) <= longest:
            accepted = f"1 to {longest} tokens (the context is {self.context_tokens}, and one is for the answer)"
            raise invalid([Violation(field, f"{len(ids)} tokens", accepted)])
        return ids

    def _renderer(self, submit: engine_pb2.EngineSubmit) -> Renderer:
        return self._renderers.get(submit.adapter_digest, self.renderer)

    def _render(self, submit: engine_pb2.EngineSubmit) -> str:
        renderer = self._renderer(submit)
        try:
            messages, tools = as_template_sees(submit.conversation, renderer.sees_parts)
            return renderer.render(messages, tools, add_generation_prompt=True).text
        except ExampleError as e:
            raise invalid(
                [Violation(f"conversation.{e.field}", show(e.message), "what the template can show")]
            ) from None
        except RenderError as e:
            where = f"conversation.messages[{self._refused_turn(renderer, messages, tools)}]"
            own = renderer.prompt_format == formats.OWN
            taken = f"what {self.name}'s template takes" if own else "what the adapter's prompt format takes"
            raise invalid([Violation(where, f"refused: {e.message[:300]}", taken)]) from None

    def _refused_turn(self, renderer: Renderer, messages: list, tools: list | None) -> int:
        """The first turn with which the template refuses; the last if it takes every beginning."""
        for count in range(1, len(messages)):
            try:
                renderer.render(messages[:count], tools)
            except RenderError:
                return count - 1
        return len(messages) - 1

    def submit(self, call: int, submit: engine_pb2.EngineSubmit, ids: Sequence[int]) -> list[Report]:
        """Queues a request whose prompt was read."""
        if submit.adapter_digest and submit.adapter_digest not in self.lora:
            raise rejected(submit.adapter_digest, "is not in the engine")
        # A model whose tokenizer lacks the format's end token spells it; nobody wants to read that.
        end = formats.end_text(self._renderer(submit).prompt_format) if submit.HasField("conversation") else ""
        self.scheduler.submit(make_row(call, submit, ids, self.tokenizer.decode, end))
        return [Report(call=call, accepted=engine_pb2.EngineAccepted(prompt_tokens=len(ids)))]

    # adapters

    def prepare(self, order: engine_pb2.EngineLoadAdapter) -> proof.Prepared:
        """Reads and checks an adapter without changing the model. Any thread."""
        prepared = proof.prepare(
            order.name, pathlib.Path(order.payload), order.manifest, self._payload, self._headers, self._open_renderer
        )
        return dataclasses.replace(prepared, gains=self.lora.gains(prepared.tensors, prepared.scaling))

    def add(self, call: int, prepared: proof.Prepared) -> Report:
        """Takes an adapter in and proves its effect; on failure it is out again."""
        size = self.lora.add(prepared.digest, prepared.tensors, prepared.scaling, prepared.gains)
        self._renderers[prepared.digest] = prepared.renderer
        try:
            effect = self._probe.effect(self.lora, prepared.digest, prepared.name)
        except Fault:
            self.lora.remove(prepared.digest)
            raise
        loaded = engine_pb2.EngineAdapterLoaded(memory_bytes=size, rank=prepared.rank, probe_effect=effect)
        return Report(call=call, adapter_loaded=loaded)


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


def _context(config, told: int) -> int:
    """The longest context that plain attention serves: a sliding window bounds it."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return told
    return min(told, int(window))
