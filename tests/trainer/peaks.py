"""Estimates against measured peaks: `python -m tests.trainer.peaks` prints the table of docs/estimate.md
(`1 3`: every third line, from the second).

A configuration is a model of random weights and a job's settings. What is measured is the peak of resident
memory over that before the model was loaded, four steps, each run a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

from qlorad.v1 import trainer_pb2
from services.common.safetensors_header import read_model_headers
from services.trainer import estimate
from services.trainer.shape import shape_of
from tests.house import ROOT

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL, QV, FULL, MLP = " ".join(MODULES), "q_proj v_proj", " ".join(MODULES[:4]), " ".join(MODULES[4:])
MB = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A configuration."""

    hidden: int
    layers: int
    ffn: int
    vocabulary: int
    method: str
    compute: str
    targets: str
    tokens: int
    rank: int = 16
    checkpointing: bool = False
    dropout: float = 0.0
    rows: int = 4
    """Samples in a micro-batch."""

    def words(self) -> str:
        more = (", checkpointing" if self.checkpointing else "") + (f", dropout {self.dropout}" if self.dropout else "")
        kinds = {ALL: "all seven", QV: "q, v", FULL: "attention", MLP: "feed-forward"}
        return (
            f"| h{self.hidden} x {self.layers}, {self.vocabulary // 1000}k words | {self.method} {self.compute} "
            f"| {kinds[self.targets]}, rank {self.rank}{more} | {self.tokens} in {self.rows} |"
        )


CASES = (
    Case(512, 8, 1408, 8192, "nf4", "bf16", ALL, 2048),
    Case(512, 8, 1408, 8192, "nf4", "bf16", ALL, 4096, rows=16),
    Case(512, 8, 1408, 8192, "nf4", "bf16", QV, 4096),
    Case(512, 8, 1408, 8192, "nf4", "bf16", FULL, 3072, rank=64),
    Case(512, 8, 1408, 8192, "nf4", "bf16", MLP, 3072, rank=8),
    Case(512, 16, 1408, 8192, "nf4", "bf16", ALL, 2048),
    Case(512, 16, 1408, 8192, "nf4", "bf16", ALL, 2048, dropout=0.1),
    Case(512, 16, 1408, 8192, "nf4", "fp32", QV, 1024),
    Case(512, 16, 1408, 8192, "none", "bf16", ALL, 2048),
    Case(512, 16, 1408, 8192, "none", "fp32", ALL, 1024),
    Case(512, 4, 1408, 32000, "nf4", "bf16", QV, 4096),
    Case(512, 4, 1408, 32000, "nf4", "bf16", ALL, 6144, rows=8),
    Case(512, 4, 1408, 32000, "none", "bf16", QV, 4096),
    Case(768, 12, 2048, 8192, "nf4", "bf16", ALL, 1024),
    Case(768, 12, 2048, 8192, "nf4", "bf16", ALL, 2048, rows=16),
    Case(768, 12, 2048, 8192, "nf4", "bf16", ALL, 2048, rows=1),
    Case(768, 12, 2048, 8192, "nf4", "bf16", ALL, 3072, rank=64),
    Case(768, 12, 2048, 8192, "nf4", "bf16", QV, 2048, rank=8),
    Case(768, 12, 2048, 8192, "nf4", "bf16", ALL, 8192, checkpointing=True, rows=16),
    Case(768, 12, 2048, 8192, "nf4", "bf16", QV, 8192, checkpointing=True, rows=16),
    Case(768, 12, 2048, 8192, "none", "bf16", ALL, 1024),
    Case(768, 12, 2048, 8192, "none", "bf16", FULL, 2048, dropout=0.05),
    Case(768, 12, 2048, 8192, "none", "bf16", ALL, 4096, checkpointing=True),
    Case(768, 12, 2048, 4096, "none", "fp32", QV, 512),
    Case(768, 12, 2048, 4096, "none", "fp32", MLP, 1024),
    Case(384, 16, 1024, 16000, "nf4", "bf16", ALL, 2048),
    Case(384, 16, 1024, 16000, "none", "bf16", ALL, 2048, rows=2),
    Case(384, 16, 1024, 16000, "nf4", "fp32", ALL, 1536),
    Case(1024, 8, 2816, 8192, "nf4", "bf16", ALL, 1536),
    Case(1024, 8, 2816, 8192, "none", "bf16", QV, 1024),
    Case(1024, 8, 2816, 8192, "nf4", "bf16", MLP, 2048, rank=32),
)

RUN = """
import json, pathlib, sys, warnings
warnings.filterwarnings("ignore")
import bitsandbytes, torch
from transformers import LlamaConfig, LlamaForCausalLM
from qlorad.v1 import trainer_pb2
from services.common.worker.load import load_base
from services.trainer.worker import engines, lora, losses
from services.trainer.worker.fast.install import install

def told(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024

def train(folder, method, compute, spec, rows):
    before = told("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    model = lora.with_lora(load_base(folder, method, True, compute), spec)
    assert install(model, spec) == ""
    model.train()
    tokens, loss_of = spec.data.micro_batch_tokens, losses.of(model)[0]
    engine = engines.Solo(model, spec)
    for _ in range(4):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens))
        places = torch.arange(tokens // rows).repeat(rows)[None]
        batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": places}
        engine.backward(loss_of(batch), tokens)
        engine.step(1e-3)
    return told("VmHWM") - before

torch.set_num_threads(1)
folder, order = pathlib.Path(sys.argv[1]), sys.argv[2:]
if order[0] == "make":
    LlamaForCausalLM(LlamaConfig(**json.loads(order[1]))).to(torch.bfloat16).save_pretrained(folder)
else:
    print(train(folder, order[0], order[1], trainer_pb2.TrainSpec.FromString(bytes.fromhex(order[2])), int(order[3])))
"""


def spec_of(case: Case) -> trainer_pb2.TrainSpec:
    """The job of a configuration."""
    spec = trainer_pb2.TrainSpec()
    spec.lora.rank, spec.lora.alpha, spec.lora.dropout = case.rank, 16, case.dropout
    spec.lora.target_modules.names.extend(case.targets.split())
    spec.data.micro_batch_tokens = case.tokens
    spec.data.max_length_tokens = case.tokens // case.rows
    spec.data.packing = True
    spec.optimizer.beta1, spec.optimizer.beta2 = 0.9, 0.999
    spec.memory.gradient_checkpointing = case.checkpointing
    spec.quantization.double_quantization = case.method == "nf4"
    spec.quantization.method = (
        trainer_pb2.QUANTIZATION_METHOD_NF4 if case.method == "nf4" else trainer_pb2.QUANTIZATION_METHOD_NONE
    )
    spec.quantization.compute_type = (
        trainer_pb2.COMPUTE_TYPE_FP32 if case.compute == "fp32" else trainer_pb2.COMPUTE_TYPE_BF16
    )
    return spec


def peak(case: Case, folder: pathlib.Path) -> tuple[int, tuple[estimate.Part, ...]]:
    """What was measured, and the parts that were told."""
    config = {
        "vocab_size": case.vocabulary, "hidden_size": case.hidden, "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers, "num_attention_heads": case.hidden // 64,
        "num_key_value_heads": case.hidden // 128, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }  # fmt: skip
    at = folder / f"{case.hidden}-{case.layers}-{case.vocabulary}"

    def child(*words: str) -> str:
        command = [sys.executable, "-c", RUN, str(at), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    if not at.exists():
        child("make", json.dumps(config))
    spec = spec_of(case)
    measured = int(child(case.method, case.compute, spec.SerializeToString().hex(), str(case.rows)).split()[-1])
    tensors = {n: t.shape for n, t in read_model_headers(at).items()}
    return measured, estimate.memory(shape_of(config, tensors, MODULES, 2), estimate.run_of(spec, "cpu"))


def predicted(parts: tuple[estimate.Part, ...]) -> int:
    """All parts but what is there before a model is."""
    return sum(p.bytes for p in parts if p.name != "framework")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        part, of = (int(w) for w in sys.argv[1:3]) if len(sys.argv) > 2 else (0, 1)
        for case in CASES[part::of]:
            measured, parts = peak(case, pathlib.Path(folder))
            told = predicted(parts)
            print(
                f"{case.words()} {told / MB:.0f} | {measured / MB:.0f} | {100 * (told / measured - 1):+.1f} % |",
                flush=True,
            )
            print("#", {p.name: round(p.bytes / MB) for p in parts}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
