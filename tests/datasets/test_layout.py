"""Which files are rows, of which split: patterns, saved datasets, cards, conventions; and what a request may name."""

from __future__ import annotations

import fnmatch
import json
import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.errors import Fault
from services.datasets.source_checks import check_folder, check_hub
from services.datasets.worker import card, globs, layout
from services.datasets.worker.hub import asked_seconds, is_inside
from services.datasets.worker.layout import Ask


def chosen(paths: list[str], config: str = "", splits=(), files=(), **texts: str) -> list[tuple[str, str]]:
    """Split and path of every file that is chosen; texts by name, "." written as "_"."""
    given = {
        "readme": "README.md", "state": "state.json", "dict": "dataset_dict.json",
        "train": "train/state.json", "test": "test/state.json",
    }  # fmt: skip
    held = {given[n]: t.encode() for n, t in texts.items()}
    ask = Ask(config, tuple(splits), tuple(files), "hub", "lab/notes")
    everything = [*paths, *held]
    needed = layout.texts_needed(everything, ask)
    choice = layout.choose(everything, {p: held[p] for p in needed}, ask)
    return [(f.split, f.path) for f in choice.files]


def fault(*args, **kwargs) -> Fault:
    with pytest.raises(Fault) as caught:
        chosen(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["rows.jsonl"], ["train rows.jsonl"]),
        (["test.csv", "train.csv", "dev.csv"], ["train train.csv", "validation dev.csv", "test test.csv"]),
        (["a/valid/x.jsonl", "a/training/y.jsonl"], ["train a/training/y.jsonl", "validation a/valid/x.jsonl"]),
        (["my-train-set.json.gz", "my_eval_set.json.gz"], ["train my-train-set.json.gz", "test my_eval_set.json.gz"]),
        (["contest.jsonl", "trainer.jsonl"], ["train contest.jsonl", "train trainer.jsonl"]),
        (["p10.jsonl", "p9.jsonl"], ["train p9.jsonl", "train p10.jsonl"]),
        (
            [f"data/train-0000{i}-of-00002.parquet" for i in (1, 0)] + ["data/test_sft-00000-of-00001.parquet"],
            ["train data/train-00000-of-00002.parquet", "train data/train-00001-of-00002.parquet",
             "test_sft data/test_sft-00000-of-00001.parquet"],
        ),
        (["data/part-00000-of-00002.jsonl", "data/part-00001-of-00002.jsonl"],
         ["train data/part-00000-of-00002.jsonl", "train data/part-00001-of-00002.jsonl"]),
        (["train.jsonl", "extra.jsonl"], ["train train.jsonl"]),
        (["a.parquet", "b.parquet", "notes.csv"], ["train a.parquet", "train b.parquet"]),
        (["a.parquet", "a.jsonl"], ["train a.parquet"]),
        ([".hidden/a.jsonl", "__pycache__/b.jsonl", "c.jsonl", "dataset_infos.json"], ["train c.jsonl"]),
    ],
)  # fmt: skip
def test_conventions(paths: list[str], expected: list[str]) -> None:
    assert [" ".join(f) for f in chosen(paths)] == expected


def test_what_is_passed_over_is_told() -> None:
    ask = Ask("", (), (), "hub", "lab/notes")
    choice = layout.choose(["train.jsonl", "extra.jsonl", "notes.csv", "README.md"], {}, ask)
    assert choice.left_out == ("extra.jsonl", "notes.csv")
    # A split in another kind of file is never passed over.
    told = fault(["train-1.jsonl", "train-2.jsonl", "test.csv"])
    assert told.reason == errors_pb2.REASON_INVALID_REQUEST and "test.csv" in told.message


def test_nothing_to_read() -> None:
    assert "scripts are never run" in fault(["notes.py", "README"]).message
    assert "'model.bin'" in fault(["model.bin"]).message
    assert "nothing" in fault([]).message


def test_splits_and_patterns_asked_for() -> None:
    paths = ["train.jsonl", "dev.jsonl", "test.jsonl", "odd/rows.csv", "notes.odt"]
    assert chosen(paths, splits=["dev", "train"]) == [("train", "train.jsonl"), ("validation", "dev.jsonl")]
    by_pattern = chosen(paths, files=["odd/*", "t*.jsonl"])
    assert by_pattern == [("train", "odd/rows.csv"), ("train", "train.jsonl"), ("test", "test.jsonl")]
    missing = fault(paths, files=["*.parquet"])
    assert missing.reason == errors_pb2.REASON_NOT_FOUND and "'dev.jsonl'" in missing.message
    assert fault(paths, files=["*.odt"]).reason == errors_pb2.REASON_INVALID_REQUEST
    missing = fault(paths, splits=["holdout"])
    assert missing.reason == errors_pb2.REASON_NOT_FOUND and "'train', 'validation', 'test'" in missing.message


CARD = """---
license: mit
configs:
- config_name: chat
  data_files:
  - split: train
    path: ["chat/*.jsonl", "more/**"]
  - split: dev
    path: chat/dev/x.jsonl
- config_name: plain
  data_dir: plain
- config_name: all
  default: true
  data_files: "**/*.jsonl"
---
# Notes
"""
CARD_PATHS = ["chat/a.jsonl", "chat/dev/x.jsonl", "more/b.jsonl", "plain/test.csv", "plain/train.csv"]


def test_cards() -> None:
    assert chosen(CARD_PATHS, "chat", readme=CARD) == [
        ("train", "chat/a.jsonl"), ("train", "more/b.jsonl"), ("validation", "chat/dev/x.jsonl"),
    ]  # fmt: skip
    assert chosen(CARD_PATHS, "plain", readme=CARD) == [("train", "plain/train.csv"), ("test", "plain/test.csv")]
    assert {s for s, _ in chosen(CARD_PATHS, readme=CARD)} == {"train"}
    assert len(chosen(CARD_PATHS, readme=CARD)) == 3
    missing = fault(CARD_PATHS, "none", readme=CARD)
    assert missing.reason == errors_pb2.REASON_NOT_FOUND and "'chat', 'plain', 'all'" in missing.message
    several = fault(CARD_PATHS, readme=CARD.replace("  default: true\n", ""))
    assert several.violations[0].field == "hub.config" and "'chat', 'plain', 'all'" in several.message
    for silent in ("# no front matter", "---\nlicense: mit\n---\n", "---\n- a\n---\n"):
        assert chosen(["a.jsonl"], "default", readme=silent) == [("train", "a.jsonl")]


@pytest.mark.parametrize(
    ("front", "word"),
    [
        ("configs: {a: 1}", "no list"),
        ("configs: [{config_name: 3}]", "no config_name"),
        ("configs: [{config_name: a, data_files: [3]}]", "no patterns"),
        ("configs: [{config_name: a, data_files: 'https://elsewhere/x.jsonl'}]", "elsewhere"),
        ("configs: [{config_name: a, data_files: 'none/*.jsonl'}]", "not there"),
        ("configs: [{config_name: a, data_files: '*.txt'}]", "no rows"),
        ("configs: [{config_name: a, sep: ';', data_files: '*.csv'}]", "not followed"),
        ("configs: [{config_name: a}, {config_name: a}]", "same config_name"),
        ("configs: [{config_name: a, data_files: [{split: ../x, path: a}]}]", "split named"),
        ("a: &a [1]\nb: *a", "refers to itself"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
        ("a: [", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("[" * 1200, "too deep"),
    ],
)
def test_cards_that_cannot_be_followed(front: str, word: str) -> None:
    told = fault(["rows.jsonl", "notes.txt"], readme=f"---\n{front}\n---\n")
    assert told.reason == errors_pb2.REASON_INVALID_REQUEST and word in told.message
    assert chosen(["rows.jsonl", "notes.txt"], files=["rows.jsonl"], readme=f"---\n{front}\n---\n") == [
        ("train", "rows.jsonl")
    ]


def test_saved_datasets() -> None:
    state = json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "test"})
    assert chosen(["data-00000-of-00001.arrow"], state=state) == [("test", "data-00000-of-00001.arrow")]
    paths = [f"{s}/data-00000-of-00001.arrow" for s in ("train", "test")]
    split = json.dumps({"splits": ["train", "test"]})
    assert chosen(paths, dict=split, train=state, test=state) == [("train", paths[0]), ("test", paths[1])]
    assert "names" in fault(paths, dict=split, train=state).message
    assert "not there" in fault([], state=state).message
    outside = json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]})
    assert "not there" in fault(["data.arrow"], state=outside).message
    assert "no JSON object" in fault(["data.arrow"], state="[]").message


PIECE = st.text("ab./-*?[]!", max_size=8)


@settings(max_examples=300, deadline=None)
@given(PIECE, st.text("ab./-", max_size=8))
def test_patterns_without_folders_are_those_of_the_shell(pattern: str, path: str) -> None:
    if "/" in pattern or "/" in path or "**" in pattern or "[" in pattern:
        return
    assert (list(globs.matching(pattern, [path])) == [path]) == fnmatch.fnmatchcase(path, pattern)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "*", "?", "**", "**/", "/", "[ab]", "[!a]"]), max_size=6),
    st.text("ab/", max_size=8),
)
def test_patterns_mean_what_is_said(tokens: list[str], path: str) -> None:
    pattern = "".join(tokens)
    meant = {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?", "[ab]": "[ab]", "[!a]": "[^a/]"}
    found = re.findall(r"\*\*/|\*\*|\*|\?|\[!?[ab]+\]|.", pattern)
    wanted = re.fullmatch("".join(meant.get(t, re.escape(t)) for t in found), path) is not None
    assert (list(globs.matching(pattern, [path])) == [path]) == wanted


def test_a_pattern_of_stars_takes_no_age() -> None:
    assert list(globs.matching("*a" * 250 + "b", ["a" * 1000] * 3)) == []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_path_leads_out(path: str) -> None:
    root = pathlib.PurePosixPath("/root/of/all")
    if is_inside(path):
        assert ".." not in (root / path).parts and (root / path).is_relative_to(root) and "\0" not in path
    for odd in (f"../{path}", f"/{path}", f"a/../{path}", f"a//{path}", "a\\..\\b", "a\nb", ""):
        assert not is_inside(odd)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_names_of_hubs_and_folders(name: str, pattern: str) -> None:
    source = datasets_pb2.HubSource(repo=name, revision=name, files=[pattern])
    fine = not check_hub(source)
    if fine:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) and ".." not in name
        assert not pattern.startswith("/") and ".." not in pattern.split("/")
    wrong = check_folder(datasets_pb2.FolderSource(path=f"/data/../{name}"), [pathlib.Path("/data")])
    assert wrong and wrong[0].field == "folder.path"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"repo": "lab/notes"}, []),
        ({"repo": "notes", "revision": "refs/convert/parquet", "splits": ["train"]}, []),
        ({"repo": ""}, ["hub.repo"]),
        ({"repo": "a/b/c"}, ["hub.repo"]),
        ({"repo": "../b"}, ["hub.repo"]),
        ({"repo": "a--b/c"}, ["hub.repo"]),
        ({"repo": "a/b.git"}, ["hub.repo"]),
        ({"repo": "a/b", "revision": "a..b"}, ["hub.revision"]),
        ({"repo": "a/b", "revision": "-x"}, ["hub.revision"]),
        ({"repo": "a/b", "config": "x", "files": ["y"]}, ["hub.config"]),
        ({"repo": "a/b", "splits": ["x", "x", "a b"]}, ["hub.splits[1]", "hub.splits[2]"]),
        ({"repo": "a/b", "files": ["ok", "/etc/x", "a/../b", "hf://x", ""]}, [f"hub.files[{i}]" for i in (1, 2, 3, 4)]),
        ({"repo": "/", "revision": "..", "config": "\n", "splits": ["/"]},
         ["hub.repo", "hub.revision", "hub.config", "hub.splits[0]"]),
    ],
)  # fmt: skip
def test_all_violations_at_once(fields: dict, wrong: list[str]) -> None:
    assert [v.field for v in check_hub(datasets_pb2.HubSource(**fields))] == wrong


def test_folder_violations() -> None:
    roots = [pathlib.Path("/data")]
    assert check_folder(datasets_pb2.FolderSource(path="/data/x", splits=["train"]), roots) == []
    wrong = check_folder(datasets_pb2.FolderSource(path="data", files=["../x"]), roots)
    assert [v.field for v in wrong] == ["folder.path", "folder.files[0]"] and "/data" in wrong[0].accepted


def test_retry_after() -> None:
    assert asked_seconds("120", 0) == 120
    assert asked_seconds("Thu, 01 Jan 1970 00:01:00 GMT", 15) == 45
    assert asked_seconds("Thu, 01 Jan 1970 00:01:00 GMT", 90) == 0
    assert asked_seconds("soon", 0) is None and asked_seconds(None, 0) is None


def test_a_card_without_an_end() -> None:
    with pytest.raises(Fault, match="no end"):
        card.configs(b"---\n" + b"a: b\n" * 100_000, "hub")
