"""Quantised weights that are kept: the same model again, never half of one."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch

from qlorad.v1 import inference_pb2
from services.common.shelf import Shelf
from services.inference.worker import said, weights
from services.inference.worker.prepared import Prepared

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side; threads that wait for one another awake would fill every core."""
    torch.set_num_threads(1)


def probe(model: Any) -> said.Said:
    return said.ask(model, 100, "models/starter-test")


def nobody(model: Any) -> said.Said:
    raise AssertionError("asked, though its answer was kept")


@pytest.mark.parametrize("name", ["INT8", pytest.param("INT4", marks=pytest.mark.slow), "NF4"])
def test_a_second_load_gives_the_same_logits(name: str, tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    payload = Shelf(starter_home / "store").open("models", "starter-test").payload
    precision = inference_pb2.Precision.Value(f"PRECISION_{name}")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        first = weights.bring(payload, precision, "cpu", Prepared(str(tmp_path), "sha256:a", name), probe)
        assert not first.from_kept
        logits = first.model(input_ids=ids).logits
        again = weights.bring(payload, precision, "cpu", Prepared(str(tmp_path), "sha256:a", name), nobody)
        assert again.from_kept and torch.equal(again.model(input_ids=ids).logits, logits)
        assert torch.equal(again.said.logits, first.said.logits) and again.said.shapes == first.said.shapes
        assert torch.equal(probe(first.model).logits, probe(again.model).logits)
        other = weights.bring(payload, precision, "cpu", Prepared(str(tmp_path), "sha256:b", name), probe)
        assert not other.from_kept and torch.equal(other.model(input_ids=ids).logits, logits)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_whole_is_made_anew(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    payload = Shelf(starter_home / "store").open("models", "starter-test").payload

    def bring() -> tuple[torch.Tensor, bool]:
        kept = Prepared(str(tmp_path), "sha256:a", "INT8")
        found = weights.bring(payload, inference_pb2.PRECISION_INT8, "cpu", kept, probe)
        with torch.no_grad():
            return found.model(input_ids=torch.arange(20, 60)[None]).logits, found.from_kept

    logits, _ = bring()
    (folder,) = tmp_path.iterdir()
    files = sorted((folder / "payload").iterdir())
    assert len(files) == 2
    for file in files:
        whole = file.read_bytes()
        for harmed in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1])):
            file.write_bytes(harmed)
            made, was_kept = bring()
            assert not was_kept and torch.equal(made, logits)
            assert file.read_bytes() == whole
    (folder / "manifest.json").unlink()
    assert bring()[1] is False and bring()[1] is True


def test_where_nothing_can_be_kept_it_only_costs_time(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    payload = Shelf(starter_home / "store").open("models", "starter-test").payload
    (tmp_path / "file").write_text("")
    for folder in ("", str(tmp_path / "file" / "below")):  # none, and one that cannot be
        kept = Prepared(folder, "sha256:a", "INT8")
        assert not weights.bring(payload, inference_pb2.PRECISION_INT8, "cpu", kept, probe).from_kept
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
