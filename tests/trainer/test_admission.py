"""Micro-batches by measuring: the search by itself, and a job that fills its budget, fits, or is refused."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import trainer_pb2
from services.trainer import admission, agreement
from tests.house import House
from tests.trainer.kit import create, get, small, stub_of, watch

MB = 1_000_000


@given(
    st.integers(100, 2000), st.floats(0.001, 2.0), st.integers(8, 4096), st.floats(1.0, 60.0), st.floats(0.0, 0.3),
    st.floats(0.0, 0.9),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_budget_is_neared_from_below_and_filled(
    fixed: int, each: float, least: int, room: float, bend: float, told: float
) -> None:
    """Whatever a token costs, also where many cost more a token than few."""

    def measure(tokens: int) -> int:
        tried.append(tokens)
        return int(MB * (fixed + each * tokens * (1 + bend * tokens / most)))

    tried: list[int] = []
    most = int(least * room) + 1
    budget = int(MB * (fixed + each * most * 0.7)) + MB
    try:
        found = admission.fill(measure, least, most, budget, MB * each * told)
    except admission.OverBudget:
        assert measure(least) > budget
        return
    assert found.bytes <= budget and least <= found.tokens <= most and len(tried) <= 11
    ended = found.tokens > most - 2 * admission.STEP_TOKENS
    near = measure(min(most, found.tokens + 2 * admission.STEP_TOKENS)) > budget
    assert found.bytes >= 0.9 * budget or ended or near


def test_too_much_is_refused_with_the_numbers() -> None:
    admission.check(10**12, 0, 64)
    with pytest.raises(admission.OverBudget, match=r"64 tokens takes 1001 bytes, memory\.budget_bytes is 1000; accep"):
        admission.check(1001, 1000, 64)


def test_a_micro_batch_to_be_found_needs_a_budget_and_one_process() -> None:
    train = small().train
    train.data.micro_batch_tokens = 0
    train.parallelism.ranks = 2
    wrong = {v.field for v in agreement.violations(train)}
    assert {"spec.train.memory.budget_bytes", "spec.train.data.micro_batch_tokens"} <= wrong
    train.memory.budget_bytes, train.parallelism.ranks = 10**9, 1
    wrong = {v.field for v in agreement.violations(train)}
    assert not wrong & {"spec.train.memory.budget_bytes", "spec.train.data.micro_batch_tokens"}


def test_the_longest_rows_fill_the_batch_that_is_measured() -> None:
    from services.trainer.worker.admission import fullest

    lengths = [5, 30, 9, 20]
    for tokens in range(30, 200):
        chosen = fullest(lengths, tokens, packing=True)
        assert chosen[0] == 1 and tokens - 5 < sum(lengths[n] for n in chosen) <= tokens
    assert fullest(lengths, 100, packing=False) == [1, 3, 2]


@pytest.mark.slow
def test_a_job_fills_its_budget_and_one_that_cannot_fit_is_refused(trainer: House, small_home: pathlib.Path) -> None:
    stub = stub_of(trainer)
    spec = small(data__micro_batch_tokens=0, memory__budget_bytes=900 * MB)
    job = create(stub, spec, "fills")
    events = list(watch(stub, job.name))
    assert get(stub, job.name).state == trainer_pb2.JOB_STATE_SUCCEEDED
    (told,) = [e.admitted for e in events if e.HasField("admitted")]
    assert 0 < told.measured_bytes <= told.budget_bytes == 900 * MB and told.predicted_bytes
    (planned,) = [e.planned for e in events if e.HasField("planned")]
    chosen = planned.chosen.micro_batch_tokens
    assert chosen and get(stub, job.name).spec.train.data.micro_batch_tokens == chosen
    assert max(e.step.host_memory_bytes for e in events if e.HasField("step")) <= 900 * MB

    job = create(stub, small(memory__budget_bytes=100 * MB), "no")
    list(watch(stub, job.name))
    ended = get(stub, job.name)
    assert ended.state == trainer_pb2.JOB_STATE_FAILED and ended.error.reason == "OUT_OF_MEMORY"
    assert "memory.budget_bytes is 100000000" in ended.error.message
