"""Makes adapters for tests, sound and unsound, and tells what plain peft says with the sound ones.

`python -m tests.inference.make_adapters HOME`: seals into the store of HOME, writes HOME/oracle.json.
A process of its own, so that the test process stays without torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlorad.v1 import artifacts_pb2, messages_pb2
from services.common import artifacts, facts
from services.common.prompt import formats, golden
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Sealed, Shelf
from services.common.worker.adapter import WEIGHTS, save_adapter
from services.common.worker.load import load_base

PROMPTS = ("def add(a, b):\n", "import os\n\n\nclass Store:\n", "x")
NEW_TOKENS = 40
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOUND = {"ada": (4, 8, ["q_proj", "v_proj"]), "bob": (16, 16, ALL), "cy": (8, 32, ["down_proj", "o_proj"]),
         "dee": (4, 8, ["q_proj", "up_proj", "down_proj"])}  # fmt: skip
STABILISED = ("cy",)
"""Scaled by alpha / sqrt(rank)."""
DORA = ("dee",)
"""Learnt with magnitudes of their own."""


def fresh(payload: pathlib.Path):
    return load_base(payload, method="none", compute="fp32")


def make(payload: pathlib.Path, folder: pathlib.Path, name: str, seed: int, zero: bool = False) -> facts.AdapterFacts:
    """A random adapter in a folder; with `zero` one whose B is zero."""
    rank, alpha, targets = SOUND[name]
    torch.manual_seed(seed)
    model = get_peft_model(
        fresh(payload),
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets,
            use_rslora=name in STABILISED,
            use_dora=name in DORA,
        ),
    )
    count = 0
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            count += parameter.numel()
            with torch.no_grad():
                if "magnitude" in key:
                    parameter.mul_(0.5 + torch.rand_like(parameter))
                    continue
                parameter.normal_(0.0, 0.25)
                if zero and "lora_B" in key:
                    parameter.zero_()
    save_adapter(model, folder)
    return facts.AdapterFacts(rank, float(alpha), tuple(sorted(targets)), count, (), dora=name in DORA)


def seal(
    shelf: Shelf,
    base: Sealed,
    name: str,
    told: facts.AdapterFacts,
    staged,
    renderings,
    base_digest: str = "",
    prompt_format: formats.Format = formats.OWN,
    template_digest: str = "",
) -> Sealed:
    model = facts.from_manifest(facts.ModelFacts, base.manifest)
    lineage = artifacts_pb2.Lineage(
        base_digest=base_digest or base.digest,
        tokenizer_digest=model.tokenizer_digest,
        template_digest=template_digest or formats.template_digest(prompt_format, model.template_digest),
    )
    named = formats.name_of(prompt_format)
    told = dataclasses.replace(told, golden=tuple(renderings), prompt_format=named)
    sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_ADAPTER, facts.to_facts(told), lineage)
    shelf.set_alias("adapters", name, sealed.digest)
    return sealed


def rename_key(path: pathlib.Path) -> None:
    """Renames one tensor in the header of a file; lengths stay."""
    data = path.read_bytes()
    changed = data.replace(b"layers.0.self_attn.q_proj.lora_A", b"layers.0.self_attn.z_proj.lora_A", 1)
    assert changed != data
    path.write_bytes(changed)


def flip_byte(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    """The last quarter of a file is missing."""
    os.truncate(path, path.stat().st_size * 3 // 4)


def second_base(shelf: Shelf, base: Sealed) -> Sealed:
    """models/other: the starter with every other layer's weights changed."""
    staged = shelf.stage()
    shutil.copytree(base.payload, staged.payload, dirs_exist_ok=True)
    for path in staged.payload.glob("*.safetensors"):
        tensors = load_file(path)
        path.unlink()
        save_file({k: v.flip(0) if "layers.1" in k else v for k, v in tensors.items()}, path, {"format": "pt"})
    told = artifacts.facts_of(base.manifest)
    sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_MODEL, told, base.manifest.lineage)
    shelf.set_alias("models", "other", sealed.digest)
    return sealed


def oracle(model, tokenizer: Tokenizer, end: tuple[int, ...]) -> list[dict]:
    """Greedy continuations of PROMPTS with the deciding margin of each token."""
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer.encode_prompt(prompt)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(end),
                pad_token_id=end[0],
                output_scores=True,
                return_dict_in_generate=True,
            )
        made = out.sequences[0, len(ids) :].tolist()
        best = [score[0].topk(2).values.tolist() for score in out.scores]
        answers.append({"prompt": prompt, "ids": made, "margins": [a - b for a, b in best]})
    return answers


def main(home: pathlib.Path) -> None:
    shelf = Shelf(home / "store")
    base = shelf.open("models", "starter-test")
    told = facts.from_manifest(facts.ModelFacts, base.manifest)
    renderings = golden.make(Renderer.open(base.payload, told.template_date))
    tokenizer = Tokenizer.open(base.payload)
    answers = {"base": oracle(fresh(base.payload), tokenizer, told.eos_token_ids)}
    for seed, name in enumerate(SOUND, start=1):
        staged = shelf.stage()
        sealed = seal(shelf, base, name, make(base.payload, staged.payload, name, seed), staged, renderings)
        model = PeftModel.from_pretrained(fresh(base.payload), str(sealed.payload)).eval()
        answers[name] = oracle(model, tokenizer, told.eos_token_ids)

    # Trained with a prompt format of ours; once as it was rendered then, once as the base's template renders.
    alpaca = messages_pb2.PROMPT_FORMAT_ALPACA
    formed = golden.make(Renderer.open(base.payload, told.template_date, alpaca))
    for name, rendered in (("formed", formed), ("misformed", renderings)):
        staged = shelf.stage()
        made = make(base.payload, staged.payload, "ada", 7 + len(name))
        seal(shelf, base, name, made, staged, rendered, prompt_format=alpaca)

    # Sealed with a way to choose tokens of its own.
    staged = shelf.stage()
    made = dataclasses.replace(make(base.payload, staged.payload, "ada", 21), generation={"max_tokens": 5, "seed": "3"})
    seal(shelf, base, "told", made, staged, renderings)

    def unsound(name: str, seed: int, spoil, **how) -> None:
        staged = shelf.stage()
        made = make(base.payload, staged.payload, "ada", seed, zero=name == "zero")
        spoil(staged.payload / WEIGHTS)
        seal(shelf, base, name, made, staged, how.pop("renderings", renderings), **how)

    wrong = [{**entry, "text": entry["text"].replace("user", "usor")} if "text" in entry else entry
             for entry in renderings]  # fmt: skip
    unsound("zero", 11, lambda path: None)
    unsound("renamed", 12, rename_key)
    unsound("foreign-base", 13, lambda path: None, base_digest="sha256:" + "ab" * 32)
    unsound("golden", 14, lambda path: None, renderings=wrong)
    unsound("flipped", 15, lambda path: None)
    flip_byte(shelf.open("adapters", "flipped").payload / WEIGHTS)
    unsound("foreign-template", 16, lambda path: None, template_digest="sha256:" + "cd" * 32)
    unsound("cut", 17, cut)
    unsound("torn", 18, lambda path: None)
    cut(shelf.open("adapters", "torn").payload / WEIGHTS)

    other = second_base(shelf, base)
    answers["other"] = oracle(fresh(other.payload), tokenizer, told.eos_token_ids)
    staged = shelf.stage()
    sealed = seal(shelf, other, "eve", make(other.payload, staged.payload, "bob", 21), staged, renderings)
    model = PeftModel.from_pretrained(fresh(other.payload), str(sealed.payload)).eval()
    answers["eve"] = oracle(model, tokenizer, told.eos_token_ids)
    (home / "oracle.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
