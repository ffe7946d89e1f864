"""A measure counts what ledgers would hold, for every limit at once."""

from __future__ import annotations

import pathlib

import pytest

from qlorad.v1 import datasets_pb2
from services.common.prompt import ledger, measure
from services.common.prompt.render import Renderer
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from tests.common.prompt import shapes
from tests.common.prompt.models import DATE, chat, completion, seal_dataset, seal_model
from tests.common.prompt.talks import talk


def counted(
    folder: pathlib.Path, examples: list[datasets_pb2.Example], lengths: list[int]
) -> datasets_pb2.DatasetMeasure:
    shelf = Shelf(folder / "store")
    model = seal_model(shelf, shapes.CHATML_MARKED.source, context=4096)
    dataset = seal_dataset(shelf, {"train": examples[::2], "test": examples[1::2]})
    told: list[tuple[str, int, int]] = []
    made = measure.measure(
        dataset.payload,
        Renderer.open(model.payload, DATE),
        Tokenizer.open(model.payload),
        lengths,
        lambda *p: told.append(p),
    )
    assert told[-1] == ("measure", len(examples), len(examples))
    return made


def test_forecasts_are_what_ledgers_then_hold(tmp_path: pathlib.Path) -> None:
    examples = [talk(seed) for seed in range(60)]
    made = counted(tmp_path, examples, [200, 64, 4096])
    assert [f.max_length_tokens for f in made.forecasts] == [64, 200, 4096]
    shelf = Shelf(tmp_path / "store")
    model = seal_model(shelf, shapes.CHATML_MARKED.source, context=4096)
    dataset = seal_dataset(shelf, {"train": examples})
    trained = {}
    for forecast in made.forecasts:
        limit = forecast.max_length_tokens
        sealed = ledger.build(shelf, dataset, model, limit, datasets_pb2.OVER_LENGTH_SPLIT, lambda *p: None)
        whole = ledger.LedgerReader.open(sealed).proto().splits[0]
        assert forecast.longer_rows == whole.split_rows
        trained[limit] = whole.trained_tokens
        if limit == 4096:
            assert (whole.rows, whole.tokens, whole.split_rows) == (made.rows, made.tokens, 0)
            assert (whole.packed_sequences, whole.packing_fill) == (forecast.packed_sequences, forecast.packing_fill)
    assert set(trained.values()) == {made.trained_tokens}, "split trains every token at any length"
    longest = made.quantiles[-1].tokens
    assert [q.share for q in made.quantiles] == [0.5, 0.9, 0.95, 0.99, 1.0]
    assert sum(made.row_tokens.counts) == made.rows and longest == whole.longest_tokens
    assert len(made.row_tokens.counts) == len(made.row_tokens.bounds) + 1 and made.row_tokens.counts[-1] == 0


def test_cut_tokens_are_those_of_truncation(tmp_path: pathlib.Path) -> None:
    examples = [completion("q " * n, "a " * 40, line=n + 1) for n in range(1, 9)]
    made = counted(tmp_path, examples, [30])
    (forecast,) = made.forecasts
    shelf = Shelf(tmp_path / "store")
    model = seal_model(shelf, shapes.CHATML_MARKED.source, context=4096)
    sealed = ledger.build(
        shelf, seal_dataset(shelf, {"train": examples}), model, 30, datasets_pb2.OVER_LENGTH_TRUNCATE, lambda *p: None
    )
    (cut,) = ledger.LedgerReader.open(sealed).proto().splits
    assert (forecast.longer_rows, forecast.cut_tokens) == (cut.truncated_rows, cut.cut_tokens)
    assert forecast.cut_trained_tokens == made.trained_tokens - cut.trained_tokens
    assert (forecast.packed_sequences, forecast.packing_fill) == (cut.packed_sequences, pytest.approx(cut.packing_fill))


def test_rows_that_cannot_be_used_are_counted_by_rule(tmp_path: pathlib.Path) -> None:
    examples = [
        chat(("user", "alone")),
        completion("p", ""),
        datasets_pb2.Example(preference=datasets_pb2.Preference(plain=True)),
        datasets_pb2.Example(infill=datasets_pb2.Infill(middle="a")),
        chat(("user", "a"), ("assistant", "b")),
    ]
    made = counted(tmp_path, examples, [128])
    assert dict(made.unusable_rows) == {"nothing_trained": 2, "preference": 1, "no_infill_tokens": 1}
    assert made.rows == 1 and made.quantiles[0].tokens == made.tokens
    none = counted(tmp_path / "none", examples[:2], [128])
    assert none.rows == 0 and not none.quantiles and not none.row_tokens.bounds
    assert (none.forecasts[0].packed_sequences, none.forecasts[0].packing_fill) == (0, 0.0)


def test_the_usual_lengths() -> None:
    assert measure.usual_lengths(1000) == [128, 256, 512]
    assert measure.usual_lengths(512) == [128, 256, 512]
    assert measure.usual_lengths(100) == [100]
