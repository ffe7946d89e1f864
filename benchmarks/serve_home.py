"""What the serving benchmark works on: a base, adapters for it, and prompts that nobody asked before.

Law of this room: both sides of a comparison get the same files and the same token ids.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import numpy as np
from safetensors.numpy import save

from benchmarks import daemons, report
from qlorad.v1 import artifacts_pb2, registry_pb2, registry_pb2_grpc
from services.common import facts
from services.common.prompt.tokens import Tokenizer
from services.common.safetensors_header import read_model_headers
from services.common.shelf import Shelf

SEED, RANK, IMPORTED, MOST = 20261121, 16, 8, 128
MODEL = "113m"
CONFIG: dict[str, object] = {
    "hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2048, "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
"""Random weights, the sizes of BENCHMARKS.md."""
LARGE = "1b"
LARGE_CONFIG = CONFIG | {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
                         "intermediate_size": 8192}  # fmt: skip
"""A thousand million parameters: where loading takes longer than starting a process."""
MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from services.registry.worker import corpus, starter
config = json.loads(sys.argv[2])
made = starter.train_tokenizer(corpus.texts(6_000_000), config["vocab_size"])
assert made.get_vocab_size() == config["vocab_size"], made.get_vocab_size()
end, pad = made.token_to_id(starter.TURN_END), made.token_to_id(starter.END_OF_TEXT)
wrapped = PreTrainedTokenizerFast(
    tokenizer_object=made, eos_token=starter.TURN_END, pad_token=starter.END_OF_TEXT,
    model_max_length=config["max_position_embeddings"], clean_up_tokenization_spaces=False,
)
wrapped.chat_template = starter.TEMPLATE.read_text()
wrapped.save_pretrained(sys.argv[1])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(LlamaConfig(**config, bos_token_id=None, eos_token_id=end, pad_token_id=pad))
model.save_pretrained(sys.argv[1])
"""


def make_home(home: pathlib.Path) -> None:
    """The base and the first adapters, through the real registry."""
    home.mkdir(parents=True, exist_ok=True)
    with daemons.running("registry", home), grpc.insecure_channel(daemons.address("registry", home)) as channel:
        _add_model(home, channel, MODEL, CONFIG)
        adapters = registry_pb2_grpc.AdapterServiceStub(channel)
        for number in range(IMPORTED):
            adapters.ImportAdapter(_pieces(name_of(number), adapter_files(home, number)), timeout=120)


def add_large(home: pathlib.Path) -> None:
    """The large base, unless it is there."""
    if Shelf(home / "store").alias("models", LARGE) is None:
        with daemons.running("registry", home), grpc.insecure_channel(daemons.address("registry", home)) as channel:
            _add_model(home, channel, LARGE, LARGE_CONFIG)


def _add_model(home: pathlib.Path, channel: grpc.Channel, name: str, config: dict[str, object]) -> None:
    words = [sys.executable, "-W", "ignore", "-c", MAKE, str(home / name), json.dumps(config)]
    subprocess.run(words, check=True, cwd=report.ROOT)
    asked = registry_pb2.ImportModelRequest(request_id=name, path=str(home / name), model_id=name)
    model = list(registry_pb2_grpc.ModelServiceStub(channel).ImportModel(asked))[-1].model
    if model.state != registry_pb2.MODEL_STATE_READY:
        raise SystemExit(f"{name} was not imported: {model}")


def add_adapters(home: pathlib.Path, count: int) -> None:
    """Seals adapters until there are so many: like the imported ones, but for their values."""
    shelf = Shelf(home / "store")
    first = shelf.open("adapters", name_of(0))
    told = facts.from_manifest(facts.AdapterFacts, first.manifest)
    there = {a.name for a in shelf.aliases("adapters")}
    for number in range(count):
        if name_of(number) in there:
            continue
        staged = shelf.stage()
        made = adapter_files(home, number)
        (staged.payload / "adapter_model.safetensors").write_bytes(made["adapter_model.safetensors"])
        config = (first.payload / "adapter_config.json").read_bytes()
        (staged.payload / "adapter_config.json").write_bytes(config)
        lineage = artifacts_pb2.Lineage.FromString(first.manifest.lineage.SerializeToString())
        sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_ADAPTER, facts.to_facts(told), lineage)
        shelf.set_alias("adapters", name_of(number), sealed.digest)


def name_of(number: int) -> str:
    """The alias of an adapter."""
    return f"a{number:03}"


def adapter_files(home: pathlib.Path, number: int) -> dict[str, bytes]:
    """A LoRA of every linear layer, rank 16, B not zero: it changes what the base says by about a third."""
    shapes = read_model_headers(home / MODEL)
    draw = np.random.default_rng(SEED + number)
    tensors = {}
    for name, info in shapes.items():
        if ".layers." in name and len(info.shape) == 2:
            outputs, inputs = info.shape
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = draw.normal(0, inputs**-0.5, (RANK, inputs)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = draw.normal(0, 0.02, (outputs, RANK)).astype(np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "r": RANK, "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted({n.split(".")[-3] for n in tensors}),
    }  # fmt: skip
    weights = save(tensors, metadata={"format": "pt"})
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


def _pieces(name: str, files: dict[str, bytes]) -> Iterator[registry_pb2.ImportAdapterRequest]:
    header = registry_pb2.ImportAdapterHeader(request_id=name, adapter_id=name, base_model=f"models/{MODEL}")
    yield registry_pb2.ImportAdapterRequest(header=header)
    for path, data in files.items():
        yield registry_pb2.ImportAdapterRequest(path=path)
        for at in range(0, len(data), 1 << 20):
            yield registry_pb2.ImportAdapterRequest(data=data[at : at + (1 << 20)])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and what it is to both sides."""

    text: str
    ids: list[int]


@dataclass(slots=True)
class Prompts:
    """Pieces of the standard library, each given out once: no cache of prompts or answers has seen them."""

    tokenizer: Tokenizer
    _left: list[int] = field(default_factory=list)
    _files: list[pathlib.Path] = field(default_factory=list)

    @classmethod
    def of(cls, home: pathlib.Path) -> Prompts:
        """Those of a home's model."""
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
        random.Random(SEED).shuffle(files)
        return cls(Tokenizer.open(home / MODEL), [], files)

    def take(self, count: int, tokens: int) -> list[Prompt]:
        """So many texts of exactly so many tokens."""
        found: list[Prompt] = []
        while len(found) < count:
            while len(self._left) < tokens + 64:
                if not self._files:
                    raise SystemExit("the standard library has no more text")
                self._left += self.tokenizer.encode_prompt(self._files.pop().read_text("utf-8", "ignore") or "\n")
            text = self.tokenizer.decode(self._left[:tokens])
            # A piece that is cut inside a word is other tokens when it is read again.
            if self.tokenizer.encode_prompt(text) == self._left[:tokens]:
                found.append(Prompt(text, self._left[:tokens]))
                self._left = self._left[tokens:]
            else:
                self._left = self._left[3:]
        return found
