"""An adapter proves itself before it answers, and leaves without a trace."""

from __future__ import annotations

import concurrent.futures
import pathlib
import threading
from collections.abc import Callable

import grpc
import pytest

from qlorad.v1 import inference_pb2, messages_pb2
from services.common import facts
from services.common.prompt import formats
from services.common.prompt.example import as_template_sees
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from tests.house import House, eventually
from tests.inference import kit
from tests.inference.conftest import Served

UNSOUND = {
    "zero": ("REJECTED", "check 'effect'"),
    "renamed": ("REJECTED", "check 'keys'"),
    "cut": ("REJECTED", "check 'keys'"),
    "foreign-base": ("REJECTED", "check 'base'"),
    "foreign-template": ("REJECTED", "check 'template'"),
    "misformed": ("REJECTED", "check 'golden renderings'"),
    "golden": ("REJECTED", "check 'golden renderings'"),
    "flipped": ("CORRUPT", "adapter_model.safetensors"),
    "torn": ("CORRUPT", "adapter_model.safetensors"),
}
"""What is wrong with an adapter -> how it is refused, and what the refusal names."""
CODES = {"REJECTED": grpc.StatusCode.FAILED_PRECONDITION, "CORRUPT": grpc.StatusCode.DATA_LOSS}


def test_unsound_adapters_are_refused_by_name_while_a_stream_goes_on(served: Served) -> None:
    """P18: by LoadAdapter and by a request that names them; they stay listed with the reason, and are tried again."""
    stub = served.stub
    sound = {name: a.digest for name, a in kit.adapters(stub).items()}
    expected = served.oracle["bob"][0]
    options = inference_pb2.GenerationOptions(max_tokens=900)
    request = inference_pb2.GenerateRequest(prompt=expected["prompt"], adapter="adapters/bob", options=options)
    stream = stub.Generate(request, timeout=120)
    assert next(stream).HasField("started")
    for name, (reason, named) in UNSOUND.items():
        load = inference_pb2.LoadAdapterRequest(adapter=f"adapters/{name}")
        ask = inference_pb2.GenerateRequest(prompt="x", adapter=f"adapters/{name}")
        for call in (
            lambda load=load: stub.LoadAdapter(load, timeout=60),
            lambda ask=ask: stub.Generate(ask, timeout=60),
        ):
            refusal = kit.refused(call)
            assert (refusal.code, refusal.reason) == (CODES[reason], reason), (name, refusal)
            assert named in refusal.message, (name, refusal)
        listed = kit.adapters(stub)[f"adapters/{name}"]
        assert listed.state == inference_pb2.ADAPTER_STATE_REJECTED and named in listed.state_reason
        assert not listed.memory_bytes and not listed.in_flight
    ids = [i for m in stream if m.HasField("delta") for i in m.delta.ids]
    assert ids[: len(expected["ids"])] == expected["ids"]
    after = {n: a.digest for n, a in kit.adapters(stub).items() if a.state != inference_pb2.ADAPTER_STATE_REJECTED}
    assert after == sound
    assert kit.metric(served.daemon, "qlorad_inference_adapters", 'state="rejected"') == len(UNSOUND)
    wrong = inference_pb2.GenerateRequest(prompt="x", adapter="adapters/eve", model=kit.MODEL)
    refusal = kit.refused(lambda: stub.Generate(wrong, timeout=60))
    assert refusal.reason == "REJECTED" and "check 'base'" in refusal.message
    other = kit.refused(lambda: stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter="adapters/eve")))
    assert other.reason == "WRONG_STATE" and "models/other" in other.message


def test_an_adapter_is_served_with_the_prompt_format_it_was_trained_with(served: Served) -> None:
    """A conversation becomes what the format writes of it, for this adapter alone; what it cannot is refused."""
    sealed = Shelf(served.home / "store").open("models", "starter-test")
    date = facts.from_manifest(facts.ModelFacts, sealed.manifest).template_date
    renderer = Renderer.open(sealed.payload, date, messages_pb2.PROMPT_FORMAT_ALPACA)
    asked = kit.turn(messages_pb2.ROLE_USER, "Add them.")
    asked.parts.add(text="\n\n2 and 3")
    talk = messages_pb2.Conversation(messages=[asked])
    options = inference_pb2.GenerationOptions(max_tokens=12)
    served.stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter="adapters/formed"), timeout=60)
    try:
        request = inference_pb2.ChatRequest(conversation=talk, adapter="adapters/formed", options=options)
        answer = kit.read(served.stub.Chat(request, timeout=60))
        prompt = renderer.render(*as_template_sees(talk, parts=True), add_generation_prompt=True).text
        assert "### Input:\n2 and 3" in prompt
        assert answer.started.prompt_tokens == len(Tokenizer.open(sealed.payload).encode(prompt).ids)
        assert answer.ids == kit.generate(served.stub, prompt, "adapters/formed", max_tokens=12).ids
        request.adapter = "adapters/ada"
        assert kit.read(served.stub.Chat(request, timeout=60)).started.prompt_tokens < answer.started.prompt_tokens
        request.adapter = "adapters/formed"
        request.conversation.tools.add(name="f")
        refusal = kit.refused(lambda: served.stub.Chat(request, timeout=60))
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "tools: the Alpaca format" in refusal.message and "prompt format takes" in refusal.message
    finally:
        served.stub.UnloadAdapter(inference_pb2.UnloadAdapterRequest(adapter="adapters/formed"), timeout=60)


def test_the_text_that_ends_an_answer_stops_it_where_the_model_has_no_token_for_it() -> None:
    from services.inference.worker.rows import Answering

    options = inference_pb2.GenerationOptions(stop=["\n\n"])
    assert Answering(1, "", [1], 0, "", options=options).stops.stops == ("\n\n",)
    end = formats.end_text(messages_pb2.PROMPT_FORMAT_PHI3)
    row = Answering(1, "", [1], 0, "", options=options, end=end)
    assert row.stops.push("blue<|e") == ("blue", False) and row.stops.push("nd|>\n") == ("", True)


def test_unloading_lets_requests_finish_and_frees_what_was_told(served: Served) -> None:
    stub = served.stub
    (cy,) = [a for a in stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters if a.adapter == "adapters/cy"]
    whole = kit.generate(stub, "x", "adapters/cy", max_tokens=300)
    request = inference_pb2.GenerateRequest(
        prompt="x", adapter="adapters/cy", options=inference_pb2.GenerationOptions(max_tokens=300)
    )
    stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter="adapters/cy"))
    stream = stub.Generate(request, timeout=60)
    first = next(stream)
    freed: list[int] = []
    unloading = threading.Thread(
        target=lambda: freed.append(
            stub.UnloadAdapter(inference_pb2.UnloadAdapterRequest(adapter="adapters/cy"), timeout=60).freed_bytes
        )
    )
    unloading.start()
    rest = [m.delta for m in stream if m.HasField("delta")]
    unloading.join()
    assert first.started.adapter_digest == cy.digest
    assert [i for delta in rest for i in delta.ids] == whole.ids
    assert freed == [cy.memory_bytes]
    assert "adapters/cy" not in kit.adapters(stub)
    gone = kit.refused(lambda: kit.unload_adapter(stub, "adapters/cy"))
    assert gone.reason == "NOT_FOUND" and "not loaded" in gone.message
    assert kit.generate(stub, "x", "", max_tokens=1).started.adapter_digest == ""  # the base is the default again
    again = stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter="adapters/cy"), timeout=60).adapter
    assert (again.digest, again.probe_effect) == (cy.digest, cy.probe_effect)
    assert kit.generate(stub, "x", "adapters/cy", max_tokens=300).ids == whole.ids


def test_an_alias_is_followed_at_the_door_and_never_later(served: Served) -> None:
    """By requests, also to what is not in memory, and by the default; each answer is of one digest alone."""
    stub, shelf = served.stub, Shelf(served.home / "store")
    ada, cy = (shelf.resolve("adapters", name) for name in ("ada", "cy"))
    oracle = {ada: served.oracle["ada"][2], cy: served.oracle["cy"][2]}
    shelf.set_alias("adapters", "best", ada)

    def ask(adapter: str, tokens: int = 20) -> str:
        answer = kit.generate(stub, "x", adapter, max_tokens=tokens)
        digest = answer.started.adapter_digest
        assert answer.ids == oracle[digest]["ids"][:tokens]
        return digest

    assert ask("adapters/best") == ada
    assert kit.switch(stub, "adapters/best").digest == ada
    assert kit.adapters(stub)["adapters/best"].digest == ada, "it is called what it was last asked by"
    options = inference_pb2.GenerationOptions(max_tokens=900)
    begun = stub.Generate(inference_pb2.GenerateRequest(prompt="x", adapter="", options=options), timeout=60)
    assert next(begun).started.adapter_digest == ada
    kit.unload_adapter(stub, "adapters/cy")
    shelf.set_alias("adapters", "best", cy)
    assert ask("adapters/best") == cy, "loaded on demand"
    assert ask("") == cy, "the default is a name"
    assert [a.digest for a in kit.adapters(stub).values() if a.is_default] == [cy]
    ids = [i for m in begun if m.HasField("delta") for i in m.delta.ids]
    assert ids[:40] == oracle[ada]["ids"], "what had begun ends as it began"
    back = kit.switch(stub, "base")
    assert (back.digest, back.previous_digest) == ("", cy)
    assert [ask("adapters/ada", 1), ask("adapters/cy", 1)] == [ada, cy]


def test_requests_load_what_they_name_once_and_the_others_go_on(served: Served) -> None:
    stub = served.stub
    kit.unload_adapter(stub, "adapters/cy")
    watch = stub.WatchAdapters(inference_pb2.WatchAdaptersRequest(), timeout=60)
    there = []
    for message in watch:
        there.append(message.adapter.adapter)
        if message.snapshot_end:
            break
    assert "adapters/cy" not in there and "adapters/ada" in there
    loads = kit.metric(served.daemon, "qlorad_inference_loads_total", 'kind="adapter",result="loaded"')
    expected = served.oracle["cy"][0]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda _: kit.generate(stub, expected["prompt"], "adapters/cy", max_tokens=40), range(6))
        )
    assert all(a.ids == expected["ids"] for a in answers)
    assert kit.metric(served.daemon, "qlorad_inference_loads_total", 'kind="adapter",result="loaded"') == loads + 1
    freed = kit.unload_adapter(stub, "adapters/cy")
    states = []
    for message in watch:
        assert message.sequence == len(there) + len(states) + 1 and message.adapter.adapter == "adapters/cy"
        states.append(message.adapter.state)
        if states[-1] == inference_pb2.ADAPTER_STATE_HOST:
            assert message.adapter.memory_bytes == freed and message.adapter.probe_effect > 0
        if states[-1] == inference_pb2.ADAPTER_STATE_ABSENT:
            break
    assert states == [*sorted(states[:-1], key=ORDER.index), inference_pb2.ADAPTER_STATE_ABSENT]
    watch.cancel()
    kit.load(stub, "cy")


ORDER = [
    inference_pb2.ADAPTER_STATE_FETCHING, inference_pb2.ADAPTER_STATE_VERIFYING, inference_pb2.ADAPTER_STATE_HOST,
    inference_pb2.ADAPTER_STATE_DEVICE, inference_pb2.ADAPTER_STATE_DRAINING,
]  # fmt: skip


def test_what_is_resident_cannot_be_removed(served: Served) -> None:
    from services.common.errors import Fault

    shelf = Shelf(served.home / "store")
    for collection, name in (("adapters", "ada"), ("models", "starter-test")):
        with pytest.raises(Fault) as caught:
            shelf.remove(collection, name)
        assert "inference/engine" in caught.value.message


@pytest.mark.slow
def test_a_request_id_is_answered_once(
    serving_home: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    house = house_factory(serving_home)
    daemon, stub = kit.start(house)
    load = inference_pb2.LoadModelRequest(model=kit.MODEL, precision=inference_pb2.PRECISION_FP32, request_id="load")
    loaded = stub.LoadModel(load, timeout=60)
    kit.load(stub, "ada", "bob")
    switch = inference_pb2.SwitchAdapterRequest(adapter="adapters/ada", request_id="one")
    first = stub.SwitchAdapter(switch)
    stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter="adapters/bob", request_id="two"))
    assert stub.SwitchAdapter(switch) == first
    listed = stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters
    assert [a.adapter for a in listed if a.is_default] == ["adapters/bob"], "a replay must not switch again"
    other = inference_pb2.SwitchAdapterRequest(adapter="base", request_id="one")
    assert kit.refused(lambda: stub.SwitchAdapter(other)).reason == "REQUEST_ID_REUSED"
    unload = inference_pb2.UnloadAdapterRequest(adapter="adapters/ada", request_id="un")
    freed = stub.UnloadAdapter(unload)
    assert freed.freed_bytes > 0
    kit.load(stub, "ada")
    assert stub.UnloadAdapter(unload) == freed
    listed = stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters
    assert [a.adapter for a in listed] == ["adapters/bob", "adapters/ada"], "a replay must not unload again"

    engine = kit.engine_of(daemon)
    daemon.kill()
    eventually(lambda: not engine.is_running(), seconds=10, what="the engine's end with its daemon")
    assert kit.held(serving_home) is None
    _, stub = kit.start(house)
    assert stub.SwitchAdapter(switch) == first, "also after a restart"
    assert not stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models, "nothing is loaded by itself"
    assert stub.LoadModel(load, timeout=60).model.digest == loaded.model.digest
    assert stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models, "a stale answer would be untrue"
    listed = stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters
    assert [(a.adapter, a.is_default) for a in listed] == [("adapters/bob", True), ("adapters/ada", False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "dtype"), [("straight", "fp32"), ("whole", "fp32"), ("straight", "bf16")])
def test_dora_beside_lora_gives_the_logits_of_plain_peft(serving_home: pathlib.Path, way: str, dtype: str) -> None:
    """One batch of base, LoRA (one of them rank-stabilised) and DoRA, some with many new tokens, some with one;
    nothing stays when they go. In bf16 the compiled part serves LoRA, and leaves to the stacks who stands beside DoRA.
    """
    import torch
    from peft import PeftModel

    from services.common.worker import adapter
    from services.common.worker.load import load_base
    from services.inference.worker import flat, straight
    from services.inference.worker.forward import Whole
    from services.inference.worker.lanes import Lanes
    from services.inference.worker.lora import Lora

    shelf = Shelf(serving_home / "store")
    payload = shelf.open("models", "starter-test").payload
    ids, near = list(range(20, 44)), 2e-4 if dtype == "fp32" else 0.08
    with torch.no_grad():
        model = load_base(payload, "none", False, dtype)
        lora = Lora(model, model.dtype)
        plain = load_base(payload, "none", False, "fp32")
        expected = {"": plain(input_ids=torch.tensor([ids])).logits[0]}
        if way == "whole":
            lora.hook()
        forward = Whole(model) if way == "whole" else straight.of(model, lora)
        assert forward is not None
        for name in ("ada", "bob", "cy", "dee"):
            folder = shelf.open("adapters", name).payload
            whole = PeftModel.from_pretrained(load_base(payload, "none", False, "fp32"), str(folder)).eval()
            expected[name] = whole(input_ids=torch.tensor([ids])).logits[0]
            tensors, scaling = adapter.read_tensors(folder), adapter.scaling(adapter.read_config(folder))
            gains = lora.gains(tensors, scaling)
            assert bool(gains) == (name == "dee")
            held = lora.add(name, tensors, scaling, gains)
            each = model.dtype.itemsize  # magnitudes stay as exact as they came
            assert held == sum(t.numel() * (4 if "magnitude" in n else each) for n, t in tensors.items())
        for name in ("ada", "bob", "cy", "dee"):
            assert float((expected[name] - expected[""]).abs().mean()) > 0.5
        config, device = model.config, torch.device("cpu")
        shapes = [(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers
        for rows in (("", "ada", "dee", "bob"), ("dee", "dee", ""), ("dee",), ("ada", "ada"), ("bob", "cy", "ada")):
            lanes = Lanes(shapes, model.dtype, device, 0)
            places = [lanes.take(24 if number % 2 else 200) for number in range(len(rows))]
            seen: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(rows))}
            while any(place.length < 24 for place in places):
                pieces, whose = [], []
                for number, (row, place) in enumerate(zip(rows, places, strict=True)):
                    count = (1, 5, 11)[(place.length + number) % 3]
                    some = ids[place.length : min(24, place.length + count)]
                    if some:
                        pieces.append(flat.Piece(place, some, row, len(some)))
                        whose.append(number)
                laid = flat.lay(pieces, device)
                lora.choose(laid)
                logits = forward(laid)
                lora.choose(None)
                flat.settle(pieces)
                for at, piece in enumerate(laid.order):
                    seen[whose[piece]].append(logits[at])
            for number, row in enumerate(rows):
                far = (torch.stack(seen[number]).float() - expected[row]).abs()
                assert float(far.max() if dtype == "fp32" else far.mean()) < near
        if dtype == "bf16" and lora._each is not None:
            assert any(site.table is not None for site in lora._sites), "of a line without DoRA"
        assert lora.remove("dee") == held and "dee" not in lora
        assert "dee" not in lora.on_device
        assert all(s.stack is None or s.line == lora._number for s in lora._sites)
        assert "dee" not in lora._line and not any(s.singles for s in lora._sites)
