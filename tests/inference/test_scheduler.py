"""Rows that come and go: what a step reads, who is next, what is kept, what is told."""

from __future__ import annotations

import collections
import itertools
import math
import random
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import inference_pb2
from services.common.errors import Fault
from services.inference.worker import sampling
from services.inference.worker.lanes import Lanes
from services.inference.worker.pace import Pace
from services.inference.worker.turns import Turns
from tests.inference import rows_kit as kit

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.no_grad():
        yield kit.tiny("Llama")


def test_a_prompt_seen_before_is_not_read_again_and_changes_nothing(model: Any) -> None:
    with torch.no_grad():
        adapters = {"ada": kit.with_adapter("Llama", 1)}
        made = kit.engine(model, adapters, prefix=1 << 20)
        asks = [(kit.prompt_of(1, 200), ""), (kit.prompt_of(1, 200), "ada"), ([*kit.prompt_of(1, 200)[:130], 9], "")]
        first = []
        for prompt, adapter in asks:
            call = made.ask(prompt, adapter, max_tokens=8)
            made.run()
            first.append(made.ids(call))
        assert (made.prefixes.hit_tokens, made.said(1, "begun")[0].cached_tokens) == (
            128,
            0,
        )  # of the third, by the first
        hits = made.prefixes.hit_tokens
        for (prompt, adapter), ids in zip(asks, first, strict=True):
            call = made.ask(prompt, adapter, max_tokens=8)
            made.run()
            assert made.ids(call) == ids
            assert made.said(call, "begun")[0].cached_tokens in (192, 128)
        assert made.prefixes.hit_tokens - hits == 192 + 192 + 128
        # What an answer was goes on where it ended: the next turn of a conversation finds it.
        talk = asks[0][0] + first[0]
        call = made.ask([*talk, *kit.prompt_of(7, 60)], max_tokens=1)
        made.run()
        assert made.said(call, "begun")[0].cached_tokens == 192
        assert 0 < made.prefixes.bytes_held <= 1 << 20


def test_prefixes_stay_within_their_bytes(model: Any) -> None:
    with torch.no_grad():
        block = 64 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, heads, width, fp32
        made = kit.engine(model, prefix=3 * block)
        for seed in range(6):
            made.ask(kit.prompt_of(seed, 130), max_tokens=1)
            made.run()
            assert made.prefixes.bytes_held <= 3 * block
        assert made.prefixes.bytes_held == 3 * block


def test_rows_wait_for_room_and_what_never_fits_is_refused(model: Any) -> None:
    with torch.no_grad():
        made = kit.engine(model, limit=3 * 128 * 2 * 2 * 2 * 16 * 4)
        calls = [made.ask(kit.prompt_of(n, 20), max_tokens=30) for n in range(7)]
        seen = []
        while made.scheduler.has_work:
            made.step()
            seen.append(made.scheduler.gauges().rows)
            assert made.lanes.bytes_used <= made.lanes.limit
        assert max(seen) == 3 and all(len(made.ids(call)) == 30 for call in calls)
        with pytest.raises(Fault, match="would need"):
            made.ask(kit.prompt_of(1, 500), max_tokens=30)


def test_a_long_prompt_does_not_stall_those_who_get_tokens(model: Any) -> None:
    with torch.no_grad():
        made = kit.engine(model, rows=4)
        short = made.ask(kit.prompt_of(1, 5), max_tokens=200)
        made.step()
        long = made.ask(kit.prompt_of(2, 900), max_tokens=4)
        late = made.ask(kit.prompt_of(3, 6), max_tokens=4)
        steps = 0
        while not made.ids(long):
            before = len(made.ids(short))
            made.step()
            steps += 1
            assert len(made.ids(short)) == before + 1  # one token a step, whatever is read beside
            if steps == 3:
                assert made.ids(late)  # the shorter prompt goes first
        made.run()
        assert len(made.ids(long)) == len(made.ids(late)) == 4


def test_a_cancelled_request_is_gone_at_once(model: Any) -> None:
    with torch.no_grad():
        made = kit.engine(model, rows=2)
        calls = [made.ask(kit.prompt_of(n, 40), max_tokens=50) for n in range(3)]
        made.step()
        expected = kit.greedy(model, kit.prompt_of(1, 40), 50)[0]
        for call in (calls[0], calls[2]):
            (report,) = made.scheduler.cancel(call)
            assert report.ended.reason == inference_pb2.FINISH_REASON_UNSPECIFIED
        assert made.scheduler.cancel(calls[0]) == []
        made.run()
        assert made.ids(calls[1]) == expected and len(made.ids(calls[0])) <= 1 and not made.ids(calls[2])
        assert made.lanes.bytes_used == 0


def test_scores_are_the_models_own_log_probabilities(model: Any) -> None:
    with torch.no_grad():
        adapter = kit.with_adapter("Llama", 1)
        made = kit.engine(model, {"ada": adapter})
        prompt = kit.prompt_of(4, 300)
        calls = {"": made.score(prompt, "", 3), "ada": made.score(prompt, "ada", 3)}
        answer = made.ask(kit.prompt_of(1, 9), max_tokens=5)
        made.run()
        assert len(made.ids(answer)) == 5
        for name, plain in (("", model), ("ada", adapter)):
            (scored,) = made.said(calls[name], "scored")
            sure = torch.log_softmax(plain(input_ids=torch.tensor([prompt])).logits[0].double(), -1)
            assert [t.id for t in scored.tokens] == prompt and not scored.tokens[0].is_scored
            for n, token in enumerate(scored.tokens[1:]):
                assert token.is_scored
                assert token.log_probability == pytest.approx(float(sure[n, prompt[n + 1]]), abs=1e-3)
                best = torch.topk(sure[n], 3)
                assert [a.log_probability for a in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_penalties_are_those_of_transformers(model: Any) -> None:
    with torch.no_grad():
        made = kit.engine(model)
        prompt = kit.prompt_of(6, 12)
        own, lead = kit.greedy(model, prompt, 20, repetition_penalty=1.7)
        assert lead > 1e-4 and own != kit.greedy(model, prompt, 20)[0]
        penal = made.ask(prompt, max_tokens=20, repetition_penalty=1.7)
        plain = made.ask(prompt, max_tokens=20)
        present = made.ask(prompt, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0)
        made.run()
        assert made.ids(penal) == own
        assert made.ids(plain) == kit.greedy(model, prompt, 20)[0]
        assert len(set(made.ids(present))) >= len(set(kit.greedy(model, prompt, 40)[0]))


def test_min_p_keeps_what_transformers_keeps(model: Any) -> None:
    with torch.no_grad():
        prompt = kit.prompt_of(8, 10)
        logits = model(input_ids=torch.tensor([prompt])).logits[:, -1]
        kept = transformers.MinPLogitsWarper(0.2)(torch.tensor([prompt]), logits / 1.5)[0]
        allowed = set(torch.isfinite(kept).nonzero().flatten().tolist())
        made = kit.engine(model)
        calls = [made.ask(prompt, max_tokens=1, temperature=1.5, min_p=0.2, seed=n) for n in range(60)]
        made.run()
        drawn = {made.ids(call)[0] for call in calls}
        assert drawn <= allowed and len(drawn) > 1


def test_log_probabilities_are_told_before_temperature(model: Any) -> None:
    with torch.no_grad():
        made = kit.engine(model)
        prompt = kit.prompt_of(2, 10)
        call = made.ask(prompt, max_tokens=3, temperature=1.9, log_probabilities=2)
        quiet = made.ask(prompt, max_tokens=3)
        made.run()
        seen = list(prompt)
        for tokens in made.said(call, "tokens"):
            (told,) = tokens.log_probabilities
            sure = torch.log_softmax(model(input_ids=torch.tensor([seen])).logits[0, -1].double(), -1)
            assert told.id == tokens.ids[0] and len(told.alternatives) == 2
            assert told.log_probability == pytest.approx(float(sure[told.id]), abs=1e-4)
            assert told.alternatives[0].log_probability == pytest.approx(float(sure.max()), abs=1e-4)
            assert told.alternatives[0].text == f"<{told.alternatives[0].id}>"
            seen.append(told.id)
        assert not any(t.log_probabilities for t in made.said(quiet, "tokens"))


def test_adapters_that_leave_the_device_come_back_alike(model: Any) -> None:
    with torch.no_grad():
        adapters = {name: kit.with_adapter("Llama", seed) for seed, name in enumerate("abcd")}
        free = kit.engine(kit.tiny("Llama"), adapters)
        room = 2 * max(free.lora.bytes_of(name) for name in adapters)
        tight = kit.engine(model, adapters, device_bytes=room, rows=1)
        for name in "abcdabdc":
            calls = [made.ask(kit.prompt_of(1, 30), name, max_tokens=6) for made in (free, tight)]
            free.run()
            tight.run()
            assert free.ids(calls[0]) == tight.ids(calls[1])
            assert name in tight.lora.on_device and len(tight.lora.on_device) <= 3
        assert len(free.lora.on_device) == 4


def test_the_end_token_ends_unless_it_is_to_be_ignored(model: Any) -> None:
    with torch.no_grad():
        made = kit.engine(model)
        forced = kit.greedy(model, kit.prompt_of(3, 9), 6)[0]
        made.scheduler._end_ids = frozenset({forced[2]})
        ends = made.ask(kit.prompt_of(3, 9), max_tokens=6)
        goes = made.ask(kit.prompt_of(3, 9), max_tokens=6, ignore_end=True)
        made.run()
        assert made.ids(ends) == forced[: forced.index(forced[2]) + 1]
        assert made.said(ends, "ended")[0].reason == inference_pb2.FINISH_REASON_END
        assert made.ids(goes) == forced
        assert made.said(goes, "ended")[0].reason == inference_pb2.FINISH_REASON_LENGTH


def plainly(logits: torch.Tensor, o: inference_pb2.GenerationOptions, u: float) -> int:
    """A draw as it is told in the contract, over the whole vocabulary."""
    ordered, tokens = torch.sort(logits.double() / o.temperature, descending=True, stable=True)
    ordered, tokens = ordered[: o.top_k or len(ordered)], tokens[: o.top_k or len(ordered)]
    chances = torch.softmax(ordered, -1)
    keep = int((chances >= o.min_p * chances[0]).sum())
    before = torch.cumsum(chances, -1) - chances
    keep = max(1, min(keep, int((before < o.top_p).sum())))
    heaped = torch.cumsum(chances[:keep], -1)
    return int(tokens[min(int(torch.searchsorted(heaped, u * heaped[-1], right=True)), keep - 1)])


@given(
    st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0, 1, 7, 900, 5000]),
    st.sampled_from([0.05, 0.9, 0.9999, 1.0]), st.sampled_from([0.0, 1e-6, 0.3]), st.sampled_from([0.01, 1.0, 8.0]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_draws_are_those_of_the_whole_vocabulary(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    """However few are looked at: flat and steep logits, cuts within and beyond the likeliest."""
    if not top_k and top_p == 1.0 and min_p == 0.0:
        top_k = 3
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * spread
    options = inference_pb2.GenerationOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, repetition_penalty=1.0
    )
    chooser = sampling.Chooser(options)
    u = random.Random(seed).random()
    wanted = {plainly(logits, options, min(max(u + off, 0.0), 1 - 1e-12)) for off in (-1e-5, 0.0, 1e-5)}
    assert chooser.choose(logits) in wanted


def test_without_cuts_every_token_comes_as_often_as_it_should() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    chooser = sampling.Chooser(inference_pb2.GenerationOptions(temperature=1.0, top_p=1.0, seed=4))
    drawn = [chooser.choose(logits) for _ in range(4000)]
    for token, chance in enumerate(torch.softmax(logits, -1).tolist()):
        assert drawn.count(token) / 4000 == pytest.approx(chance, abs=0.03)


def test_places_that_rows_left_are_given_back_before_others_need_their_bytes() -> None:
    lanes = Lanes([(1, 16)], torch.float32, kit.CPU, 8 * 128 * 128)
    kept = []
    for tokens in (100, 200, 400):
        places = [place for _ in range(16) if (place := lanes.take(tokens)) is not None]
        assert places
        kept.append(places.pop(0))
        for place in places:
            lanes.give(place)
    assert lanes.bytes_used <= lanes.bytes_held <= lanes.limit


def test_a_beginning_is_kept_before_what_follows_it(model: Any) -> None:
    with torch.no_grad():
        block = 64 * 2 * 2 * 2 * 16 * 4
        made = kit.engine(model, prefix=3 * block)
        for _ in range(2):
            made.ask(kit.prompt_of(1, 64 * 5 + 3), max_tokens=1)  # five blocks, and room for three
            made.run()
        assert made.prefixes.hit_tokens == 3 * 64
        made.ask(kit.prompt_of(2, 70), max_tokens=1)
        made.run()
        made.ask(kit.prompt_of(1, 64 * 5 + 3), max_tokens=1)
        made.run()
        assert made.prefixes.hit_tokens == (3 + 2) * 64  # the last of its blocks made room


def test_who_stands_side_by_side_stays_while_rows_come_and_go(model: Any) -> None:
    with torch.no_grad():
        adapters = {name: kit.with_adapter("Llama", seed) for seed, name in enumerate("abcd")}
        made = kit.engine(kit.tiny("Llama"), adapters)
        for name in "abcd":
            made.ask(kit.prompt_of(1, 4), name, max_tokens=9 if name == "d" else 20)
        for _ in range(3):
            made.step()
        stacks = [site.stack for site in made.lora._sites]
        while len(made.scheduler._rows) == 4:
            made.step()
        made.step()
        assert stacks[0] is not None and [site.stack for site in made.lora._sites] == stacks
        made.run()


# Pure cores.


class Waiter:
    def __init__(self, share: tuple[str, str], priority: int, number: int) -> None:
        self.share, self.priority, self.number = share, priority, number


def of(adapter: str, priority: int, number: int, key: str = "") -> Waiter:
    return Waiter((key, adapter), priority, number)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2)), max_size=40), st.randoms())
@settings(max_examples=60, deadline=None)
def test_turns_lose_nobody_and_keep_order_within_a_share(asks: list[tuple[str, int]], draw: Any) -> None:
    turns: Turns[Waiter] = Turns()
    came: list[Waiter] = []
    left: list[Waiter] = []
    for number, (share, priority) in enumerate(asks):
        came.append(of(share, priority, number, key="xy"[number % 2]))
        turns.put(came[-1])
        if draw.random() < 0.4 and (who := turns.next()) is not None:
            assert who.priority == max(w.priority for w in turns)
            assert turns.take(who) and not turns.take(who)
            turns.charge(who.share, draw.randint(1, 50))
            left.append(who)
    while (who := turns.next()) is not None:
        turns.take(who)
        left.append(who)
    assert sorted(w.number for w in left) == list(range(len(asks))) and len(turns) == 0
    for share, key in itertools.product("abc", "xy"):
        for priority in range(-2, 3):
            mine = [w.number for w in left if (w.share, w.priority) == ((key, share), priority)]
            assert mine == sorted(mine)


def test_shares_take_turns_by_tokens_however_many_ask() -> None:
    turns: Turns[Waiter] = Turns()
    for number in range(90):
        turns.put(of("busy", 0, number))
    for number in range(10):
        turns.put(of("quiet", 0, number))
    served = {"busy": 0, "quiet": 0}
    for _ in range(20):
        who = turns.next()
        assert who is not None
        turns.take(who)
        turns.charge(who.share, 10)
        served[who.share[1]] += 10
    assert served == {"busy": 100, "quiet": 100}
    # One that was away has saved up nothing.
    turns.put(of("late", 0, 0))
    for number in range(1, 9):
        turns.put(of("late", 0, number))
    first = []
    for _ in range(6):
        who = turns.next()
        assert who is not None
        turns.take(who)
        turns.charge(who.share, 10)
        first.append(who.share[1])
    assert first.count("late") <= 3


def test_a_key_with_many_adapters_has_no_more_turns() -> None:
    turns: Turns[Waiter] = Turns()
    for number in range(40):
        turns.put(of(f"adapter {number % 8}", 0, number, key="many"))
        turns.put(of("one", 0, number, key="one"))
    served = collections.Counter[tuple[str, str]]()
    for _ in range(32):
        who = turns.next()
        assert who is not None
        turns.take(who)
        turns.charge(who.share, 10)
        served[who.share] += 1
    assert served["one", "one"] == 16
    assert sorted(count for share, count in served.items() if share[0] == "many") == [2] * 8


@given(st.lists(st.tuples(st.floats(1e-4, 2.0), st.integers(0, 4096), st.integers(0, 32)), max_size=50))
@settings(max_examples=60, deadline=None)
def test_pace_always_reads_something_and_never_without_end(steps: list[tuple[float, int, int]]) -> None:
    pace = Pace()
    for seconds, read, rows in steps:
        pace.note(seconds, read, rows)
        for beside in (0, rows):
            assert 32 <= pace.tokens(beside) <= 2048
        fixed, each = pace.costs()
        assert math.isfinite(fixed) and math.isfinite(each) and math.isfinite(pace.row_seconds)


def test_pace_follows_what_steps_take() -> None:
    pace = Pace()
    for _ in range(50):
        pace.note(0.1, 0, 16)
        pace.note(0.1 + 0.001 * 100, 100, 16)
    assert 50 <= pace.tokens(16) <= 75  # about half as long again as a step without reading
    assert pace.tokens(0) == 32 and pace.tokens(0, 1) == 250  # nobody is held up: a short prompt at once
    assert pace.tokens(2, 4) >= 4 * pace.tokens(16, 1)  # most wait: they count for more
    assert pace.tokens(1, 1000) <= 400  # but nobody stalls for long


def test_pace_tells_what_reading_costs_from_what_each_token_costs() -> None:
    """Else small pieces look dear, become smaller, and look dearer."""
    pace = Pace()
    for n in range(40):
        pace.note(0.1, 0, 16)
        read = (40, 200)[n % 2]
        pace.note(0.1 + 0.02 + 0.0005 * read, read, 16)
    fixed, each = pace.costs()
    assert abs(fixed - 0.02) < 0.004 and abs(each - 0.0005) < 0.0001
    assert 70 <= pace.tokens(16) <= 90


@given(st.lists(st.one_of(st.integers(1, 700), st.floats(0, 1)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_places_keep_what_is_theirs(moves: list[int | float]) -> None:
    """A number takes a place of so many tokens; a part of one gives one of those back."""
    lanes = Lanes([(1, 4), (2, 2)], torch.float32, kit.CPU, 40_000)
    held: list[tuple[Any, float]] = []
    for number, move in enumerate(moves, start=1):
        if isinstance(move, int):
            place = lanes.take(move)
            if place is None:
                assert lanes.bytes_used + lanes.bytes_for(move) > 40_000
                continue
            place.length = move
            for tensors in (place.lane.keys, place.lane.values):
                for tensor in tensors:
                    tensor[place.slot, :, :move] = number
            held.append((place, number))
        elif held:
            place, _ = held.pop(int(move * (len(held) - 1)))
            lanes.give(place)
        assert lanes.bytes_used == sum(lanes.bytes_for(p.length) for p, _ in held) <= lanes.bytes_held <= 2 * 40_000
        for place, mark in held:
            for tensors in (place.lane.keys, place.lane.values):
                assert all(bool((t[place.slot, :, : place.length] == mark).all()) for t in tensors)
