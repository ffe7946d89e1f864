"""P12 for a job: on a full disk it stops cleanly, loses nothing, and goes on when there is space."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from qlorad.v1 import trainer_pb2 as pb
from services.common.shelf import Shelf
from tests.faults.test_datasets import small_disk
from tests.house import clone_store, eventually, house
from tests.trainer.following import Follower, run_undisturbed
from tests.trainer.kit import create, get, small, stub_of, worker_of
from tests.trainer.lawful import check_log


def runs(home: pathlib.Path, name: str) -> bool:
    try:
        return worker_of(home, name) > 0
    except AssertionError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("leave_bytes", [0, 200_000])
def test_p12_a_job_on_a_full_disk_stops_cleanly_and_goes_on(
    small_home: pathlib.Path, tmp_path: pathlib.Path, leave_bytes: int
) -> None:
    """One attempt is allowed: what the disk ended does not count."""
    spec = small(400, checkpoints__every_steps=5, limits__max_attempts=1, lora__rank=32)
    clone_store(small_home, tmp_path / "calm")
    calm = run_undisturbed(tmp_path / "calm", spec)
    with small_disk(tmp_path / "disk", 48) as disk:
        home = disk.home / "home"
        home.mkdir()
        shutil.copytree(small_home / "store", home / "store")
        with house(home) as made:
            made.start("trainer", "--retry-backoff-seconds", "0", "--min-free-bytes", str(4 << 20))
            job = create(stub_of(made), spec, "full", job_id="full")
            follower = Follower(made, job.name)
            eventually(lambda: follower.step() >= 12, 60, "step 12")
            disk.fill(leave_bytes)
            eventually(lambda: not runs(home, job.name), 90, "the end of the worker")
            now = get(stub_of(made), job.name)
            assert not now.is_terminal
            shelf = Shelf(home / "store")
            for path in (home / "store" / "checkpoints").iterdir():
                if path.name != "aliases":
                    shelf.open("checkpoints", f"sha256:{path.name}", verify=True)
            disk.empty()
            follower.join()
            done = get(stub_of(made), job.name)
            check_log(job, follower.events, done)
        told = [e.state_changed for e in follower.events if e.HasField("state_changed")]
        interrupted = [c for c in told if c.to == pb.JOB_STATE_INTERRUPTED]
        assert interrupted and {c.error.reason for c in interrupted} == {"DISK_FULL"}
        assert done.state == pb.JOB_STATE_SUCCEEDED and done.attempt == len(interrupted) + 1, done.error
        assert done.result.adapter_digest == calm.result.adapter_digest
