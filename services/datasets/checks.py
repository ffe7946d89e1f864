"""Whether a request is well formed: every violation at once.

Law of this room: pure. Whether the named things exist is asked elsewhere.
"""

from __future__ import annotations

import math
import re

from qlorad.v1 import datasets_pb2, messages_pb2
from services.common.errors import Violation, invalid, show
from services.common.names import check_id, check_name, check_request_id
from services.datasets import documents
from services.datasets.forms import FIELDS, FORMS, NAMES, PAPER
from services.datasets.repairs import REPAIRS
from services.datasets.source_checks import check_chroma, check_folder, check_hub, check_web

PIECE_BYTES = 1 << 20
MAX_LENGTH_TOKENS = 1 << 20
MAX_UPLOADS = 1000
MAX_FORECASTS = 100
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
MAX_STEPS = 64
_STRATA = re.compile(r"(|form|language|source|metadata\..+)", re.DOTALL)
SPLITS = ("train", "validation", "test")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UPLOAD = re.compile(r"uploads/[0-9a-f]{32}")
_UPLOAD_RULE = "'uploads/ID' as StartUpload gave it"


def start_upload(request: datasets_pb2.StartUploadRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_request_id(request.request_id)
    name = request.filename
    if not 1 <= len(name) <= 255 or "\\" in name or any(ord(c) < 32 for c in name) or not _is_below(name):
        accepted = "1 to 255 characters without '\\' or control characters: a name, or a path of names without '..'"
        wrong.append(Violation("filename", show(name), accepted))
    elif not name.lower().removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES) and not documents.kind_of(name):
        accepted = f"a name that ends in {', '.join(SUFFIXES)}, or in one of them and .gz or .zst; or in "
        wrong.append(Violation("filename", show(name), accepted + ", ".join(documents.SUFFIXES)))
    if request.size_bytes < 1:
        wrong.append(Violation("size_bytes", show(request.size_bytes), "the file's exact size, at least 1"))
    if not _SHA256.fullmatch(request.sha256):
        wrong.append(Violation("sha256", show(request.sha256), "64 lower-case hex digits"))
    if wrong:
        raise invalid(wrong)


def _is_below(path: str) -> bool:
    """Whether a path, if it were one, would stay where it begins."""
    return all(part.strip() not in ("", ".", "..") for part in path.split("/"))


def upload_id(field: str, name: str) -> str:
    """The id inside "uploads/{id}", or INVALID_ARGUMENT."""
    if not _UPLOAD.fullmatch(name):
        raise invalid([Violation(field, show(name), _UPLOAD_RULE)])
    return name.removeprefix("uploads/")


def create_dataset(request: datasets_pb2.CreateDatasetRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_request_id(request.request_id) + check_id("dataset_id", request.dataset_id)
    wrong += plan("", request)
    if wrong:
        raise invalid(wrong)


def validate_dataset(request: datasets_pb2.ValidateDatasetRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = plan("plan.", request.plan)
    if request.min_severity not in datasets_pb2.Severity.values():
        wrong.append(Violation("min_severity", show(request.min_severity), "a value of Severity"))
    if wrong:
        raise invalid(wrong)


def plan(path: str, request: datasets_pb2.CreateDatasetRequest) -> list[Violation]:
    """Every violation of what is to be made, but for its name."""
    wrong = _sources(request)
    if request.format not in NAMES:
        wrong.append(Violation("format", show(request.format), "a value of RowFormat"))
    if request.on_row_error not in datasets_pb2.OnRowError.values():
        wrong.append(Violation("on_row_error", show(request.on_row_error), "a value of OnRowError"))
    if request.near_duplicates not in datasets_pb2.NearDuplicates.values():
        wrong.append(Violation("near_duplicates", show(request.near_duplicates), "a value of NearDuplicates"))
    if request.HasField("near_duplicate_similarity") and not 0.5 <= request.near_duplicate_similarity <= 1:
        wrong.append(Violation("near_duplicate_similarity", show(request.near_duplicate_similarity), "0.5 to 1"))
    if request.HasField("min_score"):
        wrong += _min_score(request)
    if len(request.steps) > MAX_STEPS:
        wrong.append(Violation("steps", f"{len(request.steps)} steps", f"at most {MAX_STEPS}"))
    wrong += _split(request.split) + _columns(request) + _repairs(request)
    return [Violation(path + v.field, v.given, v.accepted) for v in wrong]


def _sources(request: datasets_pb2.CreateDatasetRequest) -> list[Violation]:
    named = [name for name in ("uploads", "parents") if getattr(request, name)]
    named += [name for name in ("hub", "folder", "web", "chroma") if request.HasField(name)]
    if len(named) != 1:
        accepted = "exactly one of uploads, hub, folder, web, chroma and parents"
        return [Violation("uploads", " and ".join(named) or "no source", accepted)]
    wrong = []
    if len(request.uploads) > MAX_UPLOADS:
        wrong.append(Violation("uploads", f"{len(request.uploads)} uploads", f"1 to {MAX_UPLOADS} complete uploads"))
    if len(request.parents) > MAX_UPLOADS:
        wrong.append(Violation("parents", f"{len(request.parents)} parents", f"1 to {MAX_UPLOADS} datasets"))
    for i, name in enumerate(request.parents):
        wrong += check_name(f"parents[{i}]", name, "datasets")
    if request.HasField("hub"):
        wrong += check_hub(request.hub)
    if request.HasField("folder"):
        wrong += check_folder(request.folder, ())
    if request.HasField("web"):
        wrong += check_web(request.web)
    if request.HasField("chroma"):
        wrong += check_chroma(request.chroma)
    for i, name in enumerate(request.uploads):
        if not _UPLOAD.fullmatch(name):
            wrong.append(Violation(f"uploads[{i}]", show(name), _UPLOAD_RULE))
        elif name in request.uploads[:i]:
            wrong.append(Violation(f"uploads[{i}]", show(name), "each upload once"))
    return wrong


def _min_score(request: datasets_pb2.CreateDatasetRequest) -> list[Violation]:
    if not math.isfinite(request.min_score):
        return [Violation("min_score", show(request.min_score), "a number")]
    if request.format not in (datasets_pb2.ROW_FORMAT_UNSPECIFIED, PAPER):
        return [Violation("min_score", show(request.min_score), f"papers alone, not the {NAMES[request.format]} form")]
    if request.parents:
        return [Violation("min_score", show(request.min_score), "papers alone; a dataset's rows are papers no more")]
    return []


def _repairs(request: datasets_pb2.CreateDatasetRequest) -> list[Violation]:
    known = ("all", *REPAIRS)
    return [
        Violation(f"repairs[{i}]", show(name), f"one of {', '.join(known)}")
        for i, name in enumerate(request.repairs)
        if name not in known
    ]


def _split(split: datasets_pb2.Split) -> list[Violation]:
    wrong = []
    fractions = (("validation_fraction", split.validation_fraction), ("test_fraction", split.test_fraction))
    for name, value in fractions:
        if not (math.isfinite(value) and 0 <= value < 1):
            wrong.append(Violation(f"split.{name}", show(value), "0 to below 1"))
    if not wrong and split.validation_fraction + split.test_fraction >= 1:
        given = f"{split.validation_fraction} and {split.test_fraction}"
        wrong.append(Violation("split", given, "fractions that together are below 1"))
    if not _STRATA.fullmatch(split.stratify_by):
        accepted = "'form', 'language', 'source', 'metadata.KEY', or empty"
        wrong.append(Violation("split.stratify_by", show(split.stratify_by), accepted))
    if split.keep_source and (split.validation_fraction or split.test_fraction or split.stratify_by):
        accepted = "keep_source alone, or fractions"
        wrong.append(Violation("split.keep_source", "true beside fractions or stratify_by", accepted))
    return wrong


def _columns(request: datasets_pb2.CreateDatasetRequest) -> list[Violation]:
    wrong = []
    known = FIELDS.get(request.format) or tuple(dict.fromkeys(f for fields in FIELDS.values() for f in fields))
    for name, column in request.columns.items():
        if name not in known:
            wrong.append(Violation(f"columns[{show(name)}]", show(name), f"one of {', '.join(known)}"))
        if not column:
            wrong.append(Violation(f"columns[{show(name)}]", show(column), "the name of a column"))
    taken = list(request.columns.values())
    if len(set(taken)) != len(taken):
        wrong.append(Violation("columns", show(taken), "each column once"))
    return wrong


def delete_dataset(request: datasets_pb2.DeleteDatasetRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_request_id(request.request_id) + check_name("name", request.name, "datasets")
    if wrong:
        raise invalid(wrong)


def export_dataset(request: datasets_pb2.ExportDatasetRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_name("name", request.name, "datasets")
    if request.split and request.split not in SPLITS:
        wrong.append(Violation("split", show(request.split), "train, validation, test, or empty for all"))
    if request.format and request.format not in FORMS:
        accepted = f"a form that is written: {', '.join(NAMES[form] for form in FORMS)}"
        wrong.append(Violation("format", show(NAMES.get(request.format, request.format)), accepted))
    if request.max_rows < 0:
        wrong.append(Violation("max_rows", show(request.max_rows), "0 (= all) or more"))
    if request.on_loss not in datasets_pb2.OnLoss.values():
        wrong.append(Violation("on_loss", show(request.on_loss), "a value of OnLoss"))
    if wrong:
        raise invalid(wrong)


def list_findings(request: datasets_pb2.ListFindingsRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_name("name", request.name, "datasets")
    if request.min_severity not in datasets_pb2.Severity.values():
        wrong.append(Violation("min_severity", show(request.min_severity), "a value of Severity"))
    if wrong:
        raise invalid(wrong)


def build_ledger(request: datasets_pb2.BuildLedgerRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_name("dataset", request.dataset, "datasets") + check_name("model", request.model, "models")
    if not 1 <= request.max_length_tokens <= MAX_LENGTH_TOKENS:
        wrong.append(Violation("max_length_tokens", show(request.max_length_tokens), f"1 to {MAX_LENGTH_TOKENS}"))
    if request.over_length not in datasets_pb2.OverLength.values():
        wrong.append(Violation("over_length", show(request.over_length), "a value of OverLength"))
    wrong += _prompt_format(request.prompt_format)
    if wrong:
        raise invalid(wrong)


def measure_dataset(request: datasets_pb2.MeasureDatasetRequest) -> None:
    """INVALID_ARGUMENT with every violation."""
    wrong = check_name("dataset", request.dataset, "datasets") + check_name("model", request.model, "models")
    wrong += _prompt_format(request.prompt_format)
    if len(request.max_length_tokens) > MAX_FORECASTS:
        given = f"{len(request.max_length_tokens)} lengths"
        wrong.append(Violation("max_length_tokens", given, f"at most {MAX_FORECASTS}"))
    for i, length in enumerate(request.max_length_tokens):
        if not 1 <= length <= MAX_LENGTH_TOKENS:
            wrong.append(Violation(f"max_length_tokens[{i}]", show(length), f"1 to {MAX_LENGTH_TOKENS}"))
    if wrong:
        raise invalid(wrong)


def _prompt_format(value: int) -> list[Violation]:
    if value in messages_pb2.PromptFormat.values():
        return []
    return [Violation("prompt_format", show(value), "a value of PromptFormat")]


def read_ledger(request: datasets_pb2.ReadLedgerRequest) -> None:
    """INVALID_ARGUMENT with every violation. `ledger` is a digest, with or without "ledgers/" or "datasets/"."""
    wrong = []
    if not re.fullmatch(r"sha256:[0-9a-f]{8,64}", request.ledger):
        wrong.append(Violation("ledger", show(request.ledger), "the ledger's digest, 'sha256:HEX'"))
    if request.split not in SPLITS:
        wrong.append(Violation("split", show(request.split), ", ".join(SPLITS)))
    if request.first_row < 0:
        wrong.append(Violation("first_row", show(request.first_row), "0 or more"))
    if request.max_rows < 0:
        wrong.append(Violation("max_rows", show(request.max_rows), "0 (= all) or more"))
    if wrong:
        raise invalid(wrong)
