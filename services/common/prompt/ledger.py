"""The sealed ledger: a dataset as token ids and masks for one model and length.

Law of this room: what the trainer reads is what stands here, and what stands
here is what rows.py made. The same dataset, model rendering, length and policy
give the same bytes, so a ledger that was built is found, not built again.

    payload/ledger.json        what it was made of, the counts, the files, a number for the rows of each split
    payload/pieces.json        every id that occurs, as text
    payload/SPLIT.ids|mask|cut|text and SPLIT.*.at, SPLIT.place (see columns.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, datasets_pb2
from services.common import artifacts, facts
from services.common.errors import Violation, corrupt, disk_full, invalid
from services.common.prompt import formats, tally
from services.common.prompt.columns import Array, Column, places
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.prompt.writing import COLUMNS, Build, Progress
from services.common.shelf import Sealed, Shelf

FORMAT = 2
_ABOUT = "ledger.json"
_PIECES = "pieces.json"


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
    prompt_format: str
    format: int = FORMAT
    """Of the ledger's files."""


def build(
    shelf: Shelf,
    dataset: Sealed,
    model: Sealed,
    max_length_tokens: int,
    over_length: datasets_pb2.OverLength.ValueType,
    progress: Progress,
    prompt_format: formats.Format = formats.OWN,
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
    renderer = Renderer.open(model.payload, told.template_date, prompt_format)
    recipe = Recipe(
        dataset.digest,
        renderer.tokenizer_digest,
        renderer.template_digest,
        renderer.digest,
        max_length_tokens,
        datasets_pb2.OverLength.Name(policy),
        formats.name_of(prompt_format),
    )
    ready = find(shelf, recipe)
    if ready is not None:
        artifacts.verify_payload(ready.manifest, ready.payload)
        return ready
    staged = shelf.stage()
    try:
        with _space():
            build_ = Build(renderer, Tokenizer.open(model.payload), max_length_tokens, policy, staged.payload)
            made = build_.run(dataset.payload, progress)
            about = {
                **dataclasses.asdict(recipe),
                "splits": made.splits,
                "files": made.files,
                "rows_numbers": made.rows_numbers,
            }
            _write_json(staged.payload / _ABOUT, about)
            _write_json(staged.payload / _PIECES, made.pieces)
        progress("seal", 0, 0)
        known = facts.LedgerFacts(
            recipe.dataset_digest,
            recipe.tokenizer_digest,
            recipe.template_digest,
            max_length_tokens,
            recipe.over_length,
            tuple(made.splits),
            recipe.prompt_format,
        )
        return shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_LEDGER, facts.to_facts(known))
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
    least = 2 if policy == datasets_pb2.OVER_LENGTH_SPLIT else 1  # windows share a token
    if not least <= max_length_tokens <= context_tokens:
        wrong.append(
            Violation("max_length_tokens", str(max_length_tokens), f"{least} to {context_tokens}, the model's context")
        )
    if policy not in datasets_pb2.OverLength.values():
        wrong.append(Violation("over_length", str(policy), ", ".join(datasets_pb2.OverLength.keys()[1:])))
    if wrong:
        raise invalid(wrong)


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

    def __init__(
        self,
        payload: pathlib.Path,
        split: str,
        about: Callable[[], dict[str, Any]],
        pieces: Callable[[], dict[str, str]],
    ) -> None:
        self.name = split
        self._columns = {name: Column(payload, split, name) for name in COLUMNS}
        self._places = places(payload, split)
        self._about = about
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

    def rows_number(self) -> int:
        """One number for all rows: see tally.py. Older ledgers do not tell it, so theirs is counted."""
        told = self._about().get("rows_numbers")
        if told is not None:
            return tally.number_of(told[self.name])
        number = 0
        for row in range(len(self)):
            number = tally.plus(number, tally.row_number(self.ids(row), self.mask(row).tobytes()))
        return number

    def row(self, row: int) -> datasets_pb2.LedgerRow:
        """Everything about one row."""
        ids, cut, pieces = self.ids(row).tolist(), self.cut_ids(row).tolist(), self._pieces()
        source_row, piece, origin = row, 0, None
        if self._places is not None:
            source_row, line, file, piece = self._places[row].tolist()
            origin = datasets_pb2.Origin(file=self._about()["files"][file], line=line)
        return datasets_pb2.LedgerRow(
            origin=origin,
            source_row=source_row,
            piece=piece,
            row=row,
            text=self._columns["text"][row].tobytes().decode(),
            ids=ids,
            trained=[bool(m) for m in self.mask(row)],
            cut_ids=cut,
            pieces=[pieces[str(i)] for i in ids],
            cut_pieces=[pieces[str(i)] for i in cut],
        )


class LedgerReader:
    """A sealed ledger, mapped. Does not verify its bytes: the shelf does, on open."""

    def __init__(self, sealed: Sealed) -> None:
        self._sealed = sealed
        self._facts = facts.from_manifest(facts.LedgerFacts, sealed.manifest)
        self._told: dict[str, Any] | None = None
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
            self._open[name] = LedgerSplitReader(self._sealed.payload, name, self._about, self._pieces)
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
            prompt_format=formats.by_name(told.prompt_format),
        )

    def _about(self) -> dict[str, Any]:
        if self._told is None:
            self._told = json.loads((self._sealed.payload / _ABOUT).read_bytes())
        return self._told

    def _pieces(self) -> dict[str, str]:
        if self._known is None:
            self._known = json.loads((self._sealed.payload / _PIECES).read_bytes())
        return self._known
