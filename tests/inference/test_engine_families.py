"""Greedy answers are those of plain transformers and peft, for every family, alone and mixed in one batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.inference import rows_kit as kit

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (3, 70, 150, 1)
NEW = 12


WAYS = [(family, way) for family in kit.FAMILIES for way in ("straight", "whole")
        if way == "whole" or family in ("Llama", "Mistral", "Qwen2")]  # fmt: skip


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_greedy_answers_are_those_of_plain_peft(family: str, way: str) -> None:
    with torch.no_grad():
        adapters = {"ada": kit.with_adapter(family, 1), "bob": kit.with_adapter(family, 2)}
        model = kit.tiny(family)
        expected, prompts = {}, {}
        for n, length in enumerate(LENGTHS):
            for seed in itertools.count(n):
                found = {name: kit.greedy(plain, kit.prompt_of(seed, length), NEW) for name, plain in
                         (("", model), *adapters.items())}  # fmt: skip
                if min(lead for _, lead in found.values()) > 1e-4:  # else rounding alone could turn a token
                    break
            prompts[n] = kit.prompt_of(seed, length)
            expected |= {(n, name): ids for name, (ids, _) in found.items()}
        assert len({tuple(ids) for ids in expected.values()}) > 8, "the adapters must differ"
        made = kit.engine(model, adapters, way, rows=5)
        calls = {key: made.ask(prompts[key[0]], key[1], max_tokens=NEW) for key in expected}
        made.run()
        for key, call in calls.items():
            assert made.ids(call) == expected[key], key
        assert made.lanes.bytes_used == 0


def test_a_window_is_kept_also_beyond_it() -> None:
    """Mistral looks back 24 tokens here; the prompt is six times as long, and so is what is made after it."""
    with torch.no_grad():
        model = kit.tiny("Mistral")
        ids, lead = kit.greedy(model, kit.prompt_of(5, 150), 60)
        assert lead > 1e-4
        for way in ("straight", "whole"):
            made = kit.engine(kit.tiny("Mistral"), way=way)
            call = made.ask(kit.prompt_of(5, 150), max_tokens=60)
            made.run()
            assert made.ids(call) == ids
