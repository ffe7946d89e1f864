"""The sealed ledger: a dataset as token ids and masks for one model and length.

Law of this room: what the trainer reads is what stands here, and what stands
here is what rows.py made. The same dataset, model rendering, length and policy
give the same bytes, so a ledger that was built is found, not built again.

    payload/ledger.json        what it was made of, and the counts
    payload/pieces.json        every id that occurs, as text
    payload/SPLIT.ids|mask|cut|text and SPLIT.*.at (see columns.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, datasets_pb2
from services.common import artifacts, facts
from services.common.errors import Violation, corrupt, disk_full, invalid, rejected
from services.common.prompt import example, rows
from services.common.prompt.columns import Array, Column, ColumnWriter
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.shards import ShardReader, splits_in
from services.common.shelf import Sealed, Shelf

BATCH_ROWS = 256
MAX_VIOLATIONS = 20
_ABOUT = "ledger.json"
_PIECES = "pieces.json"
_COLUMNS = ("ids", "mask", "cut", "text")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a ledger's bytes depend on."""

    dataset_digest: str
    tokenizer_digest: str
    template_digest: str
    renderer_digest: str
    """Tokenizer, template, special tokens and date: see Renderer.digest."""
    max_length_tokens: int
    over_length: str


def build(
    shelf: Shelf,
    dataset: Sealed,
    model: Sealed,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
    progress: Progress,
) -> Sealed:
    """Seals the ledger of a dataset for a model, or finds it ready and verifies it.

    Blocking; memory does not grow with rows. INVALID_ARGUMENT with the first
    20 rows that are too long or train nothing; REJECTED naming file, line and
    turn where the template cannot be used; RESOURCE_EXHAUSTED where the disk is
    full; DATA_LOSS where the ready one is damaged. On failure nothing is
    visible. Does not verify dataset and model: whoever opens them does.
    """
    told = facts.from_manifest(facts.ModelFacts, model.manifest)
    policy = over_length or datasets_pb2.OVER_LENGTH_ERROR
    _check(max_length_tokens, policy, told.context_tokens)
    renderer = Renderer.open(model.payload, told.template_date)
    recipe = Recipe(
        dataset.digest,
        renderer.tokenizer_digest,
        renderer.template_digest,
        renderer.digest,
        max_length_tokens,
        datasets_pb2.OverLength.Name(policy),
    )
    ready = find(shelf, recipe)
    if ready is not None:
        artifacts.verify_payload(ready.manifest, ready.payload)
        return ready
    staged = shelf.stage()
    try:
        with _space():
            build_ = _Build(renderer, Tokenizer.open(model.payload), max_length_tokens, policy, staged.payload)
            splits = build_.run(dataset.payload, progress)
            _write_json(staged.payload / _ABOUT, {**dataclasses.asdict(recipe), "splits": splits})
        progress("seal", 0, 0)
        about = facts.LedgerFacts(
            recipe.dataset_digest,
            recipe.tokenizer_digest,
            recipe.template_digest,
            max_length_tokens,
            recipe.over_length,
            tuple(splits),
        )
        return shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_LEDGER, facts.to_facts(about))
    finally:
        shelf.drop(staged)


def find(shelf: Shelf, recipe: Recipe) -> Sealed | None:
    """The ledger of a recipe, if it was built."""
    wanted = dataclasses.asdict(recipe)
    for sealed in shelf.every(artifacts_pb2.ARTIFACT_KIND_LEDGER):
        told = facts.from_manifest(facts.LedgerFacts, sealed.manifest)
        if told.dataset_digest != recipe.dataset_digest or told.max_length_tokens != recipe.max_length_tokens:
            continue
        about = json.loads((sealed.payload / _ABOUT).read_bytes())
        if {k: about.get(k) for k in wanted} == wanted:
            return sealed
    return None


def _check(max_length_tokens: int, policy: int, context_tokens: int) -> None:
    wrong = []
    if not 1 <= max_length_tokens <= context_tokens:
        wrong.append(
            Violation("max_length_tokens", str(max_length_tokens), f"1 to {context_tokens}, the model's context")
        )
    if policy not in datasets_pb2.OverLength.values():
        wrong.append(Violation("over_length", str(policy), ", ".join(datasets_pb2.OverLength.keys()[1:])))
    if wrong:
        raise invalid(wrong)


class _Build:
    """One run over a dataset."""

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: Tokenizer,
        max_length_tokens: int,
        policy: datasets_pb2.OverLength.ValueType,
        out: pathlib.Path,
    ) -> None:
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._limit = max_length_tokens
        self._policy = policy
        self._out = out
        self._wrong: list[Violation] = []
        self._ids: set[int] = set()

    def run(self, dataset: pathlib.Path, progress: Progress) -> list[dict[str, Any]]:
        """Writes every split and the pieces; returns the counts."""
        readers = {split: ShardReader(dataset, split) for split in splits_in(dataset)}
        total, done = sum(map(len, readers.values())), 0
        counts = []
        for split, reader in readers.items():
            count = datasets_pb2.LedgerSplit(split=split)
            with contextlib.ExitStack() as stack:
                writers = {n: stack.enter_context(ColumnWriter(self._out, split, n)) for n in _COLUMNS}
                for lines in _batches(reader):
                    for row in self._rows(lines):
                        _count(count, row)
                        self._write(writers, row)
                    done += len(lines)
                    progress("render", done, total)
            counts.append(_plain(count))
        if self._wrong:
            raise invalid(self._wrong)
        known = sorted(self._ids)
        _write_json(self._out / _PIECES, dict(zip(map(str, known), self._tokenizer.pieces(known), strict=True)))
        return counts

    def _rows(self, lines: list[bytes]) -> Iterator[rows.Row]:
        drafted = []
        for line in lines:
            origin, draft = self._draft(line)
            if draft is not None:
                drafted.append((origin, draft))
        encoded = self._tokenizer.encode_batch([draft.text for _, draft in drafted])
        for (origin, draft), tokens in zip(drafted, encoded, strict=True):
            try:
                yield rows.finish_row(draft, tokens, self._tokenizer, self._limit, self._policy)
            except rows.RowError as e:
                self._note(origin, e)

    def _draft(self, line: bytes) -> tuple[str, rows.Draft | None]:
        try:
            told = example.loads(line)
        except example.ExampleError as e:
            raise corrupt("dataset", str(e)) from None
        origin = f"{told.origin.file}:{told.origin.line}"
        try:
            return origin, rows.draft_row(told, self._renderer)
        except rows.RowError as e:
            self._note(origin, e)
            return origin, None

    def _note(self, origin: str, error: rows.RowError) -> None:
        """Keeps what a person can mend row by row; raises what the model cannot do, and when it is enough."""
        if error.rule == rows.OVER_LENGTH:
            accepted = f"at most {self._limit} tokens, or over_length TRUNCATE or DROP"
            self._wrong.append(Violation(origin, f"{error.length_tokens} tokens", accepted))
        elif error.rule in (rows.NOTHING_TRAINED, rows.BAD_EXAMPLE):
            self._wrong.append(Violation(origin, str(error), "a row with at least one trained token within the limit"))
        else:
            raise rejected(origin, str(error))
        if len(self._wrong) >= MAX_VIOLATIONS:
            raise invalid(self._wrong)

    def _write(self, writers: dict[str, ColumnWriter], row: rows.Row) -> None:
        if row.dropped:
            return
        self._ids.update(row.ids)
        self._ids.update(row.cut_ids)
        writers["ids"].add(row.ids)
        writers["mask"].add(row.mask)
        writers["cut"].add(row.cut_ids)
        writers["text"].add(row.text.encode())


def _count(count: datasets_pb2.LedgerSplit, row: rows.Row) -> None:
    count.longest_tokens = max(count.longest_tokens, row.length_tokens)
    if row.dropped:
        count.dropped_rows += 1
        return
    count.rows += 1
    count.tokens += len(row.ids)
    count.trained_tokens += row.trained_tokens
    count.truncated_rows += bool(row.cut_ids)
    count.cut_tokens += len(row.cut_ids)


def _plain(count: datasets_pb2.LedgerSplit) -> dict[str, Any]:
    return {f.name: getattr(count, f.name) for f in count.DESCRIPTOR.fields}


def _batches(reader: ShardReader) -> Iterator[list[bytes]]:
    lines = iter(reader)
    while batch := list(itertools.islice(lines, BATCH_ROWS)):
        yield batch


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True, indent=0), encoding="utf-8")


@contextlib.contextmanager
def _space() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full("building a ledger") from None
        raise


class LedgerSplitReader:
    """One split. Arrays are views of mapped files: read them, do not write them."""

    def __init__(self, payload: pathlib.Path, split: str, pieces: Callable[[], dict[str, str]]) -> None:
        self.name = split
        self._columns = {name: Column(payload, split, name) for name in _COLUMNS}
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._columns["ids"])

    def ids(self, row: int) -> Array:
        """Kept token ids, uint32."""
        return self._columns["ids"][row]

    def mask(self, row: int) -> Array:
        """One uint8 for each kept id: 1 carries loss."""
        return self._columns["mask"][row]

    def cut_ids(self, row: int) -> Array:
        """Ids that were cut, uint32."""
        return self._columns["cut"][row]

    def lengths(self) -> Array:
        """Number of kept ids of every row, int64."""
        return self._columns["ids"].lengths()

    def row(self, row: int) -> datasets_pb2.LedgerRow:
        """Everything about one row."""
        ids, pieces = self.ids(row).tolist(), self._pieces()
        return datasets_pb2.LedgerRow(
            row=row,
            text=self._columns["text"][row].tobytes().decode(),
            ids=ids,
            trained=[bool(m) for m in self.mask(row)],
            cut_ids=self.cut_ids(row).tolist(),
            pieces=[pieces[str(i)] for i in ids],
        )


class LedgerReader:
    """A sealed ledger, mapped. Does not verify its bytes: the shelf does, on open."""

    def __init__(self, sealed: Sealed) -> None:
        self._sealed = sealed
        self._facts = facts.from_manifest(facts.LedgerFacts, sealed.manifest)
        self._known: dict[str, str] | None = None
        self._open: dict[str, LedgerSplitReader] = {}

    @classmethod
    def open(cls, sealed: Sealed) -> LedgerReader:
        """A reader; DATA_LOSS where the artifact is no ledger."""
        if sealed.manifest.kind != artifacts_pb2.ARTIFACT_KIND_LEDGER:
            raise corrupt(sealed.digest, "is not a ledger")
        return cls(sealed)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(str(s["split"]) for s in self._facts.splits)

    def split(self, name: str) -> LedgerSplitReader:
        """One split; INVALID_ARGUMENT naming those there are."""
        if name not in self.splits:
            raise invalid([Violation("split", repr(name), ", ".join(self.splits))])
        if name not in self._open:
            self._open[name] = LedgerSplitReader(self._sealed.payload, name, self._pieces)
        return self._open[name]

    def proto(self) -> datasets_pb2.Ledger:
        """The ledger as the contract tells it."""
        told = self._facts
        splits = [json_format.ParseDict(dict(s), datasets_pb2.LedgerSplit()) for s in told.splits]
        return datasets_pb2.Ledger(
            digest=self._sealed.digest,
            dataset_digest=told.dataset_digest,
            tokenizer_digest=told.tokenizer_digest,
            template_digest=told.template_digest,
            max_length_tokens=told.max_length_tokens,
            over_length=datasets_pb2.OverLength.Value(told.over_length),
            splits=splits,
        )

    def _pieces(self) -> dict[str, str]:
        if self._known is None:
            self._known = json.loads((self._sealed.payload / _PIECES).read_bytes())
        return self._known
