"""`qlorad dataset from-docs`: a folder of documents to a dataset, each stage shown; wrong input is answered clearly."""

from __future__ import annotations

import os
import pathlib
from unittest import mock

import pytest

from qlorad import _documents, errors
from services.datasets.documents import SUFFIXES
from tests.client.cli import Cli
from tests.house import ROOT

METHODOLOGY = ROOT / "examples" / "documents" / "methodology.md"


def test_a_folder_becomes_a_dataset_and_every_stage_is_told(cli: Cli, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "field-papers"
    (folder / "deep").mkdir(parents=True)
    (folder / "methodology.md").write_bytes(METHODOLOGY.read_bytes())
    page = "<h1>FAQ</h1><h2>How long?</h2><p>Nine hours in summer, five in frost.</p>"
    (folder / "deep" / "faq.html").write_text(page)
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / ".hidden.md").write_text("# Hidden\n")
    told = cli.json("dataset", "from-docs", str(folder), "--model", "starter-test", "--name", "field-papers")
    assert list(told) == ["found", "dataset", "measure", "ledger", "preview"]
    assert told["found"] == {
        "files": ["methodology.md", "deep/faq.html"],
        "kinds": {"Markdown": 1, "HTML": 1},
        "others": {".csv": 1},
        "empty": [],
    }
    stats = told["dataset"]["stats"]
    assert stats["document_items"]["question"] == 9 and sum(stats["document_items"].values()) == 113
    assert sum(stats["rows"].values()) == 113 and stats["rows"]["validation"] == 11
    assert sum(s["rows"] for s in told["ledger"]["splits"]) >= 113
    assert len(told["preview"]) == 2 and told["preview"][0]["origin"]["spans"]


def test_what_cannot_be_made_a_dataset_is_answered_clearly(cli: Cli, tmp_path: pathlib.Path) -> None:
    def error(*words: str, code: int) -> str:
        return str(cli.json("dataset", "from-docs", *words, code=code)["error"]["message"])

    model = ("--model", "starter-test")
    assert "a folder with documents that exists" in error(str(tmp_path / "nowhere"), *model, code=2)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "a.odt").write_text("x")
    told = error(str(tmp_path), *model, code=2)
    assert (".md, .markdown" in told and "there are 1 .jsonl, 1 .odt" in told) or "1 .odt, 1 .jsonl" in told
    assert "`qlorad dataset upload` takes .jsonl" in told
    (tmp_path / "empty.md").touch()
    assert "empty.md is empty" in error(str(tmp_path), *model, code=2)
    (tmp_path / "good.md").write_text("# Good\n\n## Part\n\nThe probe is rinsed before it is read again.\n")
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.7\n" + b"x" * 6000)
    assert "'models/starter-tset' does not exist" in error(str(tmp_path), "--model", "starter-tset", code=3)
    name = ("--name", "half", "--validation", "0")
    assert "cut.pdf" in error(str(tmp_path), *model, *name, code=2)
    told = cli.inside("dataset", "from-docs", str(tmp_path), *model, *name, "--on-row-error", "skip", "--rows", "0")
    assert "1 document could not be read and was left out" in told and "empty.md" in told
    assert "'datasets/half' exists already" in error(str(tmp_path), *model, *name, code=1)
    assert "--over-length: got 'cut'" in error(str(tmp_path), *model, "--name", "none", "--over-length", "cut", code=2)
    assert cli.json("dataset", "show", "none", code=3)  # told before anything was made
    short = (
        "--name",
        "short",
        "--validation",
        "0",
        "--on-row-error",
        "skip",
        "--max-length",
        "2",
        "--over-length",
        "error",
    )
    _, said = cli.both("dataset", "from-docs", str(tmp_path), *model, *short, code=2, folder=tmp_path)
    assert "datasets/short is made all the same. For the rest: qlorad dataset ledger short --model starter-test" in said


@pytest.mark.slow
def test_one_document_alone_and_as_texts(cli: Cli, tmp_path: pathlib.Path) -> None:
    made = cli.lines("dataset", "from-docs", str(METHODOLOGY), "--model", "starter-test", "--name", "alone", "--texts")
    assert [list(line) for line in made] == [["found"], ["dataset"], ["measure"], ["ledger"], ["preview"]]
    assert made[1]["dataset"]["stats"]["document_items"] == {"text": 73}


def test_client_and_daemon_call_the_same_files_documents() -> None:
    assert [s for suffixes in _documents.KINDS.values() for s in suffixes] == list(SUFFIXES)


def test_what_a_folder_hides_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.md").write_text("# A\n")
    (tmp_path / "far").symlink_to(tmp_path)
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    found = _documents.find(tmp_path)
    assert [name for _, name in found.files] == ["a.md"] and found.others == {"link to a folder": 1, ".md": 1}
    odd = tmp_path / os.fsdecode(b"caf\xe9.md")
    odd.write_text("# B\n")
    with pytest.raises(errors.InvalidArgument, match="names are UTF-8"):
        _documents.find(tmp_path)
    odd.unlink()
    with mock.patch.object(os, "scandir", side_effect=PermissionError(13, "Permission denied", str(tmp_path))):
        with pytest.raises(errors.InvalidArgument, match="Permission denied"):
            _documents.find(tmp_path)
