"""The library, plain and asyncio, against real daemons."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable

import pytest

import qlorad
from qlorad import aio, errors
from qlorad.v1 import datasets_pb2, trainer_pb2
from tests.client.cli import Cli
from tests.common.certificates import Authority
from tests.house import House
from tests.samples import sample_rows


@pytest.fixture
def big_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file so large that half of it is more than may be on its way, or not yet safe, at any moment."""
    path = tmp_path / "big.jsonl"
    path.write_bytes(sample_rows(1000) * 320)
    assert path.stat().st_size > 48 << 20
    return path


class Cut:
    """A progress callback that kills the daemon once, half way, and starts it anew (at another port)."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.seen: list[int] = []
        self.after: list[int] = []

    def __call__(self, progress: datasets_pb2.StageProgress) -> None:
        done = progress.done
        if self.after or done < progress.total // 2:
            (self.after or self.seen).append(done)
            return
        self.seen.append(done)
        self.after.append(-1)
        self.house.daemons["datasets"].kill()
        self.house.start("datasets")


def test_an_upload_goes_on_where_it_was_cut(
    tmp_path: pathlib.Path, big_file: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    house = house_factory(tmp_path / "home")
    house.start("datasets")
    cut = Cut(house)
    with qlorad.connect(home=house.home) as client:
        upload = client.datasets.upload(big_file, progress=cut)
        assert upload.complete and upload.committed_bytes == big_file.stat().st_size
        assert max(cut.after) == upload.size_bytes
        assert cut.after[1] > 0, "what was received before the kill counts"
        again = client.datasets.upload(big_file)
        assert again.name == upload.name, "the same file finds its upload"


async def test_an_upload_by_asyncio_goes_on_too(
    tmp_path: pathlib.Path, big_file: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    house = house_factory(tmp_path / "home")
    await asyncio.to_thread(house.start, "datasets")
    async with aio.connect(home=house.home) as client:
        cut = Cut(house)
        upload = await client.datasets.upload(big_file, progress=cut)
        assert upload.complete and cut.after[1] > 0
        small = tmp_path / "small.jsonl"
        small.write_bytes(sample_rows(50))
        made = await client.datasets.create("small", [small], validation=0.1, seed=1)
        assert made.name == "datasets/small"
        assert [d.name async for d in client.datasets.list()] == ["datasets/small"]
        lines = [line async for line in client.datasets.export("small", format="instruction")]
        assert len(lines) == sum(made.stats.rows.values())
        with pytest.raises(errors.NotFound) as missing:
            await client.datasets.get("none")
        assert missing.value.resource == "datasets/none" and missing.value.reason == "NOT_FOUND"


def test_a_file_that_is_not_there_is_told_before_anything_is_sent(tmp_path: pathlib.Path) -> None:
    with qlorad.connect(home=tmp_path) as client, pytest.raises(errors.InvalidArgument, match="a readable file"):
        client.datasets.upload(tmp_path / "none.jsonl")


def test_every_page_of_a_list_is_read(tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House]) -> None:
    house = house_factory(tmp_path / "home")
    house.start("trainer")
    with qlorad.connect(home=house.home) as client:
        assert list(client.jobs.list()) == []
        assert {t.name for t in client.jobs.templates()} >= {"standard", "all-linear"}
        with pytest.raises(errors.InvalidArgument, match="accepted: queued"):
            list(client.jobs.list(states=["runing"]))


def test_tls_that_does_not_match_says_so(
    tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    ours, foreign = Authority(tmp_path / "ours"), Authority(tmp_path / "foreign")
    server, caller, stranger = ours.sign("server"), ours.sign("caller"), foreign.sign("stranger")
    house = house_factory(tmp_path / "home")
    flags = ("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(ours.cert))
    daemon = house.start("registry", *flags)
    address = "localhost:" + daemon.told["address"].rpartition(":")[2]

    def models(**how: str) -> list[str]:
        with qlorad.connect(registry=address, **how) as client:  # type: ignore[arg-type]
            return [m.name for m in client.models.list()]

    pair = {"cert": str(caller.cert), "key": str(caller.key)}
    assert models(ca=str(ours.cert), **pair) == []
    for wrong in (
        {},
        {"ca": str(ours.cert)},
        {"ca": str(foreign.cert), **pair},
        {"ca": str(ours.cert), "cert": str(stranger.cert), "key": str(stranger.key)},
    ):
        with pytest.raises(errors.Unavailable, match="TLS or certificate mismatch looks just the same"):
            models(**wrong)


async def test_a_job_by_asyncio_is_the_job_of_the_plain_client(cli: Cli) -> None:
    spec = trainer_pb2.TrainSpec(model="models/starter-test", dataset="datasets/sample")
    spec.schedule.max_steps = 4
    spec.data.max_length_tokens = 256
    async with aio.connect(home=cli.home) as client:
        if await client.inference.loaded_models():
            await client.inference.unload_model()
        checked = await client.jobs.create(spec, template="minimal-q", validate_only=True)
        assert checked.spec.train.lora.rank == 4
        request_id = "asyncio-one"
        job = await client.jobs.create(spec, template="minimal-q", request_id=request_id, labels={"who": "asyncio"})
        same = await client.jobs.create(spec, template="minimal-q", request_id=request_id, labels={"who": "asyncio"})
        assert same.name == job.name
        numbers = [event.sequence async for event in client.jobs.watch(job.name)]
        done = await client.jobs.wait(job.name)
        assert done.state == trainer_pb2.JOB_STATE_SUCCEEDED and done.labels["who"] == "asyncio"
        assert numbers == list(range(1, done.last_sequence + 1))
    with qlorad.connect(home=cli.home) as plain:
        assert plain.jobs.wait(job.name).result.adapter_digest == done.result.adapter_digest
        assert [e.sequence for e in plain.jobs.watch(job.name, after_sequence=3)] == numbers[3:]


def test_a_cancelled_job_that_is_waited_for_raises(cli: Cli) -> None:
    spec = trainer_pb2.TrainSpec(model="models/starter-test", dataset="datasets/sample")
    spec.schedule.max_steps = 5000
    spec.data.max_length_tokens = 256
    with qlorad.connect(home=cli.home) as client:
        job = client.jobs.create(spec)
        client.jobs.cancel(job.name)
        with pytest.raises(errors.JobFailed) as failed:
            client.jobs.wait(job.name)
        assert failed.value.job.state == trainer_pb2.JOB_STATE_CANCELLED
        assert client.jobs.wait(job.name, check=False).is_terminal


async def test_two_voices_answer_at_once(cli: Cli) -> None:
    async with aio.connect(home=cli.home) as client:
        await client.inference.load_model("starter-test")
        await client.inference.load_adapter("sample")
        base, tuned = await asyncio.gather(
            client.inference.answer(client.inference.chat("add numbers", adapter="base", max_tokens=6)),
            client.inference.answer(client.inference.chat("add numbers", adapter="sample", max_tokens=6)),
        )
        assert base.started.adapter_digest == "" and tuned.started.adapter_digest.startswith("sha256:")
        assert base.finish.completion_tokens <= 6 and tuned.text != base.text
        with pytest.raises(errors.InvalidArgument):
            await client.inference.answer(client.inference.chat([{"role": "user", "text": "x"}]))
        assert await client.inference.unload_model() > 0
