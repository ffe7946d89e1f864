"""The peers of the serving benchmark: transformers and peft, called as their users call them.

    python -m benchmarks.serve_peer FD MODEL-FOLDER THREADS

Obeys the orders below. Weights, adapters too, are bfloat16. Nothing ends early: the model has no end token.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks import talk

Answer = dict[str, Any]
FRESH = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                       bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=q, dtype=torch.bfloat16)
"""


class Peer:
    """A plain model, and another that peft has wrapped."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._folder, self._threads = folder, threads
        self._plain = self._model()
        self._tuned: Any = None

    def _model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.bfloat16).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def adapters(self, folders: dict[str, str]) -> Answer:
        """Loads adapters beside a base of their own."""
        for name, folder in folders.items():
            if self._tuned is None:
                self._tuned = PeftModel.from_pretrained(self._model(), folder, adapter_name=name)
            else:
                self._tuned.load_adapter(folder, adapter_name=name)
        # peft holds adapters in fp32, however the base is held; in bfloat16 it is quicker here.
        self._tuned.to(torch.bfloat16).eval()
        return {"dtype": str(next(p.dtype for n, p in self._tuned.named_parameters() if "lora_A" in n))}

    def base(self, prompts: list[list[int]], new: int) -> Answer:
        """Prompts of one length in one batch, the base alone."""
        return _generated(self._plain, prompts, new)

    def mixed(self, prompts: list[list[int]], new: int, names: list[str]) -> Answer:
        """The same, each with its own adapter: peft's way of a mixed batch."""
        return _generated(self._tuned, prompts, new, adapter_names=names)

    def switching(self, prompts: list[list[int]], new: int, names: list[str]) -> Answer:
        """One prompt after another, the adapter set before each."""
        seconds, tokens, ids = 0.0, 0, []
        for prompt, name in zip(prompts, names, strict=True):
            begun = time.perf_counter()
            self._tuned.set_adapter(name)
            seconds += time.perf_counter() - begun
            told = _generated(self._tuned, [prompt], new)
            seconds, tokens, ids = seconds + told["seconds"], tokens + told["tokens"], ids + told["ids"]
        return {"seconds": seconds, "tokens": tokens, "ids": ids}

    def load_adapter(self, folder: str) -> Answer:
        """Time of load_adapter beside those that are loaded; it is deleted again."""
        begun = time.perf_counter()
        self._tuned.load_adapter(folder, adapter_name="one-more")
        seconds = time.perf_counter() - begun
        self._tuned.delete_adapter("one-more")
        return {"seconds": seconds}

    def load_model(self, folder: str, fresh: bool) -> Answer:
        """Time of from_pretrained that quantises to NF4; `fresh` in a new process, its imports included."""
        begun = time.perf_counter()
        if fresh:
            words = [sys.executable, "-W", "ignore", "-c", FRESH, folder, str(self._threads)]
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        else:
            quantised = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )  # fmt: skip
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, dtype=torch.bfloat16)
        return {"seconds": time.perf_counter() - begun}


def _generated(model: Any, prompts: list[list[int]], new: int, **more: Any) -> Answer:
    ids = torch.tensor(prompts)
    begun = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **more
        )
    seconds = time.perf_counter() - begun
    made = out[:, ids.shape[1] :]
    return {"seconds": seconds, "tokens": made.numel(), "ids": made.tolist()}


def main() -> None:
    told, folder, threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    peer = Peer(folder, threads)
    orders = (peer.adapters, peer.base, peer.mixed, peer.switching, peer.load_adapter, peer.load_model)
    talk.obey({order.__name__: order for order in orders}, told)


if __name__ == "__main__":
    main()
