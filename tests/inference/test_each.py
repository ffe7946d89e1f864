"""The part that was compiled at set-up: each token gets what its own adapter makes, and nobody else is touched."""

from __future__ import annotations

import logging
import os
import pathlib
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.worker import each, lora, prebuild, reordered, stacks, straight
from services.inference.worker.forward import Whole
from tests.inference import rows_kit as kit

pytestmark = pytest.mark.filterwarnings("ignore")

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def add() -> each.Add:
    """The part that set-up compiled; compiled now where the source is newer."""
    if shutil.which("g++") is None and not each.library().exists():
        pytest.skip("no g++ here")
    prebuild.main()
    found = each.found(kit.CPU, BF16)
    assert found is not None
    return found


KINDS = ["DEFAULT", "AVX2", "AVX512"]


@pytest.fixture(scope="module", params=KINDS)
def form(request: pytest.FixtureRequest, add: each.Add, tmp_path_factory: pytest.TempPathFactory) -> each.Add:
    """The part as it is compiled for each kind of processor that this one can stand for."""
    here = torch.backends.cpu.get_cpu_capability()
    if request.param != here and (here not in KINDS or KINDS.index(request.param) > KINDS.index(here)):
        pytest.skip(f"this processor is of kind {here}")
    path = tmp_path_factory.mktemp("forms") / f"{request.param}.so"
    prebuild.build(path, request.param)
    return each.opened(path)


def part(draw: random.Random, rank: int, width: int, out: int) -> stacks.Part:
    torch.manual_seed(draw.randrange(10**6))
    return stacks.Part(torch.randn(rank, width).to(BF16), (torch.randn(rank, out) / rank).to(BF16).t())


def guarded(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with numbers around it that nobody may touch, and the whole."""
    whole = torch.randn(tokens + 2, width + 40).to(BF16)
    return whole[1:-1, 8 : 8 + width], whole


def expected(
    line: list[dict[str, stacks.Part]], names: list[str], outs: list[int], places: list[int], x: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """In fp32, token by token."""
    made = before.float()
    for token, place in enumerate(places):
        begin = 0
        for name, out in zip(names, outs, strict=True):
            if place >= 0 and (own := line[place].get(name)) is not None:
                made[token, begin : begin + out] += x[token].float() @ own.a.float().t() @ own.b.float().t()
            begin += out
    return made


def near(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    """As near as rounding to bf16 once allows, with a little for sums in another order."""
    return bool(((made.float() - wanted).abs() <= wanted.abs() / 200 + 1e-2).all())


widths = st.sampled_from([1, 7, 16, 48, 96, 131])


@given(st.lists(widths, min_size=1, max_size=3), widths, st.integers(1, 21), st.randoms(), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_each_token_gets_its_own_and_nothing_else_is_touched(
    form: each.Add, outs: list[int], width: int, tokens: int, draw: random.Random, threads: int
) -> None:
    """Any widths, ranks, numbers of tokens; adapters that leave a module alone; tokens of the base."""
    names = [f"m{n}" for n in range(len(outs))]
    ranks = [draw.choice([1, 3, 8, 16, 30]) for _ in range(4)]
    line = [
        {name: part(draw, rank, width, out) for name, out in zip(names, outs, strict=True) if draw.random() < 0.8}
        for rank in ranks
    ]
    places = [draw.randrange(-1, 4) for _ in range(tokens)]
    x, _ = guarded(tokens, width)
    out, whole = guarded(tokens, sum(outs))
    before, all_before = out.clone(), whole.clone()
    table = each.table(form, line, names, outs)
    assert table is not None
    torch.set_num_threads(threads)
    table.add(each.Turn(places), x, out)
    assert near(out, expected(line, names, outs, places, x, before))
    base = torch.tensor([place < 0 for place in places])
    assert torch.equal(out[base], before[base])
    out.copy_(before)
    assert torch.equal(whole, all_before), "only what is added to was written"


def test_a_token_is_the_same_to_the_bit_whoever_else_is_there(form: each.Add) -> None:
    draw = random.Random(1)
    line = [{"m": part(draw, 16, 96, 80)} for _ in range(3)]
    table = each.table(form, line, ["m"], [80])
    assert table is not None
    x, before = torch.randn(21, 96).to(BF16), torch.randn(21, 80).to(BF16)
    alone = before[:1].clone()
    table.add(each.Turn([1]), x[:1], alone)
    for tokens in (2, 3, 5, 9, 21):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = before[:tokens].clone()
            table.add(each.Turn([1, *(draw.randrange(-1, 3) for _ in range(tokens - 1))]), x[:tokens], out)
            assert torch.equal(out[0], alone[0])


@pytest.mark.parametrize("out", [16, 50, 128])
def test_gates_are_those_of_the_plain_formula(form: each.Add, out: int) -> None:
    """Of tokens with adapters and of the base's, from very small numbers to very large ones."""
    draw = random.Random(2)
    line = [{"gate": part(draw, 8, 32, out), "up": part(draw, 8, 32, out)} for _ in range(2)]
    table = each.table(form, line, ["gate", "up"], [out, out])
    assert table is not None
    places = [-1, 0, 1, 1, -1, 0]
    x, before = torch.randn(6, 32).to(BF16), (torch.randn(6, 2 * out) * 3).to(BF16)
    before[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -30.0, 88.0, -88.0, 3e4, -3e4]).to(BF16)
    opening, passing = before[:, :out].clone(), before[:, out:].clone()
    both = expected(line, ["gate", "up"], [out, out], places, x, before).to(BF16).float()
    made = table.gate(each.Turn(places), x, opening, passing)
    assert near(made, torch.nn.functional.silu(both[:, :out]) * both[:, out:])


def test_what_is_no_number_stays_none(form: each.Add) -> None:
    draw = random.Random(3)
    table = each.table(form, [{"m": part(draw, 4, 16, 32)}], ["m"], [32])
    assert table is not None
    out = torch.zeros(2, 32).to(BF16)
    out[0, 3], out[0, 4] = float("nan"), float("inf")
    table.add(each.Turn([0, 0]), torch.ones(2, 16).to(BF16), out)
    assert out[0, 3].isnan() and out[0, 4].isinf() and out[1].isfinite().all()


def test_sums_are_rounded_to_the_nearest_and_ties_to_even(form: each.Add) -> None:
    step = 2.0**-7  # of bf16 beyond one
    a, b = torch.full((1, 16), step / 32).to(BF16), torch.ones(1, 32).to(BF16).t()
    table = each.table(form, [{"m": stacks.Part(a, b)}], ["m"], [32])
    assert table is not None
    out = torch.tensor([1.0, 1.0 + step] * 16).to(BF16)[None].clone()
    table.add(each.Turn([0]), torch.ones(1, 16).to(BF16), out)  # adds half a step
    assert out[0].tolist() == [1.0, 1.0 + 2 * step] * 16


def test_what_it_does_not_serve_is_left_to_the_stacks(add: each.Add) -> None:
    plain, gain = part(random.Random(4), 4, 16, 32), torch.zeros(32)
    assert each.table(add, [{"m": stacks.Part(plain.a, plain.b, gain)}], ["m"], [32]) is None, "DoRA"
    assert each.table(add, [{"m": part(random.Random(4), 257, 16, 32)}], ["m"], [32]) is None, "ranks"
    assert each.found(kit.CPU, torch.float32) is None and each.found(torch.device("meta"), BF16) is None
    assert each.pays(64, 16, 16) and each.pays(500, 16, 64) and not each.pays(65, 16, 63)
    x = torch.zeros(1, 16)
    with pytest.raises(TypeError, match="float32"):
        each.Table(add, [{"m": plain}], ["m"], [32]).add(each.Turn([0]), x, x)


@pytest.mark.parametrize("there", ["nothing", "no library"])
def test_where_it_is_missing_the_log_says_so_and_all_goes_on(
    there: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(os.environ, "QLORAD_TORCH_EXTENSIONS", str(tmp_path))
    assert each.library().parent == tmp_path
    if there == "no library":
        each.library().write_bytes(b"of another kind of processor")
    with caplog.at_level(logging.WARNING):
        made = served()
        call = made.ask(kit.prompt_of(1, 4), "a", max_tokens=3)
        made.run()
    assert len([record for record in caplog.records if "compiled at set-up" in record.message]) == 1
    assert made.ids(call) and all(site.table is None and site.stack is not None for site in made.lora._sites)


def test_a_build_that_fails_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "QLORAD_TORCH_EXTENSIONS", str(tmp_path / "lib"))
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        prebuild.main()
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "g++").chmod(0o755)
    with pytest.raises(SystemExit):
        prebuild.main()
    assert not list(tmp_path.glob("lib/*"))


# in an engine


def served(way: str = "straight") -> kit.Engine:
    """Three adapters of two ranks on a base in bf16."""
    model = kit.tiny("Llama").bfloat16()
    reordered.reorder(model)
    return kit.engine(model, {name: kit.with_adapter("Llama", seed) for seed, name in enumerate("abc")}, way)


@pytest.mark.parametrize("way", ["straight", "whole"])
def test_an_engine_says_with_it_what_it_says_without(add: each.Add, way: str) -> None:
    """Scores of the same texts, of several adapters and the base in one batch; those of another are far off."""
    said = {}
    for compiled in (True, False):
        made = served(way)
        assert isinstance(made.forward, straight.Straight if way == "straight" else Whole)
        if not compiled:
            made.lora._each = None
        calls = [made.score(kit.prompt_of(1, 12), name) for name in ("a", "", "b", "c", "a")]
        made.run()
        said[compiled] = [scores(made, call) for call in calls]
        assert any(site.table is not None for site in made.lora._sites) is compiled
        assert any(site.stack is not None for site in made.lora._sites) is not compiled
    for with_it, without in zip(said[True], said[False], strict=True):
        assert float((with_it - without).abs().mean()) < 0.1
    base = said[True][1] - said[False][1]
    # Written out, the gates of all rows are rounded once where stacks have it twice.
    assert bool((base == 0).all()) if way == "whole" else float(base.abs().mean()) < 0.02
    assert float((said[True][0] - said[True][2]).abs().mean()) > 0.5


def scores(made: kit.Engine, call: int) -> torch.Tensor:
    told = [p.log_probability for s in made.said(call, "scored") for p in s.tokens]
    return torch.tensor(told)


def test_who_leaves_is_let_go_and_who_comes_is_read_anew(add: each.Add) -> None:
    made = served()
    first = made.ask(kit.prompt_of(1, 9), "a", max_tokens=8)
    other = made.ask(kit.prompt_of(1, 9), "b", max_tokens=8)
    made.run()
    assert made.lora._sites[0].table is not None
    made.lora.remove("a")
    assert all(site.table is None for site in made.lora._sites)
    replaced = kit.with_adapter("Llama", 7)
    made.lora.add("a", kit.tensors_of(replaced), replaced.peft_config["default"].lora_alpha / 8, {})
    again = [made.ask(kit.prompt_of(1, 9), name, max_tokens=8) for name in "ab"]
    made.run()
    assert made.ids(again[1]) == made.ids(other) and made.ids(again[0]) != made.ids(first)


def test_long_prompts_alone_beside_rows_that_go_by_it(add: each.Add, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    for compiled in (True, False):
        monkeypatch.setattr(lora, "_SHARED", 20)
        made = served()
        if not compiled:
            made.lora._each = None
        made.ask(kit.prompt_of(1, 9), "a", max_tokens=30)
        for _ in range(3):
            made.step()
        call = made.score(kit.prompt_of(2, 70), "b")
        made.run()
        assert any(site.singles for site in made.lora._sites)
        said.append(scores(made, call))
    assert float((said[0] - said[1]).abs().mean()) < 0.2
