"""The long forms of the promises: the short ones again and again (`make test-storm FILTER=faults`)."""

from __future__ import annotations

import pathlib

import pytest

from tests.common.test_security import (
    Secured,
    secured,  # noqa: F401  # a fixture
    test_certificates_change_under_load_without_a_dropped_call,
)
from tests.faults import test_lives as lives
from tests.faults import test_storm_trainer
from tests.faults import test_watching as watching
from tests.faults.test_trainer import (
    test_p1_an_acknowledged_job_survives_kill_9,
    test_p7_fifty_creates_with_one_request_id_are_one_job,
)

p1 = test_p1_an_acknowledged_job_survives_kill_9
p7 = test_p7_fifty_creates_with_one_request_id_are_one_job
p22 = test_certificates_change_under_load_without_a_dropped_call
del test_p1_an_acknowledged_job_survives_kill_9
del test_p7_fifty_creates_with_one_request_id_are_one_job
del test_certificates_change_under_load_without_a_dropped_call

pytestmark = pytest.mark.storm


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("number", range(20))
def test_p1_storm(small_home: pathlib.Path, number: int) -> None:
    p1(small_home)


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("number", range(20))
def test_p7_storm(small_home: pathlib.Path, number: int) -> None:
    p7(small_home)


@pytest.mark.parametrize("number", range(20))
def test_p22_storm(secured: Secured, number: int) -> None:  # noqa: F811
    p22(secured)


@pytest.mark.parametrize("number", range(10))
def test_p2_storm(tmp_path: pathlib.Path, starter_home: pathlib.Path, number: int) -> None:
    lives.run(tmp_path, starter_home, examples=10, steps=30)


@pytest.mark.parametrize("seed", range(2, 12))
def test_p3_storm(small_home: pathlib.Path, tmp_path: pathlib.Path, seed: int) -> None:
    test_storm_trainer.storm(small_home, tmp_path / "calm", steps=400, kills=20, seed=seed)


@pytest.mark.parametrize("number", range(10))
def test_p13_storm(small_home: pathlib.Path, number: int) -> None:
    assert watching.reconnects(small_home, watchers=8, wanted=2000, kills=10, most=12 + number) >= 2000
