"""P3 of several ranks: kill -9 of one rank, of all, of the daemon too; the losses are those of an undisturbed run."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal

import pytest

from qlorad.v1 import trainer_pb2 as pb
from services.common.shelf import Shelf
from tests.faults.test_trainer import Follower, small_home  # noqa: F401
from tests.house import clone_store, eventually, house
from tests.trainer.kit import create, get, small, stub_of

STEPS, EVERY = 80, 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its shared-memory part with g++"),
    pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="finds ranks by /proc"),
]


def processes(home: pathlib.Path, name: str) -> dict[int, int]:
    """Pids by rank of the newest attempt of a job; its leader is -1."""
    folder = home / "state" / "jobs" / name.removeprefix("jobs/") / "attempts"
    newest = str(folder / str(max(int(p.name) for p in folder.iterdir()))).encode()
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if newest in (entry / "cmdline").read_bytes().split(b"\0"):
                environ = (entry / "environ").read_bytes().split(b"\0")
                ranks = [int(v.partition(b"=")[2]) for v in environ if v.startswith(b"QLORAD_RANK=")]
                found[ranks[0] if ranks else -1] = int(entry.name)
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("template", ["zero2", "zero3"])
def test_p3_kills_of_ranks_change_no_loss(
    small_home: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    template: str,
) -> None:
    spec = small(STEPS, checkpoints__every_steps=EVERY)
    spec.train.parallelism.ranks, spec.train.parallelism.zero_stage = 2, int(template[-1])
    spec.train.data.micro_batch_tokens = 128
    other = tmp_path / "calm"
    clone_store(small_home, other)
    with house(other) as made:
        made.start("trainer")
        quiet = Follower(made, create(stub_of(made), spec, "calm", job_id="calm").name)
        quiet.join()
        calm, undisturbed = get(stub_of(made), "jobs/calm"), quiet.events
    assert calm.state == pb.JOB_STATE_SUCCEEDED, (calm.error.message, calm.error.log_tail[-1500:])
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0")
        job = create(stub_of(made), spec, "storm", job_id="storm")
        follower = Follower(made, job.name)

        def at(attempt: int, step: int) -> dict[int, int]:
            def there() -> bool:
                return any(e.attempt == attempt and e.step.step >= step for e in list(follower.events))

            eventually(there, 90, f"step {step} of attempt {attempt}")
            return processes(small_home, job.name)

        pids = at(1, 6)
        assert sorted(pids) == [-1, 0, 1]
        os.kill(pids[1], signal.SIGKILL)  # one rank; not the one that tells
        for pid in [p for rank, p in at(2, 14).items() if rank >= 0]:
            os.kill(pid, signal.SIGKILL)  # both
        pids = at(3, 22)
        os.kill(pids[0], signal.SIGKILL)  # the one that tells
        pids = at(4, 30)
        made.daemons["trainer"].kill()
        os.kill(pids[-1], signal.SIGKILL)  # the leader: the ranks must go with it
        made.daemons["trainer"].start()
        follower.join()
        done = get(stub_of(made), job.name)
        events = follower.events
    assert done.state == pb.JOB_STATE_SUCCEEDED, (done.error.message, done.error.log_tail[-1500:])
    assert done.attempt == 5
    assert [e.sequence for e in events] == list(range(1, done.last_sequence + 1)), "no gap, no double"
    lines = [e.log.text for e in events if e.HasField("log") and "ended by signal 9" in e.log.text]
    assert len(lines) == 3 and lines[0].startswith("rank 1 was"), lines
    expected = {e.step.step: round(e.step.loss, 4) for e in undisturbed if e.HasField("step")}
    losses: dict[int, set[float]] = {}
    for event in events:
        if event.HasField("step"):
            losses.setdefault(event.step.step, set()).add(round(event.step.loss, 4))
    assert losses == {step: {loss} for step, loss in expected.items()} and len(losses) == STEPS
    assert done.result.adapter_digest == calm.result.adapter_digest
    begun = [e.attempt_started.from_step for e in events if e.HasField("attempt_started")]
    for attempt in range(1, 5):
        last = max(e.step.step for e in events if e.HasField("step") and e.attempt == attempt)
        assert 0 <= last - begun[attempt] <= EVERY, "no more than what lies between two checkpoints is lost"
    kept = Shelf(small_home / "store").open("checkpoints", done.result.checkpoint_digest, verify=True)
    assert {f.path for f in kept.manifest.files} >= {f"optimizer-0000{n}-of-00002.safetensors" for n in (1, 2)}
