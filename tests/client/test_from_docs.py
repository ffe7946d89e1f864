"""`qlorad dataset from-docs`: a folder of documents to a dataset, each stage shown; wrong input is answered clearly."""

from __future__ import annotations

import pathlib

from tests.client.cli import Cli
from tests.house import ROOT

METHODOLOGY = ROOT / "examples" / "documents" / "methodology.md"


def test_a_folder_becomes_a_dataset_and_every_stage_is_told(cli: Cli, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "papers"
    (folder / "deep").mkdir(parents=True)
    (folder / "methodology.md").write_bytes(METHODOLOGY.read_bytes())
    (folder / "deep" / "faq.html").write_text("<h1>FAQ</h1><h2>How long?</h2><p>Nine hours in summer, five in frost.</p>")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / ".hidden.md").write_text("# Hidden\n")
    told = cli.json("dataset", "from-docs", str(folder), "--model", "starter-test", "--name", "papers")
    assert list(told) == ["found", "dataset", "measure", "ledger", "preview"]
    assert told["found"] == {
        "files": ["methodology.md", "deep/faq.html"],
        "kinds": {"Markdown": 1, "HTML": 1},
        "others": {".csv": 1},
    }
    stats = told["dataset"]["stats"]
    assert stats["document_items"]["question"] == 9 and sum(stats["document_items"].values()) == 91
    assert sum(stats["rows"].values()) == 91 and stats["rows"]["validation"] == 9
    assert sum(s["rows"] for s in told["ledger"]["splits"]) >= 91
    assert len(told["preview"]) == 2 and told["preview"][0]["origin"]["spans"]
