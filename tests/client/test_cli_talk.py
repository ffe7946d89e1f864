"""`qlorad generate --file`, `score`, `preset`, chat's commands: what stands on stdout, and the exit code."""

from __future__ import annotations

import json
import pathlib
import signal
from collections.abc import Iterator

import pytest

from qlorad import aio
from qlorad._messages import Answer
from qlorad.cli import batch, comparing
from qlorad.cli.conversation import Conversation
from qlorad.cli.output import Format
from qlorad.errors import InvalidArgument
from qlorad.v1 import errors_pb2
from qlorad.v1 import inference_pb2 as pb
from tests.client.cli import Cli


@pytest.fixture(scope="module", autouse=True)
def as_it_was(cli: Cli) -> Iterator[None]:
    """Other files find nothing loaded."""
    yield
    if cli.json("model", "loaded")["models"]:
        cli.json("model", "unload")


ASKED = batch.Asked("sample", "", False, "Be brief.", {"max_tokens": 5})


def test_a_line_says_what_the_command_line_does_not() -> None:
    text = '"one"\n\n{"prompt": "two", "adapter": "base", "options": {"temperature": 1}, "id": 7}\n'
    text += '{"messages": [{"role": "user", "content": "three"}], "options": {"max_tokens": 9}}\n'
    one, two, three = batch.read(text, ASKED)
    assert [m.parts[0].text for m in one.item.conversation.messages] == ["Be brief.", "one"]
    assert (one.item.adapter, one.item.options.max_tokens, one.ident) == ("adapters/sample", 5, None)
    assert (two.item.adapter, two.item.options.max_tokens, two.item.options.temperature) == ("base", 5, 1.0)
    assert two.ident == 7 and three.item.options.max_tokens == 9
    assert [m.parts[0].text for m in three.item.conversation.messages] == ["three"], "whole turns are left alone"
    raw = batch.Asked("", "", True, "", {})
    assert batch.read('{"prompt": "import"}', raw)[0].item.prompt == "import"


def test_every_line_that_is_wrong_is_told_with_its_number() -> None:
    text = '"good"\n{\n{"prompt": 3}\n{"propmt": "x"}\n[]\n{"prompt": "x", "messages": []}\n'
    text += '{"prompt": "x", "options": {"heat": 1}}\n{"messages": [{"role": "king", "content": "x"}]}\n'
    with pytest.raises(InvalidArgument) as caught:
        batch.read(text, ASKED)
    assert [v.field for v in caught.value.violations] == [f"line {n}" for n in range(2, 9)]
    with pytest.raises(InvalidArgument, match="no prompt"):
        batch.read("\n \n", ASKED)


def test_a_file_is_answered_as_a_batch_in_its_order(cli: Cli, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "add numbers", "id": "a"}, {"prompt": "x", "adapter": "base", "options": {"max_tokens": 2}}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("generate", "--file", str(file), "--adapter", "sample", "--max-tokens", "6")
    told = [json.loads(line) for line in cli.inside(*asked).splitlines()]
    assert [t["index"] for t in told] == [0, 1] and told[0]["id"] == "a" and "id" not in told[1]
    assert told[0]["started"]["adapter_digest"] and not told[1]["started"]["adapter_digest"]
    assert told[1]["finish"]["completion_tokens"] <= 2
    alone = cli.json("generate", "add numbers", "--adapter", "sample", "--max-tokens", "6")
    assert told[0]["text"] == alone["text"]
    assert [a["text"] for a in cli.json(*asked)["answers"]] == [t["text"] for t in told]

    lines = [{"prompt": "x"}, {"prompt": "y " * 9000}, {"prompt": "x", "adapter": "no-such"}, {"prompt": "z"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    failing = [json.loads(line) for line in cli.inside(*asked, code=1).splitlines()]
    assert "finish" in failing[0] and "finish" in failing[3]
    assert failing[1]["error"]["reason"] == "INVALID_REQUEST" and "tokens" in failing[1]["error"]["message"]
    assert failing[2]["error"]["reason"] == "NOT_FOUND"
    for words, option in (
        (("generate", "x", "--file", str(file)), "--file"),
        (("generate", "x", "--raw", "--preset", "review-code"), "--preset"),
        (("compare", "x", "--adapter", "sample", "--raw", "--system", "y"), "--system"),
        (("score", "x", "--system", "y"), "--system"),
    ):
        assert cli.json(*words, code=2)["error"]["violations"][0]["field"] == option, "no word is without effect"


async def test_several_by_asyncio(cli: Cli) -> None:
    async with aio.connect(home=cli.home) as client:
        items = ["import", {"messages": [{"role": "user", "content": "x"}], "adapter": "base", "options": {"seed": 3}}]
        told = client.inference.generate_batch([*items, {"prompt": "x", "model": "no-such"}])
        raw, talk, failed = await client.inference.answers(told, 3)
        assert raw.text and talk.started.seed == 3 and not talk.started.adapter_digest and raw.failed is None
        assert failed.failed is not None and "no-such" in failed.failed.message
        beside = client.inference.compare("import", ["base", "sample"], raw=True, max_tokens=2, log_probabilities=1)
        both = await client.inference.answers(beside, 2)
        assert [len(a.log_probabilities) for a in both] == [len(a.ids) for a in both]
        cut = [t.id for t in await client.inference.tokenize("def f():")]
        shown = await client.inference.render("hello", adapter="base")
        assert cut and "hello" in shown.text and len(shown.tokens) > 1
        with pytest.raises(InvalidArgument, match="max_token"):
            await client.inference.answer(client.inference.generate("x", max_token=3))  # type: ignore[call-arg]


def test_likelihoods_are_told_side_by_side(cli: Cli) -> None:
    voices = ("--adapter", "base", "--adapter", "sample")
    told = cli.json("score", "def add(a, b):", *voices, "--alternatives", "2")["scores"]
    assert [t["adapter"] for t in told] == ["base", "sample"]
    assert told[0]["perplexity"] != told[1]["perplexity"] and told[0]["scored_tokens"] == len(told[0]["tokens"]) - 1
    shown = cli.inside("score", "add numbers", "--answer", "def add(a, b): return a + b", *voices, "--tokens")
    assert "PERPLEXITY" in shown and "=== sample" in shown and "'def'" in shown
    assert cli.json("score", "", code=2)["error"]["violations"][0]["field"] == "prompt"


def test_presets_are_made_shown_used_and_deleted(cli: Cli, tmp_path: pathlib.Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Write it as Python: {input}")
    made = cli.json("preset", "create", "pythonic", "--template", f"@{words}", "--max-tokens", "3", "--stop", "zz")
    assert made["name"] == "presets/pythonic" and made["options"]["max_tokens"] == 3
    assert (
        cli.json("preset", "create", "pythonic", "--template", "{input}", code=1)["error"]["code"] == "ALREADY_EXISTS"
    )
    listed = cli.inside("preset", "list")
    assert "summarise-paper" in listed and "pythonic" in listed and "max_tokens 3" in listed
    assert "as Python" in cli.inside("preset", "show", "pythonic")
    told = cli.json("generate", "add numbers", "--adapter", "sample", "--preset", "pythonic")
    assert told["finish"]["completion_tokens"] <= 3
    plain = cli.json("generate", "add numbers", "--adapter", "sample", "--max-tokens", "3")
    cold = cli.json("preset", "create", "warm", "--template", "{input}", "--temperature", "1.5", "--seed", "5")
    assert cold["options"] == {"temperature": 1.5, "seed": 5, "stop": [], "ignore_end": False}
    greedy = [cli.json("generate", "x", "--adapter", "sample", "--temperature", "0", *more, "--max-tokens", "6")["ids"]
              for more in (("--preset", "warm"), ())]  # fmt: skip
    assert greedy[0] == greedy[1], "a 0 that was said is not the preset's to replace"
    cli.json("preset", "delete", "warm")
    assert told["started"]["prompt_tokens"] > plain["started"]["prompt_tokens"]
    assert cli.json("preset", "delete", "pythonic") == {"deleted": "pythonic"}
    assert cli.json("preset", "show", "pythonic", code=3)["error"]["code"] == "NOT_FOUND"
    shipped = cli.json("preset", "delete", "review-code", code=1)["error"]
    assert shipped["reason"] == "IN_USE"
    bad = cli.json("preset", "create", "Bad", "--template", "none", "--temperature", "7", "--top-p", "0", code=2)[
        "error"
    ]
    fields = {"preset.name", "preset.template", "preset.options.temperature", "preset.options.top_p"}
    assert {v["field"] for v in bad["violations"]} == fields


def test_compare_says_who_failed_and_ends_with_one(cli: Cli) -> None:
    told = cli.json("compare", "y " * 9000, "--adapter", "sample", code=1)["answers"]
    assert [t["error"]["reason"] for t in told] == ["INVALID_REQUEST"] * 2
    plain = cli.inside("compare", "x", "--adapter", "sample", "--max-tokens", "4", "--raw")
    assert plain.index("=== base") < plain.index("tok/s") < plain.index("=== sample")


def test_the_base_and_two_adapters_stand_side_by_side(cli: Cli) -> None:
    cli.json("adapter", "alias", "twin", "sample")
    try:
        voices = ("--adapter", "sample", "--adapter", "twin")
        seen = cli.on_terminal("compare", "add numbers", *voices, "--max-tokens", "12")
        assert any(all(w in line for w in ("base", "sample", "twin")) for line in seen.splitlines())
        told = cli.json("compare", "add numbers", *voices, "--max-tokens", "12")["answers"]
        assert [t["adapter"] for t in told] == ["base", "sample", "twin"]
        assert told[1]["ids"] == told[2]["ids"] != told[0]["ids"]
    finally:
        cli.json("adapter", "delete", "twin")


def test_what_comes_interleaved_is_told_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    start, end = pb.Started(), pb.Finish(reason=pb.FINISH_REASON_END)
    fail = pb.Failure(reason=errors_pb2.REASON_CORRUPT, message="torn")
    told = iter([
        (1, start), (1, pb.Delta(text="B1")), (0, start), (0, pb.Delta(text="A1")), (2, fail), (1, pb.Delta(text="B2")),
        (1, end), (0, pb.Delta(text="A2")), (0, end),
    ])  # fmt: skip
    answers = comparing.show(["a", "b", "c"], (t for t in told), Format.table)
    shown = capsys.readouterr().out
    assert [a.text for a in answers] == ["A1A2", "B1B2", ""]
    places = [shown.index(w) for w in ("=== a", "A1A2", "=== b", "B1B2", "=== c", "CORRUPT: torn")]
    assert places == sorted(places)


class Room:
    """A conversation without a daemon: who was asked what."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[str]]] = []
        self.loaded: list[str] = []
        self.fails = False

    def answer(self, turns: list, who: str) -> Answer:
        return self.beside(turns, [who])[0]

    def beside(self, turns: list, voices: list[str]) -> list[Answer]:
        self.asked.append((voices, [t.parts[0].text for t in turns]))
        told = [Answer(text=f"{voice} says") for voice in voices]
        if self.fails:
            told[0].failed = pb.Failure()
        return told

    def talk(self, *lines: str) -> None:
        Conversation("", "", self.answer, self.beside, self.loaded.append).run(lines)


def test_two_may_answer_and_the_first_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    room = Room()
    room.talk(
        "one", "/compare base ada", "two", "/base", "three", "/reset", "four", "/help", "/compare x", "/quit", "five"
    )
    assert [voices for voices, _ in room.asked] == [[""], ["base", "ada"], ["base"], ["base"]]
    assert room.asked[2][1] == ["one", " says", "two", "base says", "three"] and room.asked[3][1] == ["four"]
    assert room.loaded == ["ada"]
    said = capsys.readouterr().err
    assert "/compare A B" in said and "base and ada answer" in said and "'/compare x' is no command" in said


def test_an_answer_that_failed_is_not_said_again() -> None:
    room = Room()
    room.fails = True
    room.talk("/compare ada bob", "one", "two")
    assert [asked for _, asked in room.asked] == [["one"], ["two"]]


def test_adapters_are_watched_until_one_has_seen_enough(cli: Cli) -> None:
    cli.json("adapter", "load", "sample", "--pin")
    process = cli.start("adapter", "watch", "-o", "jsonl")
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["sequence"] == 1 and first["adapter"]["adapter"] == "adapters/sample"
        cli.json("adapter", "unload", "sample")
        states = [first["adapter"]["state"]]
        while states[-1] != "ADAPTER_STATE_ABSENT":
            states.append(json.loads(process.stdout.readline())["adapter"]["state"])
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()
