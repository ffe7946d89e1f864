"""Datasets: upload files, make datasets of them, read them back.

Made from aio/datasets.py by clients/python/unasync.py; change that file.
"""

# ruff: noqa: UP028

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, Unpack

from qlorad import errors
from qlorad._connection import new_request_id
from qlorad._wire import Wire, in_thread, read_file, sleep
from qlorad._wire_core import (
    CHUNK_BYTES,
    DEFAULT_PATIENCE_SECONDS,
    Patience,
    Progress,
    enum_value,
    filename_of,
    full_name,
    silent,
    stage,
    worth_repeating,
)
from qlorad.plans import Plan, Validation, request_of
from qlorad.v1 import datasets_pb2 as pb
from qlorad.v1 import messages_pb2
from qlorad.v1.datasets_pb2_grpc import DatasetServiceStub

File: TypeAlias = "str | os.PathLike[str] | pb.Upload"
"""A file to be sent, or what was sent."""


class Datasets:
    """DatasetService."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _stub(self) -> DatasetServiceStub:
        return DatasetServiceStub(self._wire.channel)

    def upload(
        self,
        path: str | os.PathLike[str],
        *,
        filename: str = "",
        progress: Progress = silent,
        request_id: str = "",
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    ) -> pb.Upload:
        """Sends a file and returns the complete upload.

        Goes on from where it was cut, in this call and in a later one: unless a
        request_id is given it is made of the file's name and content. `filename`
        is what findings call it, where that is not its own name: a path below a folder.
        """
        file = pathlib.Path(path)
        sha256, size = in_thread(lambda: _measure(file))
        told = filename or filename_of(file)
        request = pb.StartUploadRequest(
            request_id=request_id or "upload-" + hashlib.sha256(f"{told}\n{sha256}".encode()).hexdigest()[:40],
            filename=told,
            size_bytes=size,
            sha256=sha256,
        )
        patience = Patience(patience_seconds)
        while True:
            try:
                upload = (self._wire.call(self._stub.StartUpload, request)).upload
                patience.renew()
                progress(stage("upload", upload.committed_bytes, size))
                if upload.complete:
                    return upload
                pieces = _pieces(file, upload.name, upload.committed_bytes, size, progress)
                upload = (self._wire.send(self._stub.WriteUpload, pieces)).upload
                if upload.complete:
                    progress(stage("upload", size, size))
                    return upload
                raise errors.Unavailable("the upload ended early")
            except errors.QloradError as e:
                if not worth_repeating(e) and e.reason != "WRONG_OFFSET":
                    raise
                sleep(patience.wait(e))
                self._wire.look_again()

    def create(
        self,
        dataset: str,
        files: Sequence[File] = (),
        *,
        move_alias: bool = False,
        progress: Progress = silent,
        request_id: str = "",
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
        **plan: Unpack[Plan],
    ) -> pb.Dataset:
        """Makes the dataset `dataset` of files (uploaded first), of complete uploads, or of what the plan names."""
        request = request_of(**plan)
        request.request_id = request_id or new_request_id()
        request.dataset_id = dataset.removeprefix("datasets/")
        request.move_alias = move_alias
        request.uploads.extend(self._sent(files, progress))
        last = self._wire.work(lambda: self._stub.CreateDataset, request, progress, patience_seconds)
        return last.dataset

    def validate(
        self,
        files: Sequence[File] = (),
        *,
        min_severity: str | int = 0,
        progress: Progress = silent,
        **plan: Unpack[Plan],
    ) -> Iterator[pb.Finding | pb.ValidationReport]:
        """What `create` would find: every finding in order of file and line, then the report. Seals nothing."""
        request = pb.ValidateDatasetRequest(
            plan=request_of(**plan), min_severity=enum_value(pb.Severity, "SEVERITY_", "min_severity", min_severity)
        )
        request.plan.uploads.extend(self._sent(files, progress))
        for message in self._wire.stream(self._stub.ValidateDataset, request):
            kind = message.WhichOneof("update")
            if kind == "progress":
                progress(message.progress)
            elif kind == "report":
                yield message.report
            else:
                for finding in message.findings.findings:
                    yield finding

    def validation(
        self,
        files: Sequence[File] = (),
        *,
        min_severity: str | int = 0,
        progress: Progress = silent,
        **plan: Unpack[Plan],
    ) -> Validation:
        """As `validate`, with all findings held in memory."""
        found: list[pb.Finding] = []
        for told in self.validate(files, min_severity=min_severity, progress=progress, **plan):
            if isinstance(told, pb.ValidationReport):
                return Validation(told, tuple(found))
            found.append(told)
        raise errors.Unavailable("the validation ended without a report")

    def steps(self) -> Sequence[pb.StepKind]:
        """The steps that a plan may name, those of plug-ins too."""
        return (self._wire.call(self._stub.ListSteps, pb.ListStepsRequest())).steps

    def _sent(self, files: Sequence[File], progress: Progress) -> Sequence[str]:
        """Names of complete uploads."""
        names = []
        for file in files:
            sent = file if isinstance(file, pb.Upload) else self.upload(file, progress=progress)
            names.append(sent.name)
        return names

    def get(self, dataset: str) -> pb.Dataset:
        """One dataset by alias or digest."""
        request = pb.GetDatasetRequest(name=full_name("datasets", dataset))
        return (self._wire.call(self._stub.GetDataset, request)).dataset

    def list(self) -> Iterator[pb.Dataset]:
        """All datasets, newest first, page by page."""
        token = ""
        while True:
            page = self._wire.call(self._stub.ListDatasets, pb.ListDatasetsRequest(page_token=token))
            for dataset in page.datasets:
                yield dataset
            token = page.next_page_token
            if not token:
                return

    def delete(self, dataset: str, *, request_id: str = "") -> int:
        """Removes an alias, and the files once nothing holds them; returns the bytes freed."""
        request = pb.DeleteDatasetRequest(
            request_id=request_id or new_request_id(), name=full_name("datasets", dataset)
        )
        return (self._wire.call(self._stub.DeleteDataset, request)).freed_bytes

    def export(
        self,
        dataset: str,
        *,
        split: str = "",
        format: str | int = 0,
        max_rows: int = 0,
        on_loss: str | int = 0,
        summary: Callable[[pb.ExportSummary], None] | None = None,
    ) -> Iterator[bytes]:
        """The rows as JSONL, whole lines without their newline; `summary` is told at the end what was lost."""
        request = pb.ExportDatasetRequest(
            name=full_name("datasets", dataset),
            split=split,
            format=enum_value(pb.RowFormat, "ROW_FORMAT_", "format", format),
            max_rows=max_rows,
            on_loss=enum_value(pb.OnLoss, "ON_LOSS_", "on_loss", on_loss),
        )
        rest = b""
        for message in self._wire.stream(self._stub.ExportDataset, request):
            if summary is not None and message.HasField("summary"):
                summary(message.summary)
            *lines, rest = (rest + message.data).split(b"\n")
            for line in lines:
                yield line
        if rest:
            yield rest

    def findings(self, dataset: str, *, min_severity: str | int = 0) -> Iterator[pb.Finding]:
        """What validation saw, in order of file and line."""
        request = pb.ListFindingsRequest(
            name=full_name("datasets", dataset),
            min_severity=enum_value(pb.Severity, "SEVERITY_", "min_severity", min_severity),
        )
        for message in self._wire.stream(self._stub.ListFindings, request):
            for finding in message.findings:
                yield finding

    def ledger(
        self,
        dataset: str,
        model: str,
        *,
        max_length_tokens: int = 512,
        over_length: str | int = 0,
        prompt_format: str | int = 0,
        progress: Progress = silent,
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    ) -> pb.Ledger:
        """Seals, or finds, the training rows of a dataset for a model.

        `prompt_format` is how conversations become text, as in "chatml"; the
        model's own template otherwise.
        """
        request = pb.BuildLedgerRequest(
            dataset=full_name("datasets", dataset),
            model=full_name("models", model),
            max_length_tokens=max_length_tokens,
            over_length=enum_value(pb.OverLength, "OVER_LENGTH_", "over_length", over_length),
            prompt_format=enum_value(messages_pb2.PromptFormat, "PROMPT_FORMAT_", "prompt_format", prompt_format),
        )
        last = self._wire.work(lambda: self._stub.BuildLedger, request, progress, patience_seconds)
        return last.ledger

    def measure(
        self,
        dataset: str,
        model: str,
        *,
        prompt_format: str | int = 0,
        max_length_tokens: Sequence[int] = (),
        progress: Progress = silent,
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    ) -> pb.DatasetMeasure:
        """Counts a dataset's tokens for a model and forecasts what each maximal length would cut; seals nothing."""
        request = pb.MeasureDatasetRequest(
            dataset=full_name("datasets", dataset),
            model=full_name("models", model),
            prompt_format=enum_value(messages_pb2.PromptFormat, "PROMPT_FORMAT_", "prompt_format", prompt_format),
            max_length_tokens=max_length_tokens,
        )
        last = self._wire.work(lambda: self._stub.MeasureDataset, request, progress, patience_seconds)
        return last.measure

    def ledger_rows(
        self, ledger: str, *, split: str = "train", first_row: int = 0, max_rows: int = 0
    ) -> Iterator[pb.LedgerRow]:
        """Rows of a ledger, by its digest: text, ids, mask and cuts."""
        request = pb.ReadLedgerRequest(ledger=ledger, split=split, first_row=first_row, max_rows=max_rows)
        for message in self._wire.stream(self._stub.ReadLedger, request):
            for row in message.rows:
                yield row


def _measure(file: pathlib.Path) -> tuple[str, int]:
    """sha256 and size of a file."""
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as f:
            while data := f.read(CHUNK_BYTES):
                digest.update(data)
                size += len(data)
    except OSError as e:
        raise errors.invalid("path", str(file), f"a readable file ({e.strerror})") from None
    return digest.hexdigest(), size


def _pieces(
    file: pathlib.Path, upload: str, offset: int, size: int, progress: Progress
) -> Iterator[pb.WriteUploadRequest]:
    """The file from an offset; the first piece names upload and offset."""
    sent = offset
    yield pb.WriteUploadRequest(upload=upload, offset=offset)
    for data in read_file(file, offset):
        yield pb.WriteUploadRequest(data=data)
        sent += len(data)
        progress(stage("upload", sent, size))
