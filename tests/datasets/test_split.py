"""The split: by content and seed, never by place, nobody on two sides."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.datasets.worker import grouping, split
from services.datasets.worker.found import INFO, WARNING, Problem
from services.datasets.worker.plain import weigh
from tests.datasets.kit import Door, jsonl
from tests.datasets.spooled import spooled, text

TOGETHER, DROP = datasets_pb2.NEAR_DUPLICATES_TOGETHER, datasets_pb2.NEAR_DUPLICATES_DROP
hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60, unique=True)
fractions = st.floats(0, 0.45)
seeds = st.integers(0, 2**64 - 1)


def asked(validation: float, test: float = 0.0, seed: int = 0, **fields: Any) -> datasets_pb2.Split:
    return datasets_pb2.Split(validation_fraction=validation, test_fraction=test, seed=seed, **fields)


def drawn(contents: list[int], wanted: datasets_pb2.Split, strata: list[int] | None = None) -> dict[int, int] | Problem:
    """The side of each content."""
    kinds = np.array(strata or [0] * len(contents), np.uint32)
    made = split.sides(np.array(contents, np.uint64), kinds, wanted)
    return made if isinstance(made, Problem) else dict(zip(contents, made.tolist(), strict=True))


def numbers(count: int, seed: int) -> list[int]:
    """Different contents."""
    draw = random.Random(seed)
    return list({draw.getrandbits(64): None for _ in range(count)})


# The draw


@given(hashes, fractions, fractions, seeds, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_shares_are_exact_and_order_does_not_matter(
    contents: list[int], validation: float, test: float, seed: int, order: random.Random
) -> None:
    wanted = asked(validation, test, seed)
    made = drawn(contents, wanted)
    counts = [split.share(len(contents), validation), split.share(len(contents), test)]
    if isinstance(made, Problem):
        assert made.rule == "split_leaves_nothing" and sum(counts) >= len(contents)
        return
    met = Counter(made.values())
    assert [met[1], met[2]] == counts and met[0] == len(contents) - sum(counts) > 0
    shuffled = list(contents)
    order.shuffle(shuffled)
    assert drawn(shuffled, wanted) == made


@given(hashes.filter(lambda h: len(h) > 3), seeds)
@settings(max_examples=60)
def test_a_row_more_moves_at_most_one_at_each_border(contents: list[int], seed: int) -> None:
    wanted = asked(0.2, 0.2, seed)
    before, after = drawn(contents[1:], wanted), drawn(contents, wanted)
    assert isinstance(before, dict) and isinstance(after, dict)
    assert sum(before[c] != after[c] for c in contents[1:]) <= 3  # two at the second border: it moves by up to two


@given(st.lists(st.integers(20, 80), min_size=1, max_size=4), seeds)
@settings(max_examples=40)
def test_every_stratum_has_its_share(sizes: list[int], seed: int) -> None:
    contents = numbers(sum(sizes), seed)
    strata = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    made = drawn(contents, asked(0.1, 0.2, seed), strata)
    assert isinstance(made, dict)
    for kind, size in enumerate(sizes):
        met = Counter(made[c] for c, k in zip(contents, strata, strict=True) if k == kind)
        assert (met[1], met[2]) == (split.share(size, 0.1), split.share(size, 0.2))


def test_a_stratum_too_small_for_a_share_is_trained_before_it_is_set_aside() -> None:
    made = drawn(list(range(13)), asked(0.1, 0.1), [0] * 10 + [1, 1, 2])
    assert isinstance(made, dict)
    assert Counter(made[c] for c in (10, 11)) == {0: 1, 1: 1} and made[12] == 0


def test_another_seed_is_another_draw() -> None:
    contents = numbers(100, 5)
    draws = [drawn(contents, asked(0.3, seed=seed)) for seed in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])
    ranks = split.ranks(np.array(contents, np.uint64), 7)
    assert len(set(ranks.tolist())) == 100 and ranks.tolist() != contents


@pytest.mark.parametrize(("validation", "test", "rows"), [(0.1, 0, 1), (0.1, 0.1, 2), (0.99, 0, 3)])
def test_a_split_that_leaves_nothing_to_train_is_refused(validation: float, test: float, rows: int) -> None:
    made = drawn(list(range(rows)), asked(validation, test))
    assert isinstance(made, Problem) and made.rule == "split_leaves_nothing" and f"of {rows} " in made.message


def test_no_split_asked_for_is_all_train() -> None:
    assert drawn([1, 2, 3], asked(0)) == {1: 0, 2: 0, 3: 0}


@pytest.mark.parametrize(("groups", "fraction", "count"), [(150, 0.1, 15), (3, 0.01, 1), (10, 0, 0), (7, 0.5, 4)])
def test_a_share_is_rounded_and_never_nothing(groups: int, fraction: float, count: int) -> None:
    assert split.share(groups, fraction) == count


def test_sides_that_were_asked_for_are_counted_even_if_empty() -> None:
    side = np.array([0, 0, 1], np.uint8)
    assert split.counts(side, {"train": True, "test": True}) == {"train": 2, "validation": 1, "test": 0}


@pytest.mark.parametrize(
    ("name", "side", "severity"),
    [
        ("train", 0, None), ("Validation", 1, None), ("dev", 1, None), ("val", 1, None), ("valid", 1, None),
        ("testing", 2, None), ("test_sft", 2, INFO), ("train_sft", 0, INFO), ("validation-matched", 1, INFO),
        ("unsupervised", 0, WARNING), ("traintest", 0, WARNING), ("train_test", 0, WARNING), ("", 0, WARNING),
    ],
)  # fmt: skip
def test_a_source_names_its_splits_as_it_likes(name: str, side: int, severity: int | None) -> None:
    found, problem = split.named(name)
    assert (found, problem and problem.severity) == (side, severity)


# Groups


def groups_of(count: int, size: int, order: random.Random) -> tuple[list[str], list[int]]:
    """Texts in random order, and for each the place of the first one of its group."""
    names = [f"{g} {i}" for g in range(count) for i in range(size)]
    order.shuffle(names)
    first: dict[str, int] = {}
    return names, [first.setdefault(name.split()[0], at) for at, name in enumerate(names)]


def test_a_group_goes_to_one_side_and_shares_are_of_groups() -> None:
    told: list[dict[str, int]] = []
    for seed in (1, 2):
        names, groups = groups_of(40, 3, random.Random(seed))
        with spooled([text(n) for n in names]) as (spool, _):
            sides = grouping.sides(spool, np.array(groups), asked(0.25, 0.1))
        assert not isinstance(sides, Problem)
        by_group: defaultdict[str, set[int]] = defaultdict(set)
        for name, side in zip(names, sides.tolist(), strict=True):
            by_group[name.split()[0]].add(side)
        assert all(len(s) == 1 for s in by_group.values())
        assert Counter(min(s) for s in by_group.values()) == {0: 26, 1: 10, 2: 4}
        told.append(dict(zip(names, sides.tolist(), strict=True)))
    assert told[0] == told[1]


def test_a_row_that_was_left_out_counts_as_no_group_of_its_own() -> None:
    # Twins of grouped rows, which are left out and so have their own place as their group.
    names = [f"{g} {i}" for g in range(10) for i in range(2)]
    groups = [at - at % 2 for at in range(20)] + list(range(20, 40))
    with spooled([text(n) for n in names * 2]) as (spool, _):
        sides = grouping.sides(spool, np.array(groups), asked(0.2))
    assert not isinstance(sides, Problem)
    assert sides[:20:2].tolist() == sides[1:20:2].tolist()
    assert Counter(sides[:20].tolist()) == {0: 16, 1: 4} and sides[20:].tolist() == sides[:20].tolist()


def test_equal_rows_of_several_kinds_are_drawn_alike_in_any_order() -> None:
    examples = [text(f"row {i}") for i in range(30)] * 2
    plain, mixed = [3] * 30, [3 + i % 2 for i in range(30)]
    sides = []
    for kinds in (plain + mixed, mixed + plain):
        with spooled(examples, strata=kinds) as (spool, _):
            made = grouping.sides(spool, None, asked(0.2, 0.1))
        assert not isinstance(made, Problem)
        sides.append(made.tolist())
    assert sides[0] == sides[1] and Counter(sides[0][:30]) == {0: 21, 1: 6, 2: 3}


def test_content_is_what_is_said_not_how_it_lies() -> None:
    def chat(*parts: str, **more: Any) -> Any:
        return {"chat": {"messages": [{"role": "ROLE_USER", "parts": [{"text": p} for p in parts]}]}, **more}

    assert weigh(chat("a", "b"))[0] == weigh(chat("ab", origin={"line": "2"}, metadata={"note": "x"}))[0]
    assert weigh(chat("a"))[0] != weigh(chat("b"))[0]
    assert weigh(text("ab"))[0] != weigh(chat("ab"))[0]


# Through the door


def corpus() -> tuple[list[dict[str, str]], list[set[str]]]:
    """Rows in random order, and the ids of those that are equal or nearly equal."""
    draw = random.Random(11)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]
    rows, families = [], []
    for family in range(160):
        asked, said = draw.choices(words, k=12), draw.choices(words, k=48)
        members = [(asked, said)]
        if family % 2:
            for _ in range(draw.randint(1, 3)):
                changed = list(said)
                for at in draw.sample(range(48), draw.randint(0, 4)):  # none: an exact twin; 4 of 60 are 0.87
                    changed[at] = draw.choice(words)
                members.append((asked, changed))
        named = [
            {"instruction": " ".join(a), "output": " ".join(s), "id": f"{family}.{i}"}
            for i, (a, s) in enumerate(members)
        ]
        rows += named
        families.append({row["id"] for row in named})
    draw.shuffle(rows)
    return rows, families


def sides_of(door: Door, name: str) -> dict[str, str]:
    """The side of each row by what it says."""
    return {
        f"{row['instruction']}|{row['output']}": side
        for side in ("train", "validation", "test")
        for row in door.export(f"datasets/{name}", datasets_pb2.ROW_FORMAT_INSTRUCTION, side)
    }


@pytest.fixture(scope="module")
def apart(door: Door) -> datasets_pb2.Dataset:
    """The corpus, split."""
    return door.make("apart", jsonl(corpus()[0]), split=asked(0.2, 0.1, seed=3))


def test_no_duplicate_straddles_and_the_same_rows_are_set_aside_every_time(
    door: Door, apart: datasets_pb2.Dataset
) -> None:
    rows, families = corpus()
    said = {row["id"]: f"{row['instruction']}|{row['output']}" for row in rows}
    sides = sides_of(door, "apart")
    assert set(sides) == set(said.values()) and sum(apart.stats.rows.values()) == len(sides)
    met: Counter[str] = Counter()
    for family in families:
        there = {sides[said[name]] for name in family}
        assert len(there) == 1, family
        met.update(there)
    assert met == {"train": 112, "validation": 32, "test": 16}
    straddles = [f for f in door.findings("datasets/apart") if f.rule == "straddles"]
    assert not straddles
    shuffled = list(rows)
    random.Random(12).shuffle(shuffled)
    door.make("apart-shuffled", jsonl(shuffled), split=asked(0.2, 0.1, seed=3))
    assert sides_of(door, "apart-shuffled") == sides


def test_near_duplicates_are_left_out_where_that_is_asked_for(door: Door) -> None:
    rows, families = corpus()
    made = door.make("apart-drop", jsonl(rows), near_duplicates=DROP)
    assert sum(made.stats.rows.values()) == len(families)
    unlike = len({f"{row['instruction']}|{row['output']}" for row in rows}) - len(families)
    assert made.stats.near_dropped_rows == made.stats.findings["near_duplicate"] == unlike > 100


def test_what_leaks_between_the_splits_of_a_source_is_told(door: Door, apart: datasets_pb2.Dataset) -> None:
    held_out = next(
        row
        for row in door.export("datasets/apart", datasets_pb2.ROW_FORMAT_INSTRUCTION, "test")
        if int(row["id"].partition(".")[0]) % 2 == 0  # without a near one of its own
    )
    kept = datasets_pb2.Split(keep_source=True)
    changed = {"instruction": held_out["instruction"], "output": f"{held_out['output']} indeed"}
    more = door.make("leak-more", jsonl([changed]), split=kept)
    # An upload names no split: its rows are trained, and that is told.
    assert more.stats.rows == {"train": 1}
    (unknown,) = [f for f in door.findings("datasets/leak-more") if f.rule == "unknown_split"]
    assert unknown.severity == WARNING and "go to train" in unknown.message
    parents = ["datasets/apart", "datasets/leak-more"]
    door.make("leaks", parents=parents, split=kept, near_duplicates=TOGETHER)
    found = door.findings("datasets/leaks")
    (leak,) = [f for f in found if f.rule == "straddles"]
    (near,) = [f for f in found if f.rule == "near_duplicate" and f.file == "datasets/leak-more (train)"]
    assert leak.file == "datasets/apart (test)" and near.row == 1
    assert not [f for f in found if f.rule == "unknown_split"]


def test_rows_that_straddle_are_those_of_the_later_sides() -> None:
    examples = [text(t) for t in ("a", "a", "b", "b", "c", "c")]
    sides = np.array([0, 2, 1, 2, 2, 2], np.uint8)
    with spooled(examples) as (spool, _):
        every = np.ones(6, bool)
        assert grouping.straddling(spool, every, None, sides).tolist() == [1, 3]
        groups = np.array([0, 0, 0, 0, 4, 4])
        assert grouping.straddling(spool, every, groups, sides).tolist() == [1, 2, 3]
        assert grouping.straddling(spool, np.array([False, *[True] * 5]), groups, sides).tolist() == [1, 3]
