"""Adapters side by side on reordered bf16 weights: the quick products say what the plain ones say in fp32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from services.common.errors import Fault
from services.inference.worker import each, flat, lora, reordered, stacks, straight
from services.inference.worker.lanes import Lanes
from services.inference.worker.lora import Lora
from tests.inference import rows_kit as kit

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("", "ada", "bob", "cy")
LENGTH = 120


def said_by_peft(name: str, ids: list[int]) -> torch.Tensor:
    """Logits of plain transformers and peft in fp32, on numbers that bf16 holds too."""
    if not name:
        model = kit.tiny("Llama")
    else:
        model = kit.with_adapter("Llama", NAMES.index(name))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model(input_ids=torch.tensor([ids])).logits[0]


def quick() -> tuple[Any, Lora, Lanes]:
    """The written-out model on reordered weights, with all adapters."""
    model = kit.tiny("Llama").bfloat16()
    reordered.reorder(model)
    held = Lora(model, torch.bfloat16)
    for name in NAMES[1:]:
        adapter = kit.with_adapter("Llama", NAMES.index(name))
        config = adapter.peft_config["default"]
        held.add(name, kit.tensors_of(adapter), config.lora_alpha / config.r, {})
    config = model.config
    shapes = [(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers
    return straight.of(model, held), held, Lanes(shapes, model.dtype, kit.CPU, 0)


@pytest.mark.parametrize("shared", [lora._SHARED, 20], ids=["shared", "long prompts alone"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "stacks"])
def test_quick_products_say_what_plain_ones_say(shared: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and pieces of prompts, of the base and of adapters of two ranks, in one forward after another."""
    monkeypatch.setattr(lora, "_SHARED", shared)
    if not compiled:
        monkeypatch.setattr(each, "found", lambda device, dtype: None)
    elif not each.library().exists():
        pytest.skip("set-up compiled nothing here")
    with torch.no_grad():
        if not reordered.pays(kit.tiny("Llama").bfloat16()):
            pytest.skip("this processor's library does not reorder")
        forward, held, lanes = quick()
        assert forward._layers[0].gates._weights is not None, "the gates stand apart"
        draw = random.Random(5)
        rows = [NAMES[n % 4] for n in range(6)]
        prompts = [kit.prompt_of(row % 2, LENGTH) for row in range(6)]
        places = [lanes.take(LENGTH) for _ in rows]
        expected = [said_by_peft(name, ids) for name, ids in zip(rows, prompts, strict=True)]
        base_to_bob = (expected[0] - expected[2]).norm(dim=-1) / expected[0].norm(dim=-1)
        worst = 0.0
        while any(place.length < LENGTH for place in places):
            at = [place.length for place in places]
            counts = [min(draw.choice((0, 1, 1, 1, 7)), LENGTH - begin) for begin in at]
            asked = [row for row in range(6) if counts[row]]
            if not asked:
                continue
            new = [prompts[row][at[row] : at[row] + counts[row]] for row in asked]
            pieces = [flat.Piece(places[row], ids, rows[row], len(ids)) for row, ids in zip(asked, new, strict=True)]
            laid = flat.lay(pieces, kit.CPU)
            held.choose(laid, NAMES[1:])
            logits = forward(laid)
            held.choose(None)
            flat.settle(pieces)
            order = torch.tensor(laid.order)
            for number, row in enumerate(asked):
                wanted = expected[row][at[row] : at[row] + counts[row]]
                off = (logits[order == number] - wanted).norm(dim=-1) / wanted.norm(dim=-1)
                worst = max(worst, float(off.max()))
        # bf16 alone is off by 0.12 at its worst token; a wrong adapter, or a wrong gate, by more than one.
        assert worst < 0.3 < 1.0 < float(base_to_bob.median()), (worst, base_to_bob)
        used = [site.stack for site in held._sites if site.stack is not None]
        if compiled:
            assert not used and all(site.table is not None for site in held._sites)
        else:
            assert used and all(stack.a is not None and stack.a._quick is not None for stack in used)


def test_numbers_that_would_reach_others_are_refused() -> None:
    """What is another's is multiplied by zero; only of what is finite is that zero."""
    model = kit.tiny("Llama")
    tensors = kit.tensors_of(kit.with_adapter("Llama", 1))
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = 10 * stacks.LARGEST
    with pytest.raises(Fault, match="check 'values'"):
        Lora(model, torch.float32).add("ada", tensors, 1.0, {})
