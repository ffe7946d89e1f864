"""The peer of the training benchmark: TRL's SFTTrainer, called as its users call it, on rows that are given it.

    python -m benchmarks.train_peer ORDER.json

The last line that it prints tells tokens and seconds of every step but the first ones,
memory before the model was loaded and at most, and the loss on held-out rows.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def told(key: str) -> int:
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


class Clock(TrainerCallback):
    """How long each step took, and how many real tokens went in."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def arguments(order: dict[str, Any]) -> SFTConfig:
    """TRL's defaults, but for what the comparison holds equal and what keeps it from the disk."""
    more: dict[str, Any] = {}
    if order["how"] == "packed":
        more = {"packing": True, "max_length": order["room"], "per_device_train_batch_size": 1}
    elif order["how"] == "ours":  # our micro-batches, in our order, each a row of samples
        more = {
            "padding_free": True, "max_length": None, "per_device_train_batch_size": 1,
            "dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
        }  # fmt: skip
    return SFTConfig(
        output_dir=order["folder"], use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, max_steps=order["steps"], seed=order["seed"],
        learning_rate=order["rate"], lr_scheduler_type="constant", gradient_checkpointing=order["checkpointing"],
        **more,
    )  # fmt: skip


def main() -> None:
    with open(sys.argv[1]) as f:
        order = json.load(f)
    torch.set_num_threads(1)
    torch.manual_seed(order["seed"])
    before = told("VmRSS")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(order["model"], quantization_config=quantised, dtype=torch.bfloat16)
    clock = Clock()
    trainer = SFTTrainer(
        model=model, args=arguments(order), train_dataset=Dataset.from_list(order["rows"]),
        processing_class=AutoTokenizer.from_pretrained(order["model"]), callbacks=[clock],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, task_type="CAUSAL_LM"),
    )  # fmt: skip
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        there = inputs.get("attention_mask")
        clock.tokens.append(int(inputs["input_ids"].numel() if there is None else there.sum()))
        return step(model, inputs, *rest, **named)

    trainer.training_step = counted
    trainer.train()
    warm = order["warm"]
    answer = {
        "tokens": clock.tokens[warm:], "seconds": clock.seconds[warm:], "before": before, "peak": told("VmHWM"),
        "loss": held_out(trainer.model, order["held_out"]),
    }  # fmt: skip
    print(json.dumps(answer))


@torch.no_grad()
def held_out(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss a trained token, row by row."""
    model.eval()
    loss, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[None, 1:]
        logits = model(input_ids=ids).logits[:, :-1].float()
        keep = labels != -100
        loss += float(torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="sum"))
        count += int(keep.sum())
    return loss / count if count else 0.0


if __name__ == "__main__":
    main()
