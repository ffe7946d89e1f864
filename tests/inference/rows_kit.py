"""A model and its scheduler in this process: what the engine's rooms are tested on without a daemon."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from qlorad.v1 import inference_pb2
from services.common import generation
from services.common.frames.v1 import engine_pb2
from services.inference.worker import straight
from services.inference.worker.forward import Forward, Whole
from services.inference.worker.lanes import Lanes
from services.inference.worker.lora import Lora
from services.inference.worker.prefix import Prefixes
from services.inference.worker.proof import Probe
from services.inference.worker.rows import Answering, Scoring
from services.inference.worker.said import ask
from services.inference.worker.scheduler import Scheduler

CPU = torch.device("cpu")
VOCABULARY = 320
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 24},
    "Phi": {},
    "Qwen2": {"num_key_value_heads": 2},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "GPTNeoX": {},
}


def tiny(family: str, context: int = 1024) -> Any:
    """A model of random weights in fp32; the same each time."""
    torch.set_num_threads(1)  # tests run side by side; threads that wait for one another awake would fill every core
    common = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "max_position_embeddings": context, "eos_token_id": None, "bos_token_id": None}
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**common, "pad_token_id": 0, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        # Far from the small numbers that models begin with: a wrong token must show.
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.mul_(4)
    model.generation_config.eos_token_id = None
    return model.eval()


def with_adapter(family: str, seed: int, context: int = 1024) -> PeftModel:
    """The same model with an all-linear adapter that does something, as peft runs it."""
    model = get_peft_model(tiny(family, context), LoraConfig(r=4 + 4 * (seed % 2), target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    return model.eval()


def tensors_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n.replace(".default.", "."): p.data for n, p in model.named_parameters() if "lora_" in n}


@dataclass
class Engine:
    """A scheduler, and what came of each call."""

    scheduler: Scheduler
    lora: Lora
    lanes: Lanes
    prefixes: Prefixes
    forward: Forward
    reports: dict[int, list[engine_pb2.EngineReport]] = field(default_factory=dict)
    calls: Any = field(default_factory=lambda: itertools.count(1))

    def ask(self, prompt: Sequence[int], adapter: str = "", priority: int = 0, who: str = "", **options: Any) -> int:
        """Submits a request; its number."""
        filled = generation.resolved(inference_pb2.GenerationOptions(**options), generation.house(1))
        row = Answering(
            next(self.calls),
            adapter,
            list(prompt),
            priority,
            who,
            options=filled,
            decode=spelled,
            spell=lambda i: spelled((i,)),
        )
        self.scheduler.submit(row)
        return row.call

    def score(self, prompt: Sequence[int], adapter: str = "", alternatives: int = 0) -> int:
        counted = [n > 0 for n in range(len(prompt))]
        row = Scoring(
            next(self.calls), adapter, list(prompt), 0, "", counted=counted, alternatives=alternatives,
            spell=lambda i: spelled((i,)),
        )  # fmt: skip
        self.scheduler.submit(row)
        return row.call

    def step(self) -> None:
        for report in self.scheduler.step():
            self.reports.setdefault(report.call, []).append(report)

    def run(self) -> None:
        """Until nothing is left."""
        while self.scheduler.has_work:
            self.step()

    def ids(self, call: int) -> list[int]:
        """The tokens that were made."""
        return [i for r in self.reports.get(call, []) if r.HasField("tokens") for i in r.tokens.ids]

    def said(self, call: int, kind: str) -> list[Any]:
        """Reports of one kind."""
        return [getattr(r, kind) for r in self.reports.get(call, []) if r.HasField(kind)]


def engine(
    model: Any,
    adapters: dict[str, PeftModel] | None = None,
    way: str = "",
    rows: int = 8,
    limit: int = 0,
    prefix: int = 0,
    device_bytes: int = 0,
) -> Engine:
    """An engine of a model; `way` "straight" or "whole", or the quickest that there is."""
    lora = Lora(model, model.dtype, device_bytes)
    for digest, adapter in (adapters or {}).items():
        config = adapter.peft_config["default"]
        lora.add(digest, tensors_of(adapter), config.lora_alpha / config.r, {})
    said = ask(model, VOCABULARY, "models/tiny")
    probe = Probe(model, said, VOCABULARY, "models/tiny")
    lanes, prefixes = Lanes(said.shapes, probe.dtype, CPU, limit), Prefixes(prefix)
    written_out = straight.of(model, lora) if way != "whole" else None
    if written_out is None:
        assert way != "straight"
        lora.hook()
    forward = probe.proven([written_out or Whole(model)])
    context = model.config.max_position_embeddings
    scheduler = Scheduler(forward, lora, lanes, prefixes, rows, context, frozenset({1}), CPU)
    return Engine(scheduler, lora, lanes, prefixes, forward)


def greedy(model: Any, prompt: Sequence[int], count: int, **more: Any) -> tuple[list[int], float]:
    """What plain transformers makes, and by how much the likeliest token led at its narrowest."""
    made = model.generate(
        input_ids=torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **more,
    )  # fmt: skip
    leads = [float(top[0] - top[1]) for top in (torch.topk(step[0], 2).values for step in made.logits)]
    return made.sequences[0, len(prompt) :].tolist(), min(leads)


def prompt_of(seed: int, length: int) -> list[int]:
    return [2 + (7919 * (seed + 3) * (n + 1) + 31 * n * n) % (VOCABULARY - 2) for n in range(length)]


def spelled(ids: Sequence[int]) -> str:
    return "".join(f"<{i}>" for i in ids)
