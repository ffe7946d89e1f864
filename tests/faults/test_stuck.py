"""P8 and P9: a worker that shows no life is noticed and ended; one past its time changes nothing."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
from collections.abc import Iterator

import psutil
import pytest

from qlorad.v1 import trainer_pb2
from services.common import artifacts, devices, frames
from services.common.frames.v1 import training_pb2
from services.trainer import launch, pulse
from tests.house import House, clone_store, eventually, house
from tests.trainer.following import Follower, run_undisturbed
from tests.trainer.kit import create, get, metric, small, stub_of, worker_of
from tests.trainer.lawful import check_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="finds workers by /proc"),
]
HEARTBEAT = 3.0
FLAGS = ("--retry-backoff-seconds", "0", "--worker-heartbeat-seconds", str(HEARTBEAT))


@pytest.fixture
def frozen() -> Iterator[list[int]]:
    """Pids of stopped processes, ended after the test whatever happens."""
    found: list[int] = []
    yield found
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def freeze(made: House, follower: Follower, name: str, step: int, frozen: list[int]) -> int:
    eventually(lambda: follower.step() >= step, 60, f"step {step}")
    worker = worker_of(made.home, name)
    os.kill(worker, signal.SIGSTOP)
    frozen.append(worker)
    return worker


def interruptions(follower: Follower) -> list[str]:
    return [
        e.state_changed.message
        for e in list(follower.events)
        if e.HasField("state_changed") and e.state_changed.to == trainer_pb2.JOB_STATE_INTERRUPTED
    ]


def seconds_of(message: str) -> float:
    match = re.fullmatch(r"stuck: no sign of life for (\d+) s", message)
    assert match, message
    return float(match[1])


def ended(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_p9_a_stopped_worker_is_noticed_whoever_started_it(
    small_home: pathlib.Path,
    tmp_path: pathlib.Path,
    frozen: list[int],
) -> None:
    """Twice: a child of this daemon, and one that a daemon found again after kill -9. The bytes are the same."""
    spec = small(60)
    clone_store(small_home, tmp_path / "calm")
    calm = run_undisturbed(tmp_path / "calm", spec)
    with house(small_home) as made:
        made.start("trainer", *FLAGS)
        job = create(stub_of(made), spec, "stuck", job_id="stuck")
        follower = Follower(made, job.name)
        first = freeze(made, follower, job.name, 3, frozen)
        eventually(lambda: interruptions(follower), 60, "the first interruption")
        assert ended(first) and metric(made, "qlorad_job_attempts_stuck_total") == 1
        eventually(lambda: any(e.attempt == 2 and e.HasField("step") for e in list(follower.events)), 60, "attempt 2")
        second = worker_of(small_home, job.name)
        made.daemons["trainer"].kill()
        os.kill(second, signal.SIGSTOP)
        frozen.append(second)
        made.daemons["trainer"].start()
        eventually(lambda: len(interruptions(follower)) == 2, 60, "the second interruption")
        assert ended(second) and metric(made, "qlorad_job_attempts_stuck_total") == 1
        follower.join()
        done = get(stub_of(made), job.name)
        check_log(job, follower.events, done)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED and done.attempt == 3, done.error
    assert done.result.adapter_digest == calm.result.adapter_digest
    for message in interruptions(follower):
        assert 1.5 * HEARTBEAT - 1 <= seconds_of(message) <= 2 * HEARTBEAT


def test_p9_a_daemon_that_was_stopped_itself_ends_no_healthy_worker(small_home: pathlib.Path) -> None:
    with house(small_home) as made:
        daemon = made.start("trainer", *FLAGS)
        job = create(stub_of(made), small(100_000, evaluation__max_rows=1), "well", job_id="well")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 2, 60, "step 2")
        life = launch_folder(small_home, "well", 1) / pulse.SIGN
        os.kill(daemon.pid, signal.SIGSTOP)
        begun = pulse.FORMAT.unpack(life.read_bytes())[0]
        beats = int(2.5 * pulse.BEATS)
        eventually(lambda: pulse.FORMAT.unpack(life.read_bytes())[0] > begun + beats, 60, "two and a half heartbeats")
        reached = follower.step()
        os.kill(daemon.pid, signal.SIGCONT)
        eventually(lambda: follower.step() > reached + 50, 60, "further steps")
        request = trainer_pb2.CancelJobRequest(request_id="c", name=job.name)
        stub_of(made).CancelJob(request, timeout=10)
        follower.join()
        done = get(stub_of(made), job.name)
        assert done.attempt == 1 and metric(made, "qlorad_job_attempts_stuck_total") == 0
        check_log(job, follower.events, done)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its shared-memory part with g++")
def test_p9_one_stopped_rank_of_two_is_named_and_all_are_ended(small_home: pathlib.Path, frozen: list[int]) -> None:
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0", "--worker-heartbeat-seconds", "6")
        spec = small(20_000, evaluation__max_rows=1, data__micro_batch_tokens=128, parallelism__ranks=2)
        job = create(stub_of(made), spec, "two", job_id="two", template="zero2")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 3, 120, "step 3")
        both = {number: rank_of(small_home, number) for number in "01"}
        os.kill(both["1"], signal.SIGSTOP)
        frozen.append(both["1"])
        eventually(lambda: interruptions(follower), 60, "an interruption")
        assert interruptions(follower)[0].startswith("stuck: no sign of life of life.1 for "), interruptions(follower)
        assert all(ended(pid) for pid in both.values())
        stub_of(made).CancelJob(trainer_pb2.CancelJobRequest(request_id="c", name=job.name), timeout=10)
        follower.join()
        check_log(job, follower.events, get(stub_of(made), job.name))


def rank_of(home: pathlib.Path, number: str) -> int:
    """Pid of a rank of the only job of several."""
    for process in psutil.process_iter():
        try:
            if str(home) in " ".join(process.cmdline()) and process.environ().get("QLORAD_RANK") == number:
                return process.pid
        except psutil.Error:
            continue
    raise AssertionError(f"no rank {number} runs")


def test_p9_a_worker_that_lives_but_gets_nowhere_is_ended_too(small_home: pathlib.Path) -> None:
    """--stuck-seconds is shorter than a worker needs to load its libraries, so none gets to a step."""
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0", "--stuck-seconds", "1")
        job = create(stub_of(made), small(4, limits__max_attempts=2), "slow", job_id="slow")
        follower = Follower(made, job.name)
        follower.join()
        done = get(stub_of(made), job.name)
        check_log(job, follower.events, done)
        assert metric(made, "qlorad_job_attempts_stuck_total") == 2
    assert done.state == trainer_pb2.JOB_STATE_FAILED and done.error.reason == "WORKER_LOST"
    assert "stuck: no progress" in done.error.message and "though it lives" in done.error.message


def launch_folder(home: pathlib.Path, job: str, attempt: int) -> pathlib.Path:
    return home / "state" / "jobs" / job / "attempts" / str(attempt)


def test_p8_a_worker_past_its_time_changes_nothing(
    small_home: pathlib.Path,
    tmp_path: pathlib.Path,
    frozen: list[int],
) -> None:
    """Its locks are stolen while it is stopped, so the next one starts; then it is let go on."""
    spec = small(60)
    clone_store(small_home, tmp_path / "calm")
    calm = run_undisturbed(tmp_path / "calm", spec)
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0")
        job = create(stub_of(made), spec, "fenced", job_id="fenced")
        follower = Follower(made, job.name)
        old = freeze(made, follower, job.name, 5, frozen)
        folder = launch_folder(small_home, "fenced", 1)
        (small_home / "state" / "devices" / f"{devices.devices_here()[0]}.lock").unlink()
        (folder / launch.LOCK).unlink()
        eventually(lambda: any(e.attempt == 2 and e.HasField("step") for e in list(follower.events)), 60, "attempt 2")
        told = (folder / launch.FACTS).stat().st_size
        os.kill(old, signal.SIGCONT)
        eventually(lambda: ended(old), 60, "its end")
        assert (folder / launch.FACTS).stat().st_size > told, "it wrote on after its time"
        write_on(folder)
        made.daemons["trainer"].kill()
        made.daemons["trainer"].start()
        write_on(folder)
        follower.join()
        done = get(stub_of(made), job.name)
        check_log(job, follower.events, done)
    assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED and done.attempt == 2, done.error
    assert done.result.adapter_digest == calm.result.adapter_digest
    begun = next(e.sequence for e in follower.events if e.HasField("attempt_started") and e.attempt == 2)
    assert all(e.attempt == 2 for e in follower.events if e.sequence > begun), "nothing of attempt 1 after that"
    assert "evil" not in {e.log.text for e in follower.events}


def write_on(folder: pathlib.Path) -> None:
    """What a worker past its time might still tell: a line, a checkpoint of its own, and that all is done."""
    evil = folder / "checkpoints" / "9999"
    evil.mkdir(parents=True, exist_ok=True)
    (evil / "state.json").write_text("{}")
    files = artifacts.list_payload(evil)
    written = training_pb2.CheckpointWritten(step=9999, folder="checkpoints/9999", files=files)
    over = training_pb2.Finished(end=trainer_pb2.END_REASON_STEPS, folder="checkpoints/9999", files=files)
    told = [
        training_pb2.Fact(log=trainer_pb2.LogLine(level="INFO", text="evil")),
        training_pb2.Fact(checkpoint=written),
        training_pb2.Fact(finished=over),
    ]
    with (folder / launch.FACTS).open("ab") as out:
        for fact in told:
            out.write(frames.pack(fact.SerializeToString()))
