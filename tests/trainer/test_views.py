"""A running job seen from all sides: its worker's log, its checkpoints, an adapter of one, its bounded history."""

from __future__ import annotations

import pathlib
import urllib.request

import grpc
import pytest

import qlorad
from qlorad import errors
from qlorad.v1 import inference_pb2
from qlorad.v1 import trainer_pb2 as pb
from services.common import names
from services.common.errors import Fault
from services.common.shelf import Shelf
from services.trainer import published
from tests import promtool
from tests.client.cli import Cli
from tests.house import House, eventually, house
from tests.inference import kit as serving
from tests.trainer.following import Follower
from tests.trainer.kit import create, get, small, stub_of
from tests.trainer.test_door import details, held, reason, refused, waiting  # noqa: F401  # fixtures


def publish(made: House, name: str, adapter: str = "", request_id: str = "p") -> pb.PublishCheckpointResponse:
    request = pb.PublishCheckpointRequest(request_id=request_id, name=name, adapter=adapter)
    return stub_of(made).PublishCheckpoint(request, timeout=30)


def test_what_is_not_there_is_refused_by_name(waiting: House) -> None:  # noqa: F811
    job = create(stub_of(waiting), small(), "v", job_id="v")
    stub = stub_of(waiting)
    assert not stub.ListCheckpoints(pb.ListCheckpointsRequest(name=job.name), timeout=10).checkpoints
    refused(lambda: stub.ListCheckpoints(pb.ListCheckpointsRequest(name="jobs/no"), timeout=10),
            grpc.StatusCode.NOT_FOUND, "NOT_FOUND")  # fmt: skip
    refused(lambda: publish(waiting, f"{job.name}/checkpoints/4"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    wrong = refused(
        lambda: publish(waiting, "jobs/v/checkpoints/0", "adapters/../x", ""),
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST",
    )  # fmt: skip
    fields = {v.field for v in details(wrong)["BadRequest"].field_violations}  # type: ignore[attr-defined]
    assert fields == {"request_id", "name", "adapter"}
    for attempt in (0, 1):
        ask = pb.WatchLogRequest(name=job.name, attempt=attempt)
        refused(lambda a=ask: list(stub.WatchLog(a, timeout=10)), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


@pytest.mark.slow
def test_a_job_seen_from_all_sides(small_home: pathlib.Path) -> None:
    with house(small_home) as made:
        made.start("trainer", "--retry-backoff-seconds", "0", "--history-events", "100")
        stub = stub_of(made)
        spec = small(3000, evaluation__every_steps=20, checkpoints__every_steps=20, checkpoints__keep_last=2)
        job = create(stub, spec, "seen", job_id="seen")
        follower = Follower(made, job.name)
        eventually(lambda: follower.step() >= 45, 90, "step 45")

        kept = stub.ListCheckpoints(pb.ListCheckpointsRequest(name=job.name), timeout=10).checkpoints
        assert 1 <= len(kept) <= 2 and [c.step for c in kept] == sorted(c.step for c in kept)
        newest = kept[-1]
        assert newest.name == f"jobs/seen/checkpoints/{newest.step}" and newest.step % 20 == 0
        assert newest.size_bytes > 10_000 and newest.create_time.seconds and pb.KEPT_AS_LAST in newest.kept_as
        assert newest.HasField("eval_loss") and newest.eval_loss > 0

        early = eventually(lambda: published_now(made), 30, "a checkpoint that stays long enough")
        shelf = Shelf(small_home / "store")
        sealed = shelf.open("adapters", "early", verify=True)
        assert sealed.digest == early.digest and early.adapter == "adapters/early" and early.size_bytes > 1000
        assert sealed.manifest.lineage.base_digest == job.spec.train.model.removeprefix("models/")
        assert names.is_digest(early.digest) and next(iter(shelf.provenance(sealed))).startswith("seen-")

        url = f"http://{made.daemons['trainer'].told['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        promtool.check(text)
        for line in (
            'qlorad_job_loss{job="seen"}', 'qlorad_job_device_memory_bytes{job="seen"}', "qlorad_step_seconds_count",
            "qlorad_tokens_total", "qlorad_checkpoint_seconds_count", "qlorad_checkpoint_bytes_sum",
            "qlorad_job_queue_wait_seconds_count 1.0", "qlorad_job_restarts_total 0.0",
            "qlorad_job_attempts_stuck_total 0.0", "qlorad_memory_measured_ratio_count",
        ):  # fmt: skip
            assert line in text, line

        eventually(lambda: get(stub, job.name).last_sequence > 250, 60, "more events than are kept")
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.WatchJob(pb.WatchJobRequest(name=job.name), timeout=10))
        assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE and reason(caught.value) == "HISTORY_GONE"
        assert int(details(caught.value)["ErrorInfo"].metadata["oldest_sequence"]) > 1  # type: ignore[attr-defined]
        log = small_home / "state" / "jobs" / "seen" / "attempts" / "1" / "log"
        with log.open("a") as out:
            out.write("Authorization: Bearer abcdefghijklmnop\n")
        with qlorad.connect(home=small_home) as q:
            with pytest.raises(errors.OutOfRange):
                next(iter(q.jobs.watch("seen")))
            gone: list[tuple[int, int]] = []
            first = next(iter(q.jobs.watch("seen", on_gone=lambda a, o: gone.append((a, o)))))
            assert gone[0][0] == 0 and first.sequence == gone[-1][1] > 1
            assert [c.step for c in q.jobs.checkpoints("seen")]
            by_hand = Cli(small_home)
            assert "last" in by_hand.inside("job", "checkpoints", "seen")
            assert "[redacted]" in by_hand.inside("job", "log", "seen", "--attempt", "1")
            assert "adapters/by-hand" in by_hand.inside("job", "publish", "seen", "--name", "by-hand")
            pieces = q.jobs.log("seen", follow=True)
            told = next(iter(pieces))
            assert "[redacted]" in told and "abcdefgh" not in told
            q.jobs.cancel("seen")
            rest = list(pieces)
            assert "abcdefgh" not in "".join(rest), "and it ends with the attempt"
            q.jobs.wait("seen", check=False)
            told = by_hand.inside("job", "watch", "seen", code=6)
            assert "events 1 to " in told and "are not kept any more" in told and "CANCELLED" in told
        follower.join()
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert 'job="seen"' not in answer.read().decode()
        daemon, engine = serving.start(made)
        serving.load(engine, "early")
        loaded = engine.ListAdapters(inference_pb2.ListAdaptersRequest(), timeout=10).adapters
        assert [a.digest for a in loaded] == [early.digest]
        assert daemon.stop() == 0


def published_now(made: House) -> pb.PublishCheckpointResponse | None:
    """The newest checkpoint, made an adapter, unless the job has just superseded it."""
    kept = stub_of(made).ListCheckpoints(pb.ListCheckpointsRequest(name="jobs/seen"), timeout=10).checkpoints
    try:
        answer = publish(made, kept[-1].name, "adapters/early", f"p{kept[-1].step}")
    except grpc.RpcError as e:
        assert reason(e) == "NOT_FOUND"
        return None
    assert publish(made, kept[-1].name, "adapters/early", f"p{kept[-1].step}") == answer
    return answer


def test_the_name_of_a_checkpoint() -> None:
    asked = pb.PublishCheckpointRequest(request_id="a", name="jobs/x/checkpoints/12", adapter="adapters/y")
    assert published.read_name(asked) == ("x", 12)
    for wrong in ("jobs/x", "jobs/x/checkpoints/", "jobs/x/checkpoints/01", "jobs/../checkpoints/1", "x/checkpoints/1"):
        with pytest.raises(Fault, match="'jobs/ID/checkpoints/STEP'"):
            published.read_name(pb.PublishCheckpointRequest(request_id="a", name=wrong))
