"""Verbs of `qlorad dataset` that make, judge and show: in tables and in JSON, against real daemons."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest

import qlorad
from qlorad import errors
from qlorad.v1 import datasets_pb2
from tests.client.cli import Cli
from tests.datasets.site import site
from tests.house import House
from tests.hub.kit import serving

PAPERS = [
    {"instruction": "What does p53 do?", "input": "", "output": "TP53  binds DNA [1, 2] (Lee et al., 2020)."},
    {"instruction": "Which cytokines rise?", "input": "", "output": "IL-6 and TNF-α rise to 1.5 × 10^-5 M [4-6]."},
    {"instruction": "Which cytokines rise?", "input": "", "output": "IL-6 and TNF-α rise to 1.5 × 10^-5 M [4-6]."},
    {"instruction": "Is it so?", "input": "", "output": "Yes [3]."},
    {"instruction": "Which gene is it?", "input": "", "output": "BRCA1/2, as the panel says [7]."},
    {"instruction": "Which allele is it?", "input": "", "output": "HLA-DRB1*15:01, in most of them."},
]
SCIENCE = """
steps:
- citations
- notation: {scientific: e}
- name: min_words
  parameters: {min_words: 3}
"""
BODIES = [
    {"messages": [{"role": "user", "content": "Add 2 and 3."},
                  {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function":
                      {"name": "add", "arguments": "{\"a\": 2}"}}]},
                  {"role": "tool", "tool_call_id": "c1", "content": "5"}, {"role": "assistant", "content": "Five."}],
     "tools": [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}], "lot": 7},
    {"prefix": "def f():\n", "middle": "    return 1\n", "suffix": "print(f())"},
    {"prompt": "Best colour?", "chosen": "Green.", "rejected": "None."},
]  # fmt: skip


def written(path: pathlib.Path, rows: list[object]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("papers")
    (folder / "science.yaml").write_text(SCIENCE)
    return written(folder / "papers.jsonl", list(PAPERS))


@pytest.fixture(scope="module")
def broken(papers: pathlib.Path) -> pathlib.Path:
    """Two rows that a repair mends, one that none does."""
    rows = [
        {"messages": [{"role": "human", "content": "Hi?"}, {"role": "gpt", "content": f"Hello {i}."}]} for i in "ab"
    ]
    return written(papers.with_name("broken.jsonl"), [*rows, {"messages": [{"role": "user", "content": "Hi?"}]}])


@pytest.fixture(scope="module")
def made(cli: Cli, papers: pathlib.Path) -> dict[str, object]:
    """datasets/papers, by a pipeline of a file and a word."""
    told: dict[str, object] = cli.json(
        "dataset", "upload", str(papers), "--steps", str(papers.with_name("science.yaml")),
        "--steps", "whitespace=empty_lines: 0", "--near-duplicates", "drop", "--validation", "0.2", "--seed", "3",
    )  # fmt: skip
    return told


def test_steps_of_files_and_words_are_applied_in_order(cli: Cli, made: dict[str, dict[str, object]]) -> None:
    assert made["name"] == "datasets/papers"
    assert made["stats"]["changed_by_step"] == {"0:citations": 5, "1:notation": 2, "3:whitespace": 1}
    assert made["stats"]["dropped_by_step"] == {"2:min_words": 1} and made["stats"]["duplicate_rows"] == 1
    shown = cli.inside("dataset", "show", "papers")
    assert "1 by min_words" in shown and "5 by citations, 2 by notation, 1 by whitespace" in shown
    assert "rise to 1.5e-5 M." in cli.inside("dataset", "preview", "papers", "--rows", "9")


def test_a_preview_in_json_has_its_places_as_numbers(cli: Cli, made: dict[str, object]) -> None:
    (whole,) = cli.json("dataset", "preview", "papers", "--rows", "1")["examples"]
    (line,) = cli.lines("dataset", "preview", "papers", "--rows", "1")
    place = whole["origin"]
    assert whole == line and place["file"] == "papers.jsonl" and isinstance(place["line"], int)
    assert f"(papers.jsonl:{place['line']})" in cli.inside("dataset", "preview", "papers", "--rows", "1")


def test_steps_are_listed(cli: Cli) -> None:
    listed = cli.json("dataset", "steps")["steps"]
    assert {"citations", "min_words"} <= {s["name"] for s in listed}
    shown = cli.inside("dataset", "steps")
    assert "min_words (needed)" in shown and 'scientific="e"' in shown
    assert [s["name"] for s in cli.lines("dataset", "steps")] == [s["name"] for s in listed]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "citaitons"), "nearest citations"),
        (("--steps", "min_words={min_words: none}"), "a whole number"),
        (("--steps", "no-such.yaml"), "a readable file"),
        (("--steps", "min_words={min_words: 3"), "YAML"),
        (("--steps", "min_words=3"), "min_words=min_words: 3"),
        (("--near-duplicates", "perhaps"), "together"),
        (("--repair", "everything"), "role_names"),
        (("--stratify-by", "length"), "metadata.KEY"),
        (("--validation", "0.6", "--test", "0.6"), "together with --test"),
        (("--name", "Not A Name"), "of [a-z0-9._-]"),
        (("--column", "instruction"), "KEY=VALUE"),
        (("--format", "alpaca"), "instruction, chat"),
    ],
)
def test_wrong_words_are_told(cli: Cli, papers: pathlib.Path, words: tuple[str, ...], told: str) -> None:
    error = cli.json("dataset", "upload", str(papers), "--name", "wrong", *words, code=2)["error"]
    assert told in json.dumps(error, ensure_ascii=False)


def test_all_wrong_words_are_told_at_once_and_nothing_is_sent(cli: Cli, papers: pathlib.Path) -> None:
    words = ("--validation", "1.5", "--on-row-error", "maybe", "--near-duplicates", "perhaps", "--keep-splits")
    done = cli.run("dataset", "import", str(papers.parent), "--name", "wrong", *words, code=2)
    told = done.stderr.splitlines()
    assert told[0] == "qlorad: these things are wrong:" and len(told) == 5 and not done.stdout
    assert {line.split(":")[0].strip() for line in told[1:]} == {
        "--validation", "--on-row-error", "--near-duplicates", "--keep-splits",
    }  # fmt: skip


def test_errors_in_rows_are_told_once_each(cli: Cli, broken: pathlib.Path) -> None:
    done = cli.run("dataset", "upload", str(broken), "--name", "wrong", code=2)
    told = [line for line in done.stderr.splitlines() if "[" in line]
    assert "qlorad: 5 errors in the rows:" in done.stderr and len(told) == 5 and "got" not in done.stderr
    assert all(line.startswith("  broken.jsonl:") and "; accepted: " in line for line in told)


def test_a_taken_name_is_told_before_anything_is_sent(cli: Cli, papers: pathlib.Path, made: dict[str, object]) -> None:
    done = cli.run("dataset", "upload", str(papers), code=1)
    assert "choose another --name, or --move it" in done.stderr and "upload" not in done.stderr
    assert cli.json("dataset", "upload", str(papers), code=1)["error"]["reason"] == "ALREADY_EXISTS"


def test_what_is_no_source_is_told(cli: Cli, papers: pathlib.Path) -> None:
    assert "hub:lab/notes" in cli.json("dataset", "import", "lab/notes", code=2)["error"]["message"]
    gone = str(papers.with_name("gone.jsonl"))
    assert "a readable file" in cli.json("dataset", "upload", gone, code=2)["error"]["message"]
    assert "no file of that name" in cli.json("dataset", "validate", "gone.jsonl", code=3)["error"]["message"]
    told = cli.json("dataset", "convert", "gone.jsonl", "--to", "chat", code=3)["error"]
    assert "no file of that name" in told["message"] and told["reason"] == "NOT_FOUND"


def test_a_file_that_cannot_be_written_is_told(cli: Cli, made: dict[str, object], tmp_path: pathlib.Path) -> None:
    for to in (tmp_path, tmp_path / "none" / "x.jsonl"):
        told = cli.json("dataset", "export", "papers", "--to", str(to), code=2)["error"]
        assert [v["field"] for v in told["violations"]] == ["--to"]
        assert (
            "--out"
            in cli.json("dataset", "convert", "papers", "--to", "chat", "--out", str(to), code=2)["error"]["message"]
        )
    assert not list(tmp_path.iterdir())


def test_tables_are_converted_by_their_columns(cli: Cli, tmp_path: pathlib.Path) -> None:
    table, to = tmp_path / "table.csv", tmp_path / "rows.jsonl"
    table.write_text("Frage,Antwort,Thema\nWas ist 1 und 1?,Zwei.,Zahlen\n")
    words = ("dataset", "convert", str(table), "--to", "chat", "--out", str(to))
    assert "unknown_format" in cli.json(*words, code=2)["error"]["message"] and not to.exists()
    assert cli.json(*words, "--column", "instruction=Frage", "--column", "output=Antwort")["rows"] == 1
    row = json.loads(to.read_text())
    assert [m["content"] for m in row["messages"]] == ["Was ist 1 und 1?", "Zwei."] and row["Thema"] == "Zahlen"


def test_on_a_terminal_trained_text_is_green_and_cut_text_struck(cli: Cli, made: dict[str, object]) -> None:
    words = (
        "dataset",
        "ledger",
        "papers",
        "--model",
        "starter-test",
        "--max-length",
        "24",
        "--over-length",
        "truncate",
    )
    shown = cli.on_terminal(*words)
    assert "\x1b[1;32m" in shown and "\x1b[9;31m" in shown and "[[" not in shown
    assert "TRUNCATED" in shown and "SPLIT-UP" in shown, "titles are not broken at 100 columns"
    plain = cli.inside(*words)
    assert "[[" in plain and "{{" in plain and "\x1b" not in plain


def test_rows_without_tokens_are_told_and_not_drawn(cli: Cli, tmp_path: pathlib.Path) -> None:
    cli.json("dataset", "upload", str(written(tmp_path / "pairs.jsonl", [BODIES[2]])), "--validation", "0")
    shown = cli.inside("dataset", "stats", "pairs", "--model", "starter-test")
    assert "rows that cannot be trained on: 1 preference" in shown and "AT MOST" not in shown


def test_a_lineage_is_a_tree_and_a_lost_parent_says_so(cli: Cli, made: dict[str, object], papers: pathlib.Path) -> None:
    cli.json(
        "dataset", "upload", str(papers), "--name", "other", "--steps", "sample=fraction: 0.9", "--validation", "0"
    )
    cut = cli.json("dataset", "split", "papers", "--name", "papers-cut", "--validation", "0.5", "--test", "0.2")
    assert sum(cut["stats"]["rows"].values()) == 4 and cut["stats"]["rows"]["test"] == 1
    assert [p["digest"] for p in cut["lineage"]["parents"]] == [made["digest"]]
    told = cli.json("dataset", "show", "papers-cut", "--lineage")["lineage"]
    (parent,) = told["parents"]
    assert parent["name"] == "datasets/papers" and parent["files"][0]["file"] == "papers.jsonl"
    assert [s["step"]["name"] for s in parent["steps"]] == ["citations", "notation", "min_words", "whitespace"]
    assert parent["steps"][2]["step"]["parameters"] == {"min_words": 3}
    tree = cli.run("dataset", "show", "papers-cut", "--lineage").stdout.splitlines()
    assert tree[0].startswith("datasets/papers-cut  sha256:") and tree[0].endswith(" test")
    assert tree[1].startswith("└─ datasets/papers  sha256:") and "├─ step citations {" in tree[2]
    assert tree[-1].startswith("   └─ papers.jsonl  sha256:")
    again = cli.json("dataset", "split", "other", "--name", "orphan", "--validation", "0.5")
    assert again["stats"]["rows"]["validation"] >= 1
    cli.json("dataset", "delete", "other")
    assert cli.json("dataset", "show", "orphan", "--lineage")["lineage"]["parents"][0]["is_gone"]
    assert "gone from this store" in cli.inside("dataset", "show", "orphan", "--lineage")


def test_validation_tells_everything_and_ends_with_its_verdict(
    cli: Cli, broken: pathlib.Path, made: dict[str, object]
) -> None:
    told = cli.json("dataset", "validate", str(broken), code=2)
    assert {f["severity"] for f in told["findings"]} >= {"SEVERITY_ERROR"} and not told["report"]["passes"]
    assert told["report"]["severities"]["error"] == sum(f["severity"] == "SEVERITY_ERROR" for f in told["findings"])
    lines = cli.lines("dataset", "validate", str(broken), "--severity", "error", code=2)
    assert all("finding" in line for line in lines[:-1]) and list(lines[-1]) == ["report"]
    shown = cli.inside("dataset", "validate", str(broken), "--most", "9", code=2)
    assert "passes      no" in shown and "WEIGHT" in shown and "unknown_role" in shown
    assert "broken" not in {d["name"].removeprefix("datasets/") for d in cli.json("dataset", "list")["datasets"]}

    assert cli.json("dataset", "validate", "papers", "--steps", "min_words=min_words: 1")["report"]["passes"]
    assert "passes      yes" in cli.inside("dataset", "validate", "papers")
    assert cli.json("dataset", "validate", "no-such", code=3)["error"]["reason"] == "NOT_FOUND"
    both = cli.json("dataset", "validate", str(broken), "papers", code=2)["error"]
    assert "datasets alone" in both["message"]


def test_fixing_makes_a_dataset_and_tells_each_repair(cli: Cli, broken: pathlib.Path) -> None:
    done = cli.run("dataset", "validate", str(broken), "--fix", "--name", "mended", code=2)
    assert "no dataset was made" in done.stderr and "PART" in done.stdout
    assert "--name" in cli.json("dataset", "validate", str(broken), "--fix", code=2)["error"]["message"]
    assert (
        "no name without --fix"
        in cli.json("dataset", "validate", str(broken), "--name", "x", code=2)["error"]["message"]
    )
    asked = ("dataset", "validate", str(broken), "--fix", "--name", "mended", "--on-row-error", "skip")
    told = cli.json(*asked)
    assert told["dataset"]["name"] == "datasets/mended" and told["dataset"]["stats"]["rows"] == {"train": 2}
    assert told["report"]["stats"]["repaired"] == {"role_names": 2} == told["dataset"]["stats"]["repaired"]
    shown = cli.inside(*asked, "--move")
    assert "2 role_names" in shown and "datasets/mended" in shown
    assert "[user] Hi?" in cli.inside("dataset", "preview", "mended")


def test_statistics_are_figures_and_pictures(cli: Cli, made: dict[str, object]) -> None:
    told = cli.json("dataset", "stats", "papers")
    assert told["dataset"]["digest"] == made["digest"] and "measure" not in told
    shown = cli.run("dataset", "stats", "papers", "--model", "starter-test", "--max-length", "16").stdout
    assert "characters of a row" in shown and "tokens of a row" in shown and "█" in shown and "CUT TRAINED" in shown
    assert "<= 64 |####" in cli.inside("dataset", "stats", "papers")
    measured = cli.json("dataset", "stats", "papers", "--model", "starter-test")["measure"]
    assert measured["rows"] == 4 and measured["forecasts"] and measured["quantiles"][-1]["share"] == 1
    assert sum(measured["row_tokens"]["counts"]) == 4
    assert "--model" in cli.json("dataset", "stats", "papers", "--max-length", "4", code=2)["error"]["message"]


def test_every_body_is_shown(cli: Cli, tmp_path: pathlib.Path) -> None:
    files = [str(written(tmp_path / f"{i}.jsonl", [row])) for i, row in enumerate(BODIES)]
    cli.json("dataset", "upload", *files, "--name", "bodies", "--validation", "0")
    shown = cli.inside("dataset", "preview", "bodies")
    for line in (
        "[tool on offer] add({}): Adds.", '  calls add({"a": 2}) as c1', "[tool c1] 5", "[assistant] Five.",
        '[metadata] {"lot": 7}',
        "[prefix] def f():", "[middle]     return 1", "[suffix] print(f())", "[chosen]",
        "  [assistant] Green.", "[rejected]",
    ):  # fmt: skip
        assert line in shown.splitlines(), (line, shown)
    assert "chat" in cli.inside("dataset", "show", "bodies") and "preference" in cli.inside("dataset", "show", "bodies")


def test_hubs_and_folders_are_imported(
    tmp_path: pathlib.Path, papers: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    data = papers.read_bytes()
    house = house_factory(tmp_path / "home")
    with serving(tmp_path / "hub") as hub:
        hub.put("lab/Notes", {"data/train.jsonl": data, "data/test.jsonl": data.splitlines()[5] + b"\n"})
        house.start("datasets", "--hub-endpoint", hub.url)
        cli = Cli(house.home)
        whole = cli.json("dataset", "import", "hub:lab/Notes", "--validation", "0")
        assert whole["name"] == "datasets/notes" and "lab/Notes" in whole["lineage"]["source"]
        asked = ("dataset", "import", "hub:lab/Notes@main", "--name", "kept", "--keep-splits")
        kept = cli.json(*asked, "--keep-duplicates")
        assert kept["stats"]["rows"] == {"train": 6, "test": 1}
        some = cli.json("dataset", "import", "hub:lab/Notes", "--name", "some", "--split", "test", "--validation", "0")
        assert some["stats"]["rows"] == {"train": 1}
        assert cli.json("dataset", "import", "hub:lab/nothing", code=3)["error"]["reason"] == "NOT_FOUND"
        seen = cli.json("dataset", "validate", "hub:lab/Notes")["report"]
        assert seen["passes"] and seen["stats"]["rows"] == {"train": 5}
    folder = tmp_path / "My Rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(data)
    assert cli.json("dataset", "import", str(folder), "--file", "*.jsonl")["name"] == "datasets/my-rows"
    assert str(folder) in cli.inside("dataset", "show", "my-rows", "--lineage")
    assert cli.json("dataset", "validate", str(folder))["report"]["passes"]
    mixed = cli.json("dataset", "validate", str(folder), "my-rows", code=2)["error"]
    assert "alone" in mixed["message"]
    assert cli.json("dataset", "import", str(tmp_path / "none"), code=3)["error"]["code"] == "NOT_FOUND"


def test_pages_collections_and_papers_are_imported(
    tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    house = house_factory(tmp_path / "home")
    with site() as web:
        house.start("datasets", "--web-hosts", web.host())
        cli = Cli(house.home)
        rows = [{"title": f"T{i}", "abstract": f"Of {i}.", "sections": [], "quality_score": i / 4} for i in range(4)]
        moved = web.move("/latest", "/v2/Some%20Papers.jsonl?key=secret")
        web.put("/v2/Some%20Papers.jsonl?key=secret", "".join(json.dumps(r) + "\n" for r in rows).encode())
        made = cli.json("dataset", "import", "--url", moved, "--min-score", "0.5", "--validation", "0")
        assert made["name"] == "datasets/latest" and made["stats"]["rows"] == {"train": 2}
        told = cli.inside("dataset", "show", "latest", "--lineage").splitlines()
        assert "|- papers of score 0.5 and more" in told or "├─ papers of score 0.5 and more" in told
        assert told[-1].endswith(f"from {web.url('/v2/Some%20Papers.jsonl')}") and "secret" not in "".join(told)
        assert "papers    2 below the score" in cli.inside("dataset", "show", "latest").splitlines()
        shown = cli.inside("dataset", "validate", moved, "--min-score", "0.75").splitlines()
        assert "papers      3 below the score" in shown
        closed = cli.json("dataset", "import", "https://example.org/x", code=4)["error"]
        assert closed["code"] == "PERMISSION_DENIED" and "--web-hosts" in closed["message"]
    gone = ("dataset", "import", "--chroma", str(tmp_path / "none"), "--collection", "notes")
    assert cli.json(*gone, code=3)["error"]["code"] == "NOT_FOUND"
    assert cli.json("dataset", "validate", *gone[2:], code=3)["error"]["code"] == "NOT_FOUND"
    for words, option in (
        ((), "SOURCE"),
        (("--chroma", "/x"), "--chroma"),
        (("--collection", "x"), "--collection"),
        (("hub:lab/x", "--url", "https://a.org/"), "SOURCE"),
        (("https://a.org/x", "--split", "train"), "--split"),
        (("--url", "https://a.org/x", "--file", "*.csv"), "--file"),
        (("--url", "https://a.org/x", "--chroma", "/x"), "--url"),
    ):
        error = cli.json("dataset", "import", *words, code=2)["error"]
        assert option in error["message"], error
    with qlorad.connect(home=cli.home) as client:
        with pytest.raises(errors.NotFound):
            client.datasets.create("never", chroma=(str(tmp_path / "none"), "notes"))
        with pytest.raises(errors.PermissionDenied):
            client.datasets.create("never", urls=["https://example.org/x"])


def test_the_library_plans_validates_and_lists(cli: Cli, papers: pathlib.Path, made: dict[str, object]) -> None:
    with qlorad.connect(home=cli.home) as client:
        checked = client.datasets.validation([papers], steps=["citations", ("min_words", {"min_words": 3})])
        assert checked.report.passes and checked.report.stats.dropped_by_step["1:min_words"] == 1
        assert {f.rule for f in checked.findings} >= {"exact_duplicate"}
        worst = client.datasets.validation([papers], min_severity="error")
        assert not worst.findings
        step = datasets_pb2.Step(name="line_ends")
        joined = client.datasets.create("joined", parents=["papers", "papers"], steps=[step], near_duplicates="ignore")
        assert joined.stats.duplicate_rows == sum(dict(made["stats"])["rows"].values())  # type: ignore[call-overload]
        assert "whitespace" in {s.name for s in client.datasets.steps()}
        with pytest.raises(errors.InvalidArgument) as caught:
            client.datasets.create("nothing")
        assert [v.field for v in caught.value.violations] == ["uploads"]
        with pytest.raises(errors.InvalidArgument):
            client.datasets.create("x", parents=["papers"], steps=[{"a": {}, "b": {}}])
