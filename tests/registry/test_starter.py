"""The starter: made by the real daemon, found again, reproducible."""

from __future__ import annotations

import json
import pathlib

import pytest

from qlorad.v1 import registry_pb2
from services.common import artifacts
from services.common.facts import ModelFacts, from_manifest
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from tests.house import House
from tests.registry.doors import Doors, open_doors, refusal


def test_the_starter_is_ready_and_tells_its_facts(doors: Doors) -> None:
    model = doors.get("models/starter-test")
    assert model.state == registry_pb2.MODEL_STATE_READY
    assert (model.architecture, model.family) == ("LlamaForCausalLM", "llama")
    assert 600_000 < model.parameters < 700_000
    assert model.context_tokens >= 512 and model.vocabulary == 2048
    assert list(model.target_modules) == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert model.template_has_generation_marks and model.template_digest and model.tokenizer_digest
    assert model.nf4_bytes < model.size_bytes / 3
    assert doors.get(f"models/{model.digest}").digest == model.digest
    assert doors.get(f"models/{model.digest[:20]}").name == "models/starter-test"
    Shelf(doors.home / "store").open("models", "starter-test", verify=True)


def test_calling_again_finds_it_at_once(doors: Doors) -> None:
    made = doors.make("once-more")
    assert len(made) == 1 and made[0].model == doors.get("models/starter-test")


def test_the_same_request_has_the_same_answer_after_a_restart(
    starter_home: pathlib.Path, home: pathlib.Path, house_factory
) -> None:
    doors = open_doors(house_factory(home))
    first = doors.make("r1")[-1].model
    doors.house.daemons["registry"].kill()
    doors = open_doors(doors.house)
    assert doors.make("r1")[-1].model == first
    told = refusal(lambda: doors.make("r1", "other"))
    assert told[:2] == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


def test_an_alias_of_another_model_is_not_taken_over(doors: Doors) -> None:
    code, reason, message = refusal(lambda: doors.make("other-size", "starter-test", registry_pb2.STARTER_SIZE_DEMO))
    assert (code, reason) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    assert "starter-test" in message and "model_id" in message


def test_wrong_requests_name_every_field(doors: Doors) -> None:
    code, reason, message = refusal(lambda: doors.make("", "No/Name", 0))
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert all(field in message for field in ("request_id", "size", "model_id"))


def test_the_template_speaks_all_roles_and_marks_the_assistant(starter_home: pathlib.Path) -> None:
    payload = Shelf(starter_home / "store").open("models", "starter-test").payload
    renderer, tokenizer = Renderer.open(payload, "2026-01-01"), Tokenizer.open(payload)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    rendered = renderer.render(talk, [tool])
    assert rendered.spans is not None
    said = [rendered.text[a:b] for a, b in rendered.spans]
    assert said == ['<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>', "Two.<|im_end|>"]
    for n in range(1, len(talk)):
        before = renderer.render(talk[:n], [tool], add_generation_prompt=talk[n]["role"] == "assistant").text
        assert rendered.text.startswith(before)
    ends = tokenizer.encode("<|im_start|>x<|im_end|>").ids
    facts = from_manifest(ModelFacts, Shelf(starter_home / "store").open("models", "starter-test").manifest)
    assert ends[-1] in facts.eos_token_ids and tokenizer.eos_id == ends[-1]
    assert tokenizer.decode(tokenizer.encode("தமிழ் 👍\n\tx").ids) == "தமிழ் 👍\n\tx"


def test_the_tokenizer_comes_out_the_same_in_another_process(starter_home: pathlib.Path) -> None:
    from services.registry.worker import starter

    sealed = Shelf(starter_home / "store").open("models", "starter-test").payload / "tokenizer.json"
    again = json.loads(starter.tokenizer_bytes(starter.TEST))
    assert again["model"]["merges"] and again["model"] == json.loads(sealed.read_bytes())["model"]


@pytest.mark.slow
def test_the_whole_starter_comes_out_the_same(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    doors = open_doors(House(tmp_path / "home"))
    try:
        made = doors.make("again")[-1].model
    finally:
        doors.house.close()
    first = Shelf(starter_home / "store").open("models", "starter-test").manifest
    assert made.digest == first.digest
    assert made.digest == artifacts.digest_of(first.kind, first.files)
