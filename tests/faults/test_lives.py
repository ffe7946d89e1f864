"""P2: a job moves only along the published graph, whatever callers wish and whatever dies, in any order."""

from __future__ import annotations

import os
import pathlib
import signal

import grpc
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from qlorad.v1 import trainer_pb2 as pb
from tests.faults.conftest import lives_home
from tests.house import House, eventually
from tests.trainer.following import Follower
from tests.trainer.kit import create, get, small, stub_of, worker_of
from tests.trainer.lawful import check_log
from tests.trainer.test_door import reason

TERMINAL = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
CALLS = ("Pause", "Resume", "Cancel", "Delete")


class Lives(RuleBasedStateMachine):
    """Jobs of seconds on two devices; wishes with old and new request ids; kills of worker and daemon."""

    jobs = Bundle("jobs")

    def __init__(self, home: pathlib.Path) -> None:
        super().__init__()
        self.house = House(home)
        self.house.start("trainer", "--devices", "cpu:0,cpu:1", "--retry-backoff-seconds", "0", "--max-queue", "3")
        self.made: dict[str, tuple[pb.Job, Follower]] = {}
        self.answered: dict[tuple[str, str], object] = {}
        self.count = 0

    @rule(target=jobs, steps=st.sampled_from([2, 6, 400]), priority=st.integers(-1, 1))
    def make(self, steps: int, priority: int) -> str:
        name = f"life{self.count}"
        self.count += 1
        spec = small(steps, evaluation__max_rows=1, limits__max_attempts=4)
        try:
            job = create(stub_of(self.house), spec, name, job_id=name, priority=priority)
        except grpc.RpcError as e:
            assert reason(e) == "QUEUE_FULL"
            return ""
        assert create(stub_of(self.house), spec, name, job_id=name, priority=priority) == job
        self.made[job.name] = (job, Follower(self.house, job.name))
        return job.name

    @rule(name=jobs, call=st.sampled_from(CALLS[:3]), request_id=st.sampled_from(["one", "two", "three"]))
    def wish(self, name: str, call: str, request_id: str) -> None:
        self._call(name, call, request_id)

    @rule(name=consumes(jobs))
    def forget(self, name: str) -> None:
        """Deleted once it has ended; refused before."""
        if name and not get(stub_of(self.house), name).is_terminal:
            self._call(name, "Delete", "early")
            self._call(name, "Cancel", "late")
        if name:
            self._settle(name)
            self._call(name, "Delete", "now")
            with pytest.raises(grpc.RpcError) as caught:
                get(stub_of(self.house), name)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    def _call(self, name: str, call: str, request_id: str) -> None:
        if name not in self.made:
            return
        stub = stub_of(self.house)
        request = getattr(pb, f"{call}JobRequest")(request_id=f"{name[5:]}-{request_id}", name=name)
        key = (call, request.request_id)
        try:
            answer = getattr(stub, f"{call}Job")(request, timeout=20)
        except grpc.RpcError as e:
            assert reason(e) in ("WRONG_STATE", "QUEUE_FULL"), e
            assert key not in self.answered, "what was answered once is answered again"
            return
        assert self.answered.setdefault(key, answer) == answer
        if call == "Delete":
            del self.made[name]

    @rule(name=jobs)
    def kill_worker(self, name: str) -> None:
        if name in self.made:
            try:
                os.kill(worker_of(self.house.home, name), signal.SIGKILL)
            except (AssertionError, ProcessLookupError, FileNotFoundError, ValueError):
                return  # none runs

    @rule(hard=st.booleans())
    def restart(self, hard: bool) -> None:
        daemon = self.house.daemons["trainer"]
        if hard:
            daemon.kill()
        else:
            assert daemon.stop() == 0
        daemon.start()

    @rule(name=jobs)
    def await_news(self, name: str) -> None:
        """Until something has happened to it, if anything can."""
        if name in self.made:
            _, follower = self.made[name]
            seen = len(follower.events)
            now = get(stub_of(self.house), name)
            if now.state in (pb.JOB_STATE_PREPARING, pb.JOB_STATE_RUNNING, pb.JOB_STATE_FINALIZING):
                eventually(lambda: len(follower.events) > seen, 60, "news")

    @invariant()
    def every_log_is_lawful_so_far(self) -> None:
        for name, (job, _) in list(self.made.items()):
            now = get(stub_of(self.house), name)
            check_log(job, events_up_to(self.house, now), now)

    def _settle(self, name: str) -> None:
        job, follower = self.made[name]
        now = get(stub_of(self.house), name)
        if not now.is_terminal:
            self._call(name, "Cancel", "settle")
        follower.join()
        ended = get(stub_of(self.house), name)
        assert ended.state in TERMINAL
        check_log(job, follower.events, ended)

    def teardown(self) -> None:
        try:
            for name in list(self.made):
                self._settle(name)
        finally:
            self.house.close()


def events_up_to(made: House, job: pb.Job) -> list[pb.Event]:
    found: list[pb.Event] = []
    for update in stub_of(made).WatchJob(pb.WatchJobRequest(name=job.name), timeout=60):
        if update.HasField("event"):
            found.append(update.event)
            if update.event.sequence == job.last_sequence:
                break
    return found


def run(tmp_path: pathlib.Path, starter_home: pathlib.Path, examples: int, steps: int) -> None:
    homes = iter(range(1_000_000))

    def machine() -> Lives:
        return Lives(lives_home(tmp_path / str(next(homes)), starter_home))

    kind = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=kind)


@pytest.mark.slow
def test_p2_no_order_of_wishes_and_deaths_leaves_the_law(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    run(tmp_path, starter_home, examples=4, steps=15)
