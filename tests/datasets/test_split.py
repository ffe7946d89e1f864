"""The split: by content and seed, never by place, nobody on two sides."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2
from services.datasets.worker.found import Problem
from services.datasets.worker.split import Cut, content_hash, cut, rank, share

hashes = st.sets(st.binary(min_size=16, max_size=16), min_size=3, max_size=60)
fractions = st.floats(0, 0.45)


def asked(validation: float, test: float = 0.0, seed: int = 0) -> datasets_pb2.Split:
    return datasets_pb2.Split(validation_fraction=validation, test_fraction=test, seed=seed)


@given(hashes, fractions, fractions, st.integers(0, 2**64 - 1), st.randoms())
def test_sides_have_their_share_and_order_does_not_matter(
    groups: set[bytes], validation: float, test: float, seed: int, shuffled: random.Random
) -> None:
    made = cut(groups, asked(validation, test, seed))
    wanted = share(len(groups), validation), share(len(groups), test)
    if isinstance(made, Problem):
        assert sum(wanted) >= len(groups)
        return
    sides = Counter(made.side(g) for g in groups)
    assert (sides["validation"], sides["test"]) == wanted
    assert sides["train"] == len(groups) - sum(wanted) > 0
    other = list(groups)
    shuffled.shuffle(other)
    assert cut(other, asked(validation, test, seed)) == made


@given(hashes, st.integers(0, 2**64 - 1))
def test_a_row_more_moves_at_most_the_rows_at_the_edge(groups: set[bytes], seed: int) -> None:
    one = min(groups)
    before, after = cut(groups - {one}, asked(0.2, 0, seed)), cut(groups, asked(0.2, 0, seed))
    assert isinstance(before, Cut) and isinstance(after, Cut)
    moved = [g for g in groups - {one} if before.side(g) != after.side(g)]
    assert len(moved) <= 1


def test_another_seed_is_another_draw() -> None:
    groups = {bytes([i]) * 16 for i in range(100)}
    sides = []
    for seed in range(3):
        made = cut(groups, asked(0.3, 0, seed))
        assert isinstance(made, Cut)
        sides.append(frozenset(g for g in groups if made.side(g) == "validation"))
    assert len(set(sides)) == 3
    assert rank(b"x" * 16, 1) != rank(b"x" * 16, 2)


def test_no_split_asked_for_is_all_train() -> None:
    made = cut({b"x" * 16}, asked(0))
    assert isinstance(made, Cut) and made.side(b"x" * 16) == "train"


def test_a_split_that_leaves_nothing_to_train_is_refused() -> None:
    made = cut({b"x" * 16}, asked(0.1))
    assert isinstance(made, Problem) and made.rule == "split_leaves_nothing"


@pytest.mark.parametrize(("groups", "fraction", "count"), [(150, 0.1, 15), (3, 0.01, 1), (10, 0, 0), (7, 0.5, 4)])
def test_shares_are_exact(groups: int, fraction: float, count: int) -> None:
    assert share(groups, fraction) == count


def test_content_is_what_is_said_not_how_it_lies() -> None:
    def chat(*parts: str, line: int = 1, note: str = "") -> datasets_pb2.Example:
        example = datasets_pb2.Example()
        message = example.chat.messages.add(role=2)
        for part in parts:
            message.parts.add(text=part)
        example.origin.line = line
        if note:
            example.metadata["note"] = note
        return example

    assert content_hash(chat("a", "b")) == content_hash(chat("ab", line=2, note="x"))
    assert content_hash(chat("a")) != content_hash(chat("b"))
    completion = datasets_pb2.Example(completion=datasets_pb2.Completion(prompt="a", completion="b"))
    assert content_hash(completion) != content_hash(chat("ab"))
    assert len(content_hash(completion)) == 16
