"""The ledger: it holds exactly the rows that rows.py makes, the same bytes each time, and says what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlorad.v1 import artifacts_pb2, datasets_pb2, errors_pb2
from services.common import artifacts, facts
from services.common.errors import Fault
from services.common.prompt import formats, ledger, tally
from services.common.prompt.ledger import LedgerReader
from services.common.prompt.render import Renderer
from services.common.prompt.rows import RowError, make_row
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Sealed, Shelf
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, chat, completion, seal_dataset, seal_model

ERROR, TRUNCATE, DROP, SPLIT = (
    datasets_pb2.OVER_LENGTH_ERROR,
    datasets_pb2.OVER_LENGTH_TRUNCATE,
    datasets_pb2.OVER_LENGTH_DROP,
    datasets_pb2.OVER_LENGTH_SPLIT,
)


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def shelf(tmp_path: pathlib.Path) -> Shelf:
    return Shelf(tmp_path / "store")


@pytest.fixture
def model(shelf: Shelf) -> Sealed:
    return seal_model(shelf, shapes.CHATML_MARKED.source)


def some_rows(count: int, first: int = 1) -> list[datasets_pb2.Example]:
    return [
        chat(("user", f"வணக்கம் {n}?"), ("assistant", "x" * (n % 7 + 1)), line=n)
        if n % 2
        else completion(f"def f{n}", "():\n  pass", line=n)
        for n in range(first, first + count)
    ]


def fault_of(*arguments: object) -> Fault:
    with pytest.raises(Fault) as caught:
        ledger.build(*arguments)  # type: ignore[arg-type]
    return caught.value


def test_holds_every_row_as_rows_makes_it(shelf: Shelf, model: Sealed) -> None:
    examples = {"train": some_rows(600), "validation": some_rows(30, 1000)}
    told: list[tuple[str, int, int]] = []
    sealed = ledger.build(shelf, seal_dataset(shelf, examples), model, 64, TRUNCATE, lambda *p: told.append(p))
    assert sealed.manifest.kind == artifacts_pb2.ARTIFACT_KIND_LEDGER
    artifacts.verify_payload(sealed.manifest, sealed.payload)
    reader = LedgerReader.open(sealed)
    renderer, tokenizer = Renderer.open(model.payload, DATE), Tokenizer.open(model.payload)
    assert reader.splits == ("train", "validation")
    for split, rows in examples.items():
        read = reader.split(split)
        assert len(read) == len(rows)
        assert list(read.lengths()) == [len(read.ids(n)) for n in range(len(read))]
        for n, example in enumerate(rows):
            made = make_row(example, renderer, tokenizer, 64, TRUNCATE)
            assert read.ids(n).dtype == np.uint32 and read.mask(n).dtype == np.uint8
            assert tuple(read.ids(n)) == made.ids and read.mask(n).tobytes() == made.mask
            row = read.row(n)
            assert (row.row, row.text, tuple(row.ids), tuple(row.cut_ids)) == (n, made.text, made.ids, made.cut_ids)
            assert bytes(row.trained) == made.mask
            assert list(row.pieces) == tokenizer.pieces(made.ids)
    assert told[-1][0] == "seal" and ("render", 630, 630) in told
    assert [p[1] for p in told if p[0] == "render"] == sorted(p[1] for p in told if p[0] == "render")
    with pytest.raises(IndexError):
        reader.split("train").ids(600)
    with pytest.raises(Fault, match="accepted: train, validation"):
        reader.split("test")


def test_counts_and_proto(shelf: Shelf, model: Sealed) -> None:
    long = completion("q", "word " * 30, line=9)
    short = completion("q", "a", line=1)
    dataset = seal_dataset(shelf, {"train": [short, long, short], "test": [long]})
    whole = LedgerReader.open(ledger.build(shelf, dataset, model, 500, ERROR, quiet)).proto()
    cut = LedgerReader.open(ledger.build(shelf, dataset, model, 10, TRUNCATE, quiet)).proto()
    gone_sealed = ledger.build(shelf, dataset, model, 10, DROP, quiet)
    gone = LedgerReader.open(gone_sealed).proto()
    longest = whole.splits[0].longest_tokens
    assert whole.splits[0].rows == 3 and whole.splits[0].cut_tokens == 0 and longest > 10
    assert whole.splits[0].tokens == whole.splits[0].trained_tokens + 3
    assert (cut.splits[0].truncated_rows, cut.splits[0].cut_tokens) == (1, longest - 10)
    assert cut.splits[0].tokens == whole.splits[0].tokens - (longest - 10)
    assert (gone.splits[0].rows, gone.splits[0].dropped_rows, gone.splits[0].longest_tokens) == (2, 1, longest)
    assert (gone.splits[1].split, gone.splits[1].rows, gone.splits[1].dropped_rows) == ("test", 0, 1)
    assert len(LedgerReader.open(gone_sealed).split("test")) == 0
    assert gone.digest == gone_sealed.digest and gone.dataset_digest == dataset.digest
    assert (gone.max_length_tokens, gone.over_length) == (10, DROP)
    told = facts.from_manifest(facts.ModelFacts, model.manifest)
    assert (gone.tokenizer_digest, gone.template_digest) == (told.tokenizer_digest, told.template_digest)


def test_the_same_inputs_give_the_same_digest_and_are_found(
    shelf: Shelf, model: Sealed, tmp_path: pathlib.Path
) -> None:
    dataset = seal_dataset(shelf, {"train": some_rows(20)})
    first = ledger.build(shelf, dataset, model, 100, ERROR, quiet)
    told: list[object] = []
    again = ledger.build(shelf, dataset, model, 100, datasets_pb2.OVER_LENGTH_UNSPECIFIED, lambda *p: told.append(p))
    assert again.digest == first.digest and told == [], "found, not built"
    elsewhere = Shelf(tmp_path / "elsewhere")
    far = ledger.build(
        elsewhere,
        seal_dataset(elsewhere, {"train": some_rows(20)}),
        seal_model(elsewhere, shapes.CHATML_MARKED.source),
        100,
        ERROR,
        quiet,
    )
    assert far.digest == first.digest


def test_a_damaged_ledger_is_not_handed_out(shelf: Shelf, model: Sealed) -> None:
    dataset = seal_dataset(shelf, {"train": some_rows(20)})
    sealed = ledger.build(shelf, dataset, model, 100, ERROR, quiet)
    with (sealed.payload / "train.mask").open("r+b") as f:
        f.write(b"\x01")
    fault = fault_of(shelf, dataset, model, 100, ERROR, quiet)
    assert fault.reason == errors_pb2.REASON_CORRUPT and "train.mask" in fault.message


def test_whatever_the_rows_depend_on_makes_another_ledger(shelf: Shelf, model: Sealed) -> None:
    dataset = seal_dataset(shelf, {"train": some_rows(20)})
    others = [
        (dataset, model, 100, ERROR),
        (dataset, model, 101, ERROR),
        (dataset, model, 100, TRUNCATE),
        (dataset, model, 100, SPLIT),
        (seal_dataset(shelf, {"train": some_rows(21)}), model, 100, ERROR),
        (dataset, seal_model(shelf, shapes.QWEN.source), 100, ERROR),
        (dataset, seal_model(shelf, shapes.CHATML_MARKED.source, bos_token="<pad>"), 100, ERROR),
        (dataset, seal_model(shelf, shapes.CHATML_MARKED.source, eos_token="<|end|>"), 100, ERROR),
    ]
    digests = {ledger.build(shelf, d, m, n, p, quiet).digest for d, m, n, p in others}
    assert len(digests) == len(others)


def test_a_prompt_format_makes_another_ledger_and_is_told(shelf: Shelf, model: Sealed) -> None:
    dataset = seal_dataset(shelf, {"train": [r for r in some_rows(20) if r.HasField("chat")]})
    told = set()
    for prompt_format in (formats.OWN, *formats.FILES):
        reader = LedgerReader.open(ledger.build(shelf, dataset, model, 200, ERROR, quiet, prompt_format))
        made = reader.proto()
        assert made.prompt_format == prompt_format
        own = facts.from_manifest(facts.ModelFacts, model.manifest).template_digest
        assert made.template_digest == formats.template_digest(prompt_format, own)
        assert (
            reader.split("train").row(0).text
            == make_row(
                some_rows(1)[0],
                Renderer.open(model.payload, DATE, prompt_format),
                Tokenizer.open(model.payload),
                200,
                ERROR,
            ).text
        )
        told.add(made.digest)
    assert len(told) == 9


def test_a_split_row_tells_its_pieces_and_where_it_came_from(shelf: Shelf, model: Sealed) -> None:
    examples = [*some_rows(3), completion("q", "word " * 60, line=9), *some_rows(2, 30)]
    examples[4].origin.file = "other.jsonl"
    sealed = ledger.build(shelf, seal_dataset(shelf, {"train": examples}), model, 48, SPLIT, quiet)
    reader = LedgerReader.open(sealed)
    read = [reader.split("train").row(n) for n in range(len(reader.split("train")))]
    assert {r.source_row for r in read} == set(range(6)) and [r.row for r in read] == list(range(len(read)))
    assert [r.piece for r in read if r.source_row == 3] == list(range(len(read) - 5)) and len(read) > 7
    assert all(r.origin == examples[r.source_row].origin for r in read)
    (count,) = reader.proto().splits
    assert (count.rows, count.split_rows, count.truncated_rows, count.dropped_rows) == (len(read), 1, 0, 0)
    assert count.trained_tokens == sum(sum(r.trained) for r in read) and count.cut_tokens == 0
    assert count.tokens == sum(len(r.ids) for r in read)
    assert 0 < count.packing_fill <= 1 and -(-count.tokens // 48) <= count.packed_sequences <= count.rows
    refused = fault_of(shelf, seal_dataset(shelf, {"train": examples}), model, 1, SPLIT, quiet)
    assert "2 to 512" in refused.violations[0].accepted


def test_the_number_of_rows_is_that_of_what_is_read(shelf: Shelf, model: Sealed) -> None:
    examples = {"train": some_rows(30), "validation": some_rows(30)[::-1], "test": some_rows(29)}
    reader = LedgerReader.open(ledger.build(shelf, seal_dataset(shelf, examples), model, 40, TRUNCATE, quiet))
    numbers = {name: reader.split(name).rows_number() for name in reader.splits}
    for name, told in numbers.items():
        read = reader.split(name)
        each = [tally.row_number(read.ids(n), read.mask(n).tobytes()) for n in range(len(read))]
        assert functools.reduce(tally.plus, each) == told
    assert numbers["train"] == numbers["validation"] != numbers["test"]


def test_a_ledger_of_before_is_read(shelf: Shelf, model: Sealed) -> None:
    """One that does not tell where rows came from, nor their number."""
    sealed = ledger.build(shelf, seal_dataset(shelf, {"train": some_rows(5)}), model, 100, ERROR, quiet)
    staged = shelf.stage()
    shutil.copytree(sealed.payload, staged.payload, dirs_exist_ok=True)
    (staged.payload / "train.place").unlink()
    about = json.loads((staged.payload / "ledger.json").read_bytes())
    for later in ("rows_numbers", "files", "prompt_format", "format"):
        del about[later]
    (staged.payload / "ledger.json").write_text(json.dumps(about))
    told = artifacts.facts_of(sealed.manifest)
    del told["prompt_format"]
    for split in told["splits"]:
        for later in ("split_rows", "packed_sequences", "packing_fill"):
            del split[later]
    before, now = (
        LedgerReader.open(shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_LEDGER, told)),
        LedgerReader.open(sealed),
    )
    row = before.split("train").row(3)
    assert row.source_row == 3 and not row.HasField("origin") and row.ids == now.split("train").row(3).ids
    assert before.split("train").rows_number() == now.split("train").rows_number()
    assert before.proto().prompt_format == formats.OWN


def test_rows_that_make_no_training_row_are_told(shelf: Shelf, model: Sealed) -> None:
    pair = datasets_pb2.Example(preference=datasets_pb2.Preference(plain=True))
    pair.origin.line = 4
    fault = fault_of(shelf, seal_dataset(shelf, {"train": [*some_rows(2), pair]}), model, 100, ERROR, quiet)
    assert fault.violations[0].field == ":4" and "export the chosen answers as chat" in fault.violations[0].given
    gap = datasets_pb2.Example(infill=datasets_pb2.Infill(prefix="a", middle="b"))
    fault = fault_of(shelf, seal_dataset(shelf, {"train": [gap]}), model, 100, ERROR, quiet)
    assert fault.reason == errors_pb2.REASON_REJECTED and "<fim_prefix>" in fault.message


def test_the_date_of_the_manifest_is_part_of_it(shelf: Shelf) -> None:
    dataset = seal_dataset(shelf, {"train": [chat(("user", "a"), ("assistant", "b"))]})
    texts = []
    for date in ("2024-07-26", "2026-01-01"):
        home = Shelf(shelf.root.parent / date)  # the date is a fact, not a byte of the payload: two shelves
        sealed = ledger.build(home, dataset, seal_model(home, shapes.LLAMA3.source, date), 100, ERROR, quiet)
        texts.append(LedgerReader.open(sealed).split("train").row(0).text)
    assert "26 Jul 2024" in texts[0] and "01 Jan 2026" in texts[1]


def test_all_over_long_rows_are_told_up_to_twenty(shelf: Shelf, model: Sealed) -> None:
    rows = [completion("a", "b " * 40 if n in (3, 5) else "b", line=n) for n in range(1, 400)]
    fault = fault_of(shelf, seal_dataset(shelf, {"train": rows}), model, 20, ERROR, quiet)
    assert fault.reason == errors_pb2.REASON_INVALID_REQUEST
    assert [v.field for v in fault.violations] == ["rows.jsonl:3", "rows.jsonl:5"]
    assert all("tokens" in v.given and "at most 20 tokens" in v.accepted for v in fault.violations)
    many = seal_dataset(shelf, {"train": [completion("a", "b " * 40, line=n) for n in range(1, 400)]})
    assert len(fault_of(shelf, many, model, 20, ERROR, quiet).violations) == 20
    assert shelf.every(artifacts_pb2.ARTIFACT_KIND_LEDGER) == []
    assert list((shelf.root / "staging").iterdir()) == [], "nothing is left behind"


def test_rows_that_train_nothing_are_told(shelf: Shelf, model: Sealed) -> None:
    rows = [completion("p " * 40, "late", line=4), chat(("user", "alone"), line=7), completion("a", "b", line=8)]
    fault = fault_of(shelf, seal_dataset(shelf, {"train": rows}), model, 20, TRUNCATE, quiet)
    assert sorted(v.field for v in fault.violations) == ["rows.jsonl:4", "rows.jsonl:7"]


def test_a_template_that_refuses_is_rejected_naming_row_and_turn(shelf: Shelf) -> None:
    rows = [
        chat(("user", "a"), ("assistant", "b"), line=1),
        chat(("system", "s"), ("user", "a"), ("assistant", "b"), line=2),
    ]
    fault = fault_of(
        shelf, seal_dataset(shelf, {"train": rows}), seal_model(shelf, shapes.GEMMA.source), 99, ERROR, quiet
    )
    assert fault.reason == errors_pb2.REASON_REJECTED
    assert "rows.jsonl:2: turn 1:" in fault.message and "System role not supported" in fault.message


def test_wrong_numbers_are_refused_together(shelf: Shelf, model: Sealed) -> None:
    dataset = seal_dataset(shelf, {"train": some_rows(1)})
    fault = fault_of(shelf, dataset, model, 513, 9, quiet)
    assert [v.field for v in fault.violations] == ["max_length_tokens", "over_length"]
    assert "1 to 512" in fault.violations[0].accepted
    assert fault_of(shelf, dataset, model, 0, ERROR, quiet).violations[0].field == "max_length_tokens"


def test_foreign_things_are_refused(shelf: Shelf, model: Sealed) -> None:
    with pytest.raises(Fault, match="is not a ledger"):
        LedgerReader.open(model)
    staged = shelf.stage()
    from services.common.shards import ShardWriter

    with ShardWriter(staged.payload, "train") as writer:
        writer.add(b'{"chit": {}}')
    foreign = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_DATASET, {})
    assert fault_of(shelf, foreign, model, 20, ERROR, quiet).reason == errors_pb2.REASON_CORRUPT


def test_a_ledger_found_must_match_in_every_part(shelf: Shelf, model: Sealed) -> None:
    dataset = seal_dataset(shelf, {"train": some_rows(3)})
    sealed = ledger.build(shelf, dataset, model, 100, ERROR, quiet)
    about = json.loads((sealed.payload / "ledger.json").read_bytes())
    recipe = ledger.Recipe(**{f.name: about[f.name] for f in dataclasses.fields(ledger.Recipe)})
    found = ledger.find(shelf, recipe)
    assert found is not None and found.digest == sealed.digest
    for f in dataclasses.fields(recipe):
        other = 7 if f.name == "max_length_tokens" else "other"
        assert ledger.find(shelf, dataclasses.replace(recipe, **{f.name: other})) is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=40), st.text(min_size=1, max_size=40)), min_size=1, max_size=12), st.data())
def test_any_rows_come_back_exactly(tmp_path: pathlib.Path, pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    shelf = Shelf(tmp_path / "store")
    model = seal_model(shelf, shapes.CHATML_MARKED.source)
    policy = data.draw(st.sampled_from([TRUNCATE, DROP]))
    limit = data.draw(st.integers(30, 60))
    rows = [chat(("user", a), ("assistant", b)) if len(a) % 2 else completion(a[:5], b) for a, b in pairs]
    renderer, tokenizer = Renderer.open(model.payload, DATE), Tokenizer.open(model.payload)
    try:
        made = [make_row(r, renderer, tokenizer, limit, policy) for r in rows]
    except RowError:
        assert fault_of(shelf, seal_dataset(shelf, {"train": rows}), model, limit, policy, quiet).violations
        return
    sealed = ledger.build(shelf, seal_dataset(shelf, {"train": rows}), model, limit, policy, quiet)
    reader = LedgerReader.open(sealed)
    kept = [m for m in made if not m.dropped]
    read = reader.split("train")
    assert [(tuple(read.ids(n)), read.mask(n).tobytes(), tuple(read.cut_ids(n))) for n in range(len(read))] == [
        (m.ids, m.mask, m.cut_ids) for m in kept
    ]
    assert [read.row(n).text for n in range(len(read))] == [m.text for m in kept]
    (count,) = reader.proto().splits
    assert count.rows + count.dropped_rows == len(rows)
    assert count.trained_tokens == sum(m.trained_tokens for m in kept)


BUILD = """
import pathlib, sys
from services.common.prompt import formats, ledger, tally
from services.common.shelf import Shelf
shelf = Shelf(pathlib.Path(sys.argv[1]))
dataset = shelf.open("datasets", sys.argv[2])
model = shelf.open("models", sys.argv[3])
own = []
def look(stage, done, total):
    own.append(int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]))
ledger.build(shelf, dataset, model, 200, 1, look)
print(max(own))
"""


def test_memory_does_not_grow_with_rows(shelf: Shelf, model: Sealed) -> None:
    """Measured on the process's own pages; mapped shards are the kernel's to take back."""

    def peak_kb(count: int) -> int:
        dataset = seal_dataset(shelf, {"train": [completion(f"{n} ", "word " * 60, line=n) for n in range(count)]})
        ran = subprocess.run(
            [sys.executable, "-c", BUILD, str(shelf.root), dataset.digest, model.digest],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        return int(ran.stdout)

    few, many = peak_kb(1_000), peak_kb(8_000)
    # 7,000 rows more hold 160 tokens each: some 40 MB of numbers alone, were they kept.
    assert many - few < 8_000, (few, many)


KILLED = """
import os, pathlib, signal, sys
from services.common.prompt import formats, ledger, tally
from services.common.shelf import Shelf
shelf = Shelf(pathlib.Path(sys.argv[1]))
def die(stage, done, total):
    if stage == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
ledger.build(shelf, shelf.open("datasets", sys.argv[2]), shelf.open("models", sys.argv[3]), 200, 1, die)
"""


@pytest.mark.parametrize("stage", ["render", "seal"])
def test_killed_while_building_nothing_is_visible_and_the_next_build_is_whole(
    shelf: Shelf, model: Sealed, stage: str
) -> None:
    dataset = seal_dataset(shelf, {"train": some_rows(600)})
    arguments = [str(shelf.root), dataset.digest, model.digest, stage]
    ran = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=60)
    assert ran.returncode == -signal.SIGKILL
    assert shelf.every(artifacts_pb2.ARTIFACT_KIND_LEDGER) == []
    sealed = ledger.build(shelf, dataset, model, 200, ERROR, quiet)
    assert len(LedgerReader.open(sealed).split("train")) == 600


FULL = """
import pathlib
from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.common.prompt import formats, ledger, tally
from services.common.shelf import Shelf
from tests.common.prompt import shapes
from tests.common.prompt.models import completion, seal_dataset, seal_model
root = pathlib.Path("{root}")
shelf = Shelf(root / "store")
model = seal_model(shelf, shapes.CHATML.source)
dataset = seal_dataset(shelf, {{"train": [completion("", "word " * 40, line=n) for n in range(1000)]}})
filler = root / "filler"
with filler.open("wb", buffering=0) as f:
    try:
        while True:
            f.write(bytes(65536))
    except OSError:
        f.truncate(f.tell() - 262144)
try:
    ledger.build(shelf, dataset, model, 200, 1, lambda *p: None)
except Fault as fault:
    assert fault.reason == errors_pb2.REASON_DISK_FULL, fault
    assert not list((shelf.root / "staging").iterdir())
else:
    raise SystemExit("the disk was not full")
filler.unlink()
ledger.build(shelf, dataset, model, 200, 1, lambda *p: None)
print("whole")
"""


def test_a_full_disk_is_told_and_goes_on_when_there_is_space(tmp_path: pathlib.Path) -> None:
    mounted = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec {sys.executable} -c '{FULL.format(root=tmp_path)}'"
    inside = ["unshare", "-m", "sh", "-c"]
    if subprocess.run([*inside, f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True).returncode:
        pytest.skip("a tmpfs of its own needs the right to mount")
    ran = subprocess.run([*inside, mounted], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "whole", ran.stderr
