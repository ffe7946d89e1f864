"""Quantised weights that are kept: the same model again, never half of one."""

from __future__ import annotations

import pathlib

import pytest
import torch

from qlorad.v1 import inference_pb2
from services.common.shelf import Shelf
from services.inference.worker import weights
from services.inference.worker.prepared import Prepared

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side; threads that wait for one another awake would fill every core."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["INT8", pytest.param("INT4", marks=pytest.mark.slow), "NF4"])
def test_a_second_load_gives_the_same_logits(name: str, tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    payload = Shelf(starter_home / "store").open("models", "starter-test").payload
    precision = inference_pb2.Precision.Value(f"PRECISION_{name}")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        first, was_kept = weights.bring(payload, precision, "cpu", Prepared(str(tmp_path), "sha256:a", name))
        assert not was_kept
        logits = first(input_ids=ids).logits
        again, was_kept = weights.bring(payload, precision, "cpu", Prepared(str(tmp_path), "sha256:a", name))
        assert was_kept
        assert torch.equal(again(input_ids=ids).logits, logits)
        other, was_kept = weights.bring(payload, precision, "cpu", Prepared(str(tmp_path), "sha256:b", name))
        assert not was_kept and torch.equal(other(input_ids=ids).logits, logits)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_whole_is_made_anew(tmp_path: pathlib.Path, starter_home: pathlib.Path) -> None:
    payload = Shelf(starter_home / "store").open("models", "starter-test").payload

    def bring() -> tuple[torch.Tensor, bool]:
        kept = Prepared(str(tmp_path), "sha256:a", "INT8")
        model, was_kept = weights.bring(payload, inference_pb2.PRECISION_INT8, "cpu", kept)
        with torch.no_grad():
            return model(input_ids=torch.arange(20, 60)[None]).logits, was_kept

    logits, _ = bring()
    (folder,) = tmp_path.iterdir()
    (file,) = (folder / "payload").iterdir()
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
        model, was_kept = weights.bring(payload, inference_pb2.PRECISION_INT8, "cpu", kept)
        assert model is not None and not was_kept
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
