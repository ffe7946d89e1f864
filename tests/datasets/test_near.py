"""Near duplicates: the true similarity of words decides, in any order of rows, in any script."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.datasets.worker import near
from services.datasets.worker.bags import Words, normal
from services.datasets.worker.plain import Plain
from tests.datasets.spooled import answered, spooled, text

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=7)) for i in range(2000)]
TAMIL = "தமிழ் மொழி உலகின் பழமையான மொழிகளில் ஒன்று அது இன்றும் பேசப்படுகிறது மக்கள் அதை நேசிக்கிறார்கள்"
CHINESE = "今天天气很好我们一起去公园散步然后在湖边的小店里喝茶聊天直到太阳下山才慢慢走回家"
JAPANESE = "きょうはとてもよいてんきなのでみんなでこうえんへさんぽにいきましたそしておちゃをのみました"
THAI = "วันนี้อากาศดีมากเราจึงไปเดินเล่นที่สวนสาธารณะด้วยกันแล้วนั่งดื่มชาที่ร้านเล็กๆริมทะเลสาบ"


def grouped(examples: list[Plain], similarity: float = 0.8, keep: list[bool] | None = None) -> list[int]:
    """For each row the place of the first one of its group."""
    with spooled(examples) as (spool, folder):
        kept = np.array(keep if keep is not None else [True] * len(examples))
        found = near.groups(spool, kept, similarity, folder, lambda *_: None)
    return [int(at) for at in found]


def partition(examples: list[Plain], groups: list[int]) -> set[frozenset[str]]:
    """Groups as sets of what their rows say, whatever their places."""
    sets: dict[int, set[str]] = {}
    for example, first in zip(examples, groups, strict=True):
        sets.setdefault(first, set()).add(str(example))
    return {frozenset(s) for s in sets.values()}


def bag(said: str) -> Counter[str]:
    return Counter(said.split())


def similarity(one: str, other: str) -> float:
    """Jaccard of two bags of words, told once more."""
    a, b = bag(one), bag(other)
    return sum((a & b).values()) / sum((a | b).values())


def changed(said: str, count: int, draw: random.Random) -> str:
    """The text with so many of its words replaced by new ones."""
    words = said.split()
    for at in draw.sample(range(len(words)), count):
        words[at] = f"new{draw.randrange(10**9)}"
    return " ".join(words)


short_texts = st.lists(st.lists(st.sampled_from("abcdefg"), min_size=0, max_size=8), min_size=1, max_size=14)


@given(short_texts, st.sampled_from([0.5, 0.7, 0.9, 1.0]), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_groups_do_not_depend_on_order_and_are_joined_by_the_true_similarity(
    rows: list[list[str]], least: float, order: random.Random
) -> None:
    said = [" ".join(row) for row in rows]
    examples = [text(t) for t in said]
    groups = grouped(examples, least)
    shuffled = list(examples)
    order.shuffle(shuffled)
    assert partition(shuffled, grouped(shuffled, least)) == partition(examples, groups)
    for at, first in enumerate(groups):
        assert first <= at and groups[first] == first
        others = [i for i, g in enumerate(groups) if g == first and i != at]
        # Every row of a group is near to another one of it, and is nothing else.
        assert not others or any(said[i] == said[at] or similarity(said[i], said[at]) >= least - 1e-9 for i in others)


def test_the_asked_similarity_decides() -> None:
    draw = random.Random(1)
    base = " ".join(draw.sample(WORDS, 60))
    for count in (1, 3, 6, 7, 9, 20):
        other = changed(base, count, draw)
        true = similarity(base, other)
        for least in (0.6, 0.75, 0.8, 0.9):
            together = grouped([text(base), text(other)], least) == [0, 0]
            assert together == (true >= least), (count, true, least)


def test_planted_pairs_at_the_asked_similarity_and_above_are_found() -> None:
    draw = random.Random(2)
    examples: list[Plain] = []
    pairs: list[tuple[int, int]] = []
    for _ in range(400):
        words = draw.sample(WORDS, 54)
        examples.append(text(" ".join(words)))
        other = changed(" ".join(words), draw.choice((1, 3, 6)), draw)  # 6 of 54 are 0.8 exactly
        pairs.append((len(examples) - 1, len(examples)))
        examples.append(text(other))
    groups = grouped(examples)
    assert sum(groups[b] == groups[a] for a, b in pairs) >= 398  # recall at the border is 0.999
    assert len(set(groups)) >= 400


def test_what_is_near_to_one_of_a_group_is_of_the_group() -> None:
    """Chains whose ends are unlike: their middle joins them, wherever it stands."""
    draw = random.Random(3)
    examples: list[Plain] = []
    for _ in range(250):
        middle = draw.sample(WORDS, 60)
        first, last = list(middle), list(middle)
        for k in range(5):
            first[k], last[59 - k] = f"x{draw.randrange(10**9)}", f"y{draw.randrange(10**9)}"
        examples += [text(" ".join(w)) for w in (first, middle, last)]
    assert similarity(*[e["completion"]["completion"] for e in (examples[0], examples[2])]) < 0.8
    order = list(range(len(examples)))
    draw.shuffle(order)
    groups = grouped([examples[i] for i in order])
    sizes = Counter(groups).values()
    assert len(sizes) <= 251 and set(sizes) <= {1, 2, 3}


@pytest.mark.parametrize("said", [TAMIL * 2, CHINESE, JAPANESE, THAI], ids=["ta", "zh", "ja", "th"])
def test_every_script_has_words(said: str) -> None:
    half = said[: len(said) // 2]
    rows = [said, said.replace("\n", "") + " 。!", half, said[: len(said) - 2]]
    groups = grouped([text(t) for t in rows], 0.85)
    assert groups == [0, 0, 2, 0]


def test_unlike_texts_of_scripts_without_blanks_are_apart() -> None:
    assert grouped([text(t) for t in (CHINESE, CHINESE[::-1][:20] + "另外一句完全不同的话语", JAPANESE, THAI)]) == [
        0,
        1,
        2,
        3,
    ]


def test_case_form_and_signs_do_not_count_but_order_of_turns_is_no_matter_of_words() -> None:
    rows = [
        answered("What is a café?", "A place to drink coffee, and to read."),
        answered("WHAT IS A CAFE\u0301", "a place to drink coffee — and to read!"),
        text("a b c d e f"),
        text("a b c d e f " * 3),
        text("ａ b c d e ｆ."),
    ]
    assert grouped(rows, 0.95) == [0, 0, 2, 3, 2]


def test_rows_without_words_are_alone() -> None:
    rows = [text("!!!"), text("???"), {"chat": {"messages": [{"role": "ROLE_ASSISTANT"}]}}, text("!!!"), text("word")]
    # Equal rows are one group all the same.
    assert grouped(rows) == [0, 1, 2, 0, 4]


def test_rows_that_are_not_kept_have_no_group() -> None:
    rows = [text("a b c d")] * 3
    assert grouped(rows, keep=[False, True, True]) == [0, 1, 1]
    assert grouped(rows, keep=[False] * 3) == [0, 1, 2]
    assert grouped([]) == []


def test_a_bucket_of_many_unlike_rows_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of rows that agree on bands and are unlike all the same: most of each is the same preamble."""
    draw = random.Random(4)
    preamble = " ".join(WORDS[:45])
    examples = [text(f"{preamble} {' '.join(draw.sample(WORDS[45:], 15))}") for _ in range(800)]
    compared = 0
    asked = near.Bags.are_similar

    def counted(bags: near.Bags, ones: near.Array, others: near.Array, least: float) -> near.Array:
        nonlocal compared
        compared += len(ones)
        return asked(bags, ones, others, least)

    monkeypatch.setattr(near.Bags, "are_similar", counted)
    groups = grouped(examples, 0.7)
    assert len(set(groups)) == 800
    # A quarter of all rows agree on a band; all pairs of them would be 22 a row and band.
    assert 0 < compared <= near.bands_for(0.7).bands * 800 * 8


@pytest.mark.parametrize("least", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_meet_the_recall(least: float) -> None:
    cut = near.bands_for(least)
    assert cut.recall(least) >= near.RECALL and cut.bands * cut.rows <= near.PERMUTATIONS
    assert cut.recall(min(1.0, least + 0.05)) >= cut.recall(least)


@pytest.fixture(scope="module")
def maker() -> Words:
    return Words()


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
@settings(max_examples=40)
def test_a_bag_is_the_same_wherever_it_stands(maker: Words, rows: list[str]) -> None:
    normals = [normal(r) for r in rows]
    members, counts = maker.bags(normals)
    begins = np.concatenate(([0], np.cumsum(counts)))
    for i, one in enumerate(normals):
        alone, count = maker.bags([one])
        assert count.tolist() == [counts[i]]
        assert sorted(alone.tolist()) == sorted(members[begins[i] : begins[i + 1]].tolist())
