"""TrainerService from outside: refusals, queue, cancel, watch, delete, metrics. No job here trains long."""

from __future__ import annotations

import pathlib
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from qlorad.v1 import trainer_pb2
from services.common import devices
from services.common.shelf import Shelf
from tests.house import House, eventually, house
from tests.trainer.kit import create, facts, get, seal_dataset, small, stub_of, watch
from tests.trainer.test_spec import SHIPPED


def details(error: grpc.RpcError) -> dict[str, object]:
    """What an error carries, by kind."""
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    found: dict[str, object] = {}
    for packed in status_pb2.Status.FromString(raw).details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                message = kind()
                packed.Unpack(message)
                found[kind.__name__] = message
    return found


def reason(error: grpc.RpcError) -> str:
    return str(details(error)["ErrorInfo"].reason)  # type: ignore[attr-defined]


@pytest.fixture
def held(small_home: pathlib.Path) -> Iterator[devices.Lease]:
    """The device, held by the test: jobs wait."""
    lease = devices.acquire(small_home / "state" / "devices", devices.devices_here()[0], "the test", 4096)
    yield lease
    lease.release()


@pytest.fixture
def waiting(small_home: pathlib.Path, held: devices.Lease) -> Iterator[House]:
    """A trainer that cannot start anything."""
    with house(small_home) as made:
        made.start("trainer", "--max-queue", "4", "--heartbeat-seconds", "0.2")
        yield made


def refused(call, code: grpc.StatusCode, why: str) -> grpc.RpcError:  # type: ignore[no-untyped-def]
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert (caught.value.code(), reason(caught.value)) == (code, why), caught.value.details()
    return caught.value


def test_every_violation_comes_at_once(waiting: House) -> None:
    stub = stub_of(waiting)
    spec = small(lora__rank=0, optimizer__learning_rate=2.0, data__max_length_tokens=10**6)
    spec.train.lora.target_modules.names.append("q_porj")
    error = refused(
        lambda: create(stub, spec, "no spaces here", job_id="Bad", priority=500),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
    )
    fields = {v.field: v.description for v in details(error)["BadRequest"].field_violations}  # type: ignore[attr-defined]
    assert set(fields) == {
        "request_id",
        "job_id",
        "priority",
        "spec.train.lora.rank",
        "spec.train.optimizer.learning_rate",
        "spec.train.data.max_length_tokens",
        "spec.train.data.micro_batch_tokens",
        "spec.train.lora.target_modules.names",
    }
    assert "got 0; accepted: 1 to 512" in fields["spec.train.lora.rank"]
    assert "q_proj" in fields["spec.train.lora.target_modules.names"]
    assert not stub.ListJobs(trainer_pb2.ListJobsRequest(), timeout=10).jobs


def test_unknown_things_are_named_with_the_nearest(waiting: House) -> None:
    stub = stub_of(waiting)
    for field, value, near in (
        ("model", "models/starter-tset", "models/starter-test"),
        ("dataset", "datasets/smal", "datasets/small"),
    ):
        error = refused(
            lambda f=field, v=value: create(stub, small(**{f: v}), "a"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND"
        )
        assert value in error.details() and near in error.details()
    error = refused(lambda: create(stub, small(), "a", template="standrd"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert "templates/standard" in error.details()
    refused(lambda: get(stub, "jobs/none"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    refused(lambda: get(stub, "jobs/../etc"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_an_empty_dataset_is_refused(waiting: House) -> None:
    seal_dataset(waiting.home, "empty", {"train": 0, "validation": 1})
    error = refused(
        lambda: create(stub_of(waiting), small(dataset="datasets/empty"), "a"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
    )
    assert "spec.train.dataset" in error.details() and "train split" in error.details()


def test_only_checking_makes_no_job(waiting: House) -> None:
    stub = stub_of(waiting)
    job = create(stub, small(), "", validate_only=True)
    assert job.spec.train.optimizer.beta2 == 0.999 and job.spec.train.model.startswith("models/sha256:")
    assert not stub.ListJobs(trainer_pb2.ListJobsRequest(), timeout=10).jobs


def test_the_queue_has_an_order_a_reason_and_an_end(waiting: House) -> None:
    stub = stub_of(waiting)
    for number, priority in enumerate((0, 0, 5, -5)):
        create(stub, small(), f"q{number}", job_id=f"q{number}", priority=priority)

    def places() -> dict[str, trainer_pb2.QueuePlace] | None:
        listed = {j.name: j.queue for j in stub.ListJobs(trainer_pb2.ListJobsRequest(), timeout=10).jobs}
        return listed if all(p.position for p in listed.values()) else None

    found = eventually(places, 10, "a place for every job")
    assert {n: p.position for n, p in found.items()} == {"jobs/q2": 1, "jobs/q0": 2, "jobs/q1": 3, "jobs/q3": 4}
    first = found["jobs/q2"]
    assert (first.reason, first.owner, first.owner_bytes) == (
        trainer_pb2.QUEUE_REASON_DEVICE_BUSY, "the test", 4096,
    )  # fmt: skip
    assert found["jobs/q0"].reason == trainer_pb2.QUEUE_REASON_POSITION
    error = refused(lambda: create(stub, small(), "q4"), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert details(error)["RetryInfo"].retry_delay.seconds > 0  # type: ignore[attr-defined]
    cancel = trainer_pb2.CancelJobRequest(request_id="c", name="jobs/q2")
    assert stub.CancelJob(cancel, timeout=10).job.state == trainer_pb2.JOB_STATE_CANCELLED
    eventually(lambda: get(stub, "jobs/q0").queue.reason == trainer_pb2.QUEUE_REASON_DEVICE_BUSY, 10, "q0 moving up")
    create(stub, small(), "q4")


def test_pages_and_filters_of_the_list(waiting: House) -> None:
    stub = stub_of(waiting)
    for number in range(4):
        create(stub, small(), f"p{number}", job_id=f"p{number}", experiment="odd" if number % 2 else "even")
    seen, token = [], ""
    while True:
        page = stub.ListJobs(trainer_pb2.ListJobsRequest(page_size=3, page_token=token), timeout=10)
        seen += [j.name for j in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["jobs/p3", "jobs/p2", "jobs/p1", "jobs/p0"]
    odd = stub.ListJobs(trainer_pb2.ListJobsRequest(experiment="odd"), timeout=10).jobs
    assert [j.name for j in odd] == ["jobs/p3", "jobs/p1"]
    states = [trainer_pb2.JOB_STATE_RUNNING]
    assert not stub.ListJobs(trainer_pb2.ListJobsRequest(states=states), timeout=10).jobs
    for wrong in (trainer_pb2.ListJobsRequest(page_size=-1), trainer_pb2.ListJobsRequest(page_token="%%")):
        refused(lambda w=wrong: stub.ListJobs(w, timeout=10), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_what_a_queued_job_needs_cannot_be_removed(waiting: House) -> None:
    stub = stub_of(waiting)
    job = create(stub, small(), "pin")
    shelf = Shelf(waiting.home / "store")
    assert shelf.holders(job.spec.train.model.removeprefix("models/")) == [job.name]
    assert shelf.holders(job.spec.train.dataset.removeprefix("datasets/")) == [job.name]
    stub.CancelJob(trainer_pb2.CancelJobRequest(request_id="c", name=job.name), timeout=10)
    assert shelf.holders(job.spec.train.model.removeprefix("models/")) == []


def test_a_watch_of_a_quiet_job_beats_and_ends_with_the_job(waiting: House) -> None:
    stub = stub_of(waiting)
    job = create(stub, small(), "w")
    stream = stub.WatchJob(trainer_pb2.WatchJobRequest(name=job.name), timeout=30)
    assert next(stream).snapshot.name == job.name
    beat = next(u.heartbeat for u in stream if u.HasField("heartbeat"))
    assert beat.interval.ToMilliseconds() == 200 and beat.last_sequence >= 1
    stub.CancelJob(trainer_pb2.CancelJobRequest(request_id="c", name=job.name), timeout=10)
    rest = list(stream)
    assert rest[-1].event.state_changed.to == trainer_pb2.JOB_STATE_CANCELLED
    assert [f for f in facts(list(watch(stub, job.name))) if f.isupper()] == ["QUEUED", "CANCELLED"]
    ahead = trainer_pb2.WatchJobRequest(name=job.name, after_sequence=99)
    refused(lambda: list(stub.WatchJob(ahead, timeout=10)), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_cancel_and_delete_know_their_states(waiting: House) -> None:
    stub = stub_of(waiting)
    job = create(stub, small(), "d")
    delete = trainer_pb2.DeleteJobRequest(request_id="d1", name=job.name)
    refused(lambda: stub.DeleteJob(delete, timeout=10), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    for request_id in ("c1", "c1", "c2"):
        answer = stub.CancelJob(trainer_pb2.CancelJobRequest(request_id=request_id, name=job.name), timeout=10)
        assert answer.job.state == trainer_pb2.JOB_STATE_CANCELLED
    gone = stub.DeleteJob(delete, timeout=10)
    assert stub.DeleteJob(delete, timeout=10) == gone
    refused(lambda: get(stub, job.name), grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert not list(stub.ListJobs(trainer_pb2.ListJobsRequest(), timeout=10).jobs)


def test_templates_are_told_in_full(waiting: House) -> None:
    told = stub_of(waiting).ListTemplates(trainer_pb2.ListTemplatesRequest(), timeout=10).templates
    assert [t.name for t in told] == list(SHIPPED)
    assert all(t.description and t.spec.train.lora.rank for t in told)


def test_metrics_tell_of_queue_and_states(waiting: House) -> None:
    create(stub_of(waiting), small(), "m")
    url = f"http://{waiting.daemons['trainer'].told['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    assert 'qlorad_jobs{state="QUEUED"} 1.0' in text and "qlorad_job_queue_depth 1.0" in text
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="CreateJob"' in text


def test_settings_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    with house(tmp_path / "home") as made, pytest.raises(AssertionError) as caught:
        made.start("trainer", "--devices", "tpu:9", "--max-queue", "0", "--watch-ring-events", "1")
    assert "--max-queue" in str(caught.value) and "--watch-ring-events" in str(caught.value)
    with (
        house(tmp_path / "home2") as made,
        pytest.raises(AssertionError, match=r"--devices: got 'tpu:9'; accepted: .*cpu"),
    ):
        made.start("trainer", "--devices", "tpu:9")
