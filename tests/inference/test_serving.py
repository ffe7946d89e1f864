"""What a caller hears: streams, adapters side by side, options, refusals."""

from __future__ import annotations

import concurrent.futures

import grpc
import pytest

from qlorad.v1 import inference_pb2, messages_pb2
from tests.house import eventually
from tests.inference import kit
from tests.inference.conftest import Served

ADAPTERS = ("base", "ada", "bob", "cy", "dee")


def named(adapter: str) -> str:
    return adapter if adapter == "base" else f"adapters/{adapter}"


def chat_request(adapter: str = "base", **options: object) -> inference_pb2.ChatRequest:
    turns = [
        kit.turn(messages_pb2.ROLE_SYSTEM, "You write short Python."),
        kit.turn(messages_pb2.ROLE_USER, "Add two numbers. வணக்கம்"),
    ]
    return inference_pb2.ChatRequest(
        adapter=adapter,
        conversation=messages_pb2.Conversation(messages=turns),
        options=inference_pb2.GenerationOptions(**options),  # type: ignore[arg-type]
    )


def test_greedy_answers_are_those_of_plain_peft_even_when_all_run_at_once(served: Served) -> None:
    """Token-equal with peft.PeftModel.from_pretrained + generate, alone and mixed in one batch."""
    asks = [(adapter, answer) for adapter in ADAPTERS for answer in served.oracle[adapter]]
    assert len(asks) == 15
    assert min(m for _, a in asks for m in a["margins"]) > 1e-4, "choose another seed for the test adapters"
    assert len({tuple(a["ids"]) for _, a in asks}) >= 10, "the adapters must differ for this test to mean anything"

    def ask(item: tuple[str, dict]) -> kit.Answer:
        adapter, expected = item
        return kit.generate(served.stub, expected["prompt"], named(adapter), max_tokens=len(expected["ids"]))

    alone = [ask(item) for item in asks]
    with concurrent.futures.ThreadPoolExecutor(len(asks)) as pool:
        mixed = list(pool.map(ask, asks))
    for (adapter, expected), one, many in zip(asks, alone, mixed, strict=True):
        assert one.ids == expected["ids"], adapter
        assert many.ids == expected["ids"], adapter
        assert many.text == one.text


def test_a_stream_tells_who_answers_and_how_it_ended(served: Served) -> None:
    loaded = {a.adapter: a for a in served.stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters}
    (model,) = served.stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    answer = kit.generate(served.stub, "def add(a, b):\n", "adapters/bob", max_tokens=5)
    assert answer.started.model_digest == model.digest
    assert answer.started.adapter_digest == loaded["adapters/bob"].digest
    assert answer.started.request_id and answer.started.prompt_tokens > 3
    assert answer.finish.reason == inference_pb2.FINISH_REASON_LENGTH
    assert answer.finish.completion_tokens == 5
    assert 0 <= answer.finish.queue_seconds <= answer.finish.first_token_seconds <= answer.finish.total_seconds
    assert kit.generate(served.stub, "x", "base", max_tokens=1).started.adapter_digest == ""
    by_digest = kit.generate(served.stub, "def add(a, b):\n", f"adapters/{loaded['adapters/bob'].digest}", max_tokens=5)
    assert by_digest.ids == answer.ids


def test_what_is_loaded_is_told(served: Served) -> None:
    (model,) = served.stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    assert (model.model, model.precision, model.device) == (kit.MODEL, inference_pb2.PRECISION_FP32, "cpu")
    assert model.memory_bytes >= 656_000 * 4 and model.context_tokens >= 512 and model.load_seconds > 0
    ranks = {"ada": 4, "bob": 16, "cy": 8, "dee": 4}
    kit.load(served.stub, *ranks)  # they are called what they were last asked by
    adapters = served.stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters
    assert {a.adapter: a.rank for a in adapters} == {f"adapters/{name}": rank for name, rank in ranks.items()}
    assert all(a.probe_effect > 0 and a.memory_bytes > 0 and a.base_digest == model.digest for a in adapters)
    again = served.stub.LoadModel(inference_pb2.LoadModelRequest(model=kit.MODEL))
    assert again.model == model
    same = served.stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter="adapters/ada"))
    assert same.adapter == adapters[0]


def test_chat_reads_what_the_template_writes(served: Served) -> None:
    from services.common import facts
    from services.common.prompt.example import as_template_sees
    from services.common.prompt.render import Renderer
    from services.common.prompt.tokens import Tokenizer
    from services.common.shelf import Shelf

    request = chat_request("adapters/bob", max_tokens=12)
    sealed = Shelf(served.home / "store").open("models", "starter-test")
    renderer = Renderer.open(sealed.payload, facts.from_manifest(facts.ModelFacts, sealed.manifest).template_date)
    messages, tools = as_template_sees(request.conversation)
    rendered = renderer.render(messages, tools, add_generation_prompt=True).text
    chat = kit.read(served.stub.Chat(request, timeout=60))
    assert chat.started.prompt_tokens == len(Tokenizer.open(sealed.payload).encode(rendered).ids)
    raw = kit.generate(served.stub, rendered, "adapters/bob", max_tokens=12)
    assert chat.ids == raw.ids


def test_the_same_seed_gives_the_same_text_whatever_else_runs(served: Served) -> None:
    how = {"max_tokens": 24, "temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 5}
    alone = kit.generate(served.stub, "import os\n", "adapters/ada", **how)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = [pool.submit(kit.generate, served.stub, "def f():", named(a), max_tokens=30) for a in ADAPTERS]
        among = kit.generate(served.stub, "import os\n", "adapters/ada", **how)
        for other in others:
            other.result()
    assert among.ids == alone.ids
    assert alone.started.seed == 5
    other = kit.generate(served.stub, "import os\n", "adapters/ada", **{**how, "seed": 6})
    assert other.ids != alone.ids
    unnamed = kit.generate(served.stub, "import os\n", "adapters/ada", max_tokens=24, temperature=1.2)
    told = kit.generate(
        served.stub, "import os\n", "adapters/ada", max_tokens=24, temperature=1.2, seed=unnamed.started.seed
    )
    assert told.ids == unnamed.ids


def test_top_k_of_one_and_a_small_top_p_are_greedy(served: Served) -> None:
    greedy = kit.generate(served.stub, "def f():", "adapters/bob", max_tokens=16)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        narrowed = kit.generate(
            served.stub, "def f():", "adapters/bob", max_tokens=16, temperature=2.0, seed=1, **narrow
        )
        assert narrowed.ids == greedy.ids


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(served: Served) -> None:
    whole = kit.generate(served.stub, "def add(a, b):\n", "base", max_tokens=40)
    assert len(whole.text) > 30 and len(whole.pieces) > 10
    # A stop that begins inside one token and ends inside a later one.
    middle = len("".join(whole.pieces[: len(whole.pieces) // 2]))
    stop = whole.text[middle - 2 : middle + 3]
    assert not any(stop in piece for piece in whole.pieces) or whole.text.index(stop) < middle
    stopped = kit.generate(served.stub, "def add(a, b):\n", "base", max_tokens=40, stop=["never there", stop])
    assert stopped.finish.reason == inference_pb2.FINISH_REASON_STOP
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.ids) < len(whole.ids)
    unhurt = kit.generate(served.stub, "def add(a, b):\n", "base", max_tokens=40, stop=["never there"])
    assert unhurt.text == whole.text


def test_the_end_token_ends_and_is_counted_but_is_no_text(served: Served) -> None:
    """A hot, random walk meets the end token sooner or later; fixed seeds make it always the same walk."""
    ended = None
    for seed in range(20):
        answer = kit.generate(served.stub, "x", "base", max_tokens=400, temperature=2.0, seed=seed)
        if answer.finish.reason == inference_pb2.FINISH_REASON_END:
            ended = answer
            break
    assert ended is not None
    assert len(ended.ids) < 400
    assert "<|im_end|>" not in ended.text


def test_the_context_bounds_an_answer_and_an_over_long_prompt_is_refused_by_tokens(served: Served) -> None:
    (model,) = served.stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    context = model.context_tokens
    long = "x\n" * 100
    tokens = kit.generate(served.stub, long, max_tokens=1).started.prompt_tokens
    per = tokens / 100
    nearly = "x\n" * int((context - 12) / per)
    answer = kit.generate(served.stub, nearly, max_tokens=context, seed=1, temperature=0.0)
    if answer.finish.reason == inference_pb2.FINISH_REASON_LENGTH:
        assert answer.started.prompt_tokens + len(answer.ids) == context
    too_long = "x\n" * (context + 10)
    request = inference_pb2.GenerateRequest(prompt=too_long, adapter="base")
    refusal = kit.refused(lambda: served.stub.Generate(request, timeout=30))
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT and refusal.fields == ["prompt"]
    assert str(context) in refusal.message and str(context - 1) in refusal.message


def test_wrong_requests_name_every_field(served: Served) -> None:
    request = inference_pb2.GenerateRequest(
        adapter="nonsense", options=inference_pb2.GenerationOptions(max_tokens=100_000, temperature=9)
    )
    refusal = kit.refused(lambda: served.stub.Generate(request, timeout=30))
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ["adapter", "options.max_tokens", "options.temperature", "prompt"]
    chat = kit.refused(lambda: served.stub.Chat(inference_pb2.ChatRequest(), timeout=30))
    assert chat.fields == ["conversation.messages"]


def test_unknown_names_are_refused_with_the_nearest_known(served: Served) -> None:
    stub = served.stub

    def ask(adapter: str = "base", model: str = "") -> kit.Refusal:
        request = inference_pb2.GenerateRequest(prompt="x", adapter=adapter, model=model)
        return kit.refused(lambda: stub.Generate(request, timeout=30))

    unknown = ask("adapters/boob")
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert "'adapters/bob'" in unknown.message
    assert ask(model="models/nothing").reason == "NOT_FOUND"
    for call in (
        lambda: stub.LoadModel(inference_pb2.LoadModelRequest(model="models/starter-tset")),
        lambda: stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter="adapters/boob")),
        lambda: stub.UnloadAdapter(inference_pb2.UnloadAdapterRequest(adapter="adapters/zero")),
        lambda: stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter="adapters/zero")),
    ):
        assert kit.refused(call).code == grpc.StatusCode.NOT_FOUND
    busy = kit.refused(
        lambda: stub.LoadModel(inference_pb2.LoadModelRequest(model=kit.MODEL, precision=inference_pb2.PRECISION_NF4))
    )
    assert busy.reason == "WRONG_STATE" and "PRECISION_FP32" in busy.message


def test_the_default_answers_where_no_adapter_is_named(served: Served) -> None:
    stub, prompt = served.stub, "def add(a, b):\n"

    def switch(adapter: str) -> inference_pb2.SwitchAdapterResponse:
        return stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter=adapter))

    bob = kit.generate(stub, prompt, "adapters/bob", max_tokens=8)
    try:
        assert switch("adapters/bob").previous_digest == ""
        default = kit.generate(stub, prompt, "", max_tokens=8)
        assert default.ids == bob.ids and default.started.adapter_digest == bob.started.adapter_digest
        listed = stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters
        assert [a.adapter for a in listed if a.is_default] == ["adapters/bob"]
    finally:
        back = switch("base")
    assert (back.digest, back.previous_digest) == ("", bob.started.adapter_digest)
    assert kit.generate(stub, prompt, "", max_tokens=8).started.adapter_digest == ""


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_client_that_is_gone_takes_its_work_along(served: Served, how: str) -> None:
    """P15 in short: gauges return to 0 and no token is made for nobody."""

    def running() -> float:
        return kit.metric(served.daemon, "qlorad_inference_requests_running") + kit.metric(
            served.daemon, "qlorad_inference_requests_waiting"
        )

    eventually(lambda: running() == 0, what="quiet before the test")
    before = kit.metric(served.daemon, "qlorad_inference_generated_tokens_total")
    request = inference_pb2.GenerateRequest(
        prompt="import os\n\n\nclass Store:\n", adapter="base", options=inference_pb2.GenerationOptions(max_tokens=900)
    )
    streams = [served.stub.Generate(request, timeout=60 if how == "cancel" else 0.3) for _ in range(6)]
    for stream in streams:
        assert next(stream).HasField("started")
    if how == "cancel":
        for stream in streams:
            stream.cancel()
        expected = grpc.StatusCode.CANCELLED
    else:
        expected = grpc.StatusCode.DEADLINE_EXCEEDED
    for stream in streams:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() == expected
    eventually(lambda: running() == 0, seconds=5, what="no request in the engine")
    made = kit.metric(served.daemon, "qlorad_inference_generated_tokens_total") - before
    assert made < 6 * 900 * 0.9
    assert kit.metric(served.daemon, "qlorad_inference_generated_tokens_total") - before == made


def test_a_slow_reader_stalls_nobody_and_loses_nothing(served: Served) -> None:
    request = inference_pb2.GenerateRequest(
        prompt="def add(a, b):\n", adapter="base", options=inference_pb2.GenerationOptions(max_tokens=40)
    )
    slow = served.stub.Generate(request, timeout=60)
    quick = kit.generate(served.stub, "def add(a, b):\n", "base", max_tokens=40)
    assert kit.read(slow).text == quick.text


def test_metrics_tell_of_tokens_and_times(served: Served) -> None:
    before = {n: kit.metric(served.daemon, n) for n in (
        "qlorad_inference_generated_tokens_total", "qlorad_inference_prompt_tokens_total",
        "qlorad_inference_first_token_seconds_count", "qlorad_inference_inter_token_seconds_count",
    )}  # fmt: skip
    answer = kit.generate(served.stub, "def add(a, b):\n", max_tokens=7)
    grown = [kit.metric(served.daemon, name) - old for name, old in before.items()]
    assert grown == [7, answer.started.prompt_tokens, 1, 6]
    in_memory = (kit.metric(served.daemon, "qlorad_inference_adapters", f'state="{s}"') for s in ("host", "device"))
    assert sum(in_memory) == 4
    (model,) = served.stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    assert kit.metric(served.daemon, "qlorad_inference_memory_bytes", 'kind="weights"') == model.memory_bytes
    assert kit.metric(served.daemon, "qlorad_inference_memory_bytes", 'kind="adapters"') > 0
    assert kit.metric(served.daemon, "qlorad_inference_models_resident") == 1
    assert kit.metric(served.daemon, "qlorad_inference_loads_total", 'kind="base"') == 1
    assert kit.metric(served.daemon, "qlorad_inference_load_seconds_count", 'kind="adapter"') >= 4
    kit.refused(lambda: served.stub.Generate(inference_pb2.GenerateRequest(prompt=""), timeout=10))
    refusals = kit.metric(served.daemon, "qlorad_inference_refusals_total")  # a series begins with its first refusal
    kit.refused(lambda: served.stub.Generate(inference_pb2.GenerateRequest(prompt=""), timeout=10))
    assert kit.metric(served.daemon, "qlorad_inference_refusals_total") == refusals + 1
