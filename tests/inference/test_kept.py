"""Quantised weights on disk: what nobody can use goes, what somebody uses stays, and together they have a bound."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference import kept
from services.inference.worker.prepared import Prepared
from tests.house import ROOT

MODEL, OTHER = "a" * 64, "b" * 64
HOLDER = """
import pathlib, signal, sys
from services.inference import kept
held = kept.hold(pathlib.Path(sys.argv[1]))
print("held" if held is not None else "gone", flush=True)
signal.pause()
"""


def lay(folder: pathlib.Path, name: str, size: int = 10, used: float = 1000.0) -> pathlib.Path:
    """Weights of so many bytes, last used then."""
    place = folder / name
    (place / "payload").mkdir(parents=True)
    (place / "payload" / "weights.safetensors").write_bytes(bytes(size))
    os.utime(place, (used, used))
    return place


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_nobody_can_use_goes_and_says_why(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = kept.name_of(f"sha256:{MODEL}", "INT8", "AVX512")
    versions = good.removeprefix(f"{MODEL}-int8-").removesuffix("-avx512")
    assert versions.count("-") == 3 and all(versions.split("-"))
    for name in (good, kept.name_of(MODEL, "NF4", "AVX2")):
        lay(tmp_path, name)
    older = f"{MODEL}-int8-{versions}.post1-avx512"
    oldest = f"{MODEL}-nf4-2.1.0-4.40.0-0.43.0-avx2"
    gone = good.replace(MODEL, OTHER)
    for name in (older, oldest, gone, ".aside-77", ".gone-x"):
        lay(tmp_path, name, size=7)
    told = {one.name: (one.size, one.why) for one in kept.sweep(tmp_path, {MODEL}, 0)}
    assert told == {
        older: (7, "other versions of the libraries made it"),
        oldest: (7, "other versions of the libraries made it"),
        gone: (7, "its model is gone"),
        ".aside-77": (7, "it was never finished"),
        ".gone-x": (7, "it was never finished"),
    }
    assert names(tmp_path) == {good, kept.name_of(MODEL, "NF4", "AVX2")}
    assert kept.sweep(tmp_path, {MODEL}, 0) == [] and kept.sweep(tmp_path / "none", {MODEL}, 5) == []


def test_what_somebody_reads_or_writes_stays_until_they_are_dead(tmp_path: pathlib.Path) -> None:
    places = [lay(tmp_path, f"{OTHER}-int8-1-cap"), lay(tmp_path, ".aside-77")]
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for place in places
    ]
    try:
        for holder in holders:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert kept.sweep(tmp_path, {MODEL}, 0) == [] and len(names(tmp_path)) == 2
        assert not kept.make_room(tmp_path, 5, 12) and len(names(tmp_path)) == 2
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    assert len(kept.sweep(tmp_path, {MODEL}, 0)) == 2 and not names(tmp_path)


def test_what_went_while_one_waited_is_not_held(tmp_path: pathlib.Path) -> None:
    place = lay(tmp_path, "x")
    held = kept.hold(place)
    assert held is not None and not kept.remove(place)
    os.close(held)
    assert kept.remove(place) and kept.hold(place) is None and not kept.remove(place)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9), st.booleans()), max_size=6),
    st.integers(1, 150),
    st.integers(0, 80),
)
@settings(max_examples=40, deadline=None)
def test_room_is_made_by_what_was_used_longest_ago(there: list[tuple[int, int, bool]], limit: int, need: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        places = [lay(folder, f"w{n}", size, float(used)) for n, (size, used, _) in enumerate(there)]
        held = [kept.hold(place) for place, (_, _, busy) in zip(places, there, strict=True) if busy]
        fits = kept.make_room(folder, need, limit)
        left = {n for n, place in enumerate(places) if place.exists()}
        whole = sum(size for size, _, _ in there)
        assert {n for n, one in enumerate(there) if one[2]} <= left, "what is used stays"
        assert fits == (need + sum(there[n][0] for n in left) <= limit)
        if need + whole <= limit or need > limit:
            assert len(left) == len(there), "nobody goes for nothing"
        went = set(range(len(there))) - left
        for n in went:
            assert all(there[n][1] <= there[m][1] for m in left if not there[m][2])
        for fd in held:
            assert fd is not None
            os.close(fd)


def test_a_bound_holds_when_an_engine_keeps_weights(tmp_path: pathlib.Path) -> None:
    def keep(digest: str, size: int, limit: int = 5000) -> None:
        Prepared(str(tmp_path), digest, "INT8", limit).keep(lambda folder: _write(folder, size))

    def found(digest: str) -> bool:
        prepared = Prepared(str(tmp_path), digest, "INT8", 5000)
        there = prepared.find() is not None
        if prepared._held is not None:
            os.close(prepared._held)  # as the end of its process does
        return there

    keep("sha256:a", 1500)
    keep("sha256:b", 1500)
    for digest, used in (("a", 10.0), ("b", 20.0)):
        os.utime(tmp_path / kept.name_of(digest, "INT8", _capability()), (used, used))
    assert found("sha256:a"), "and is now the one that was used last"
    keep("sha256:c", 1500)
    assert found("sha256:a") and not found("sha256:b") and found("sha256:c")
    keep("sha256:d", 6000)
    assert not found("sha256:d") and found("sha256:a") and found("sha256:c")
    keep("sha256:d", 6000, limit=0)
    assert found("sha256:d") and len(names(tmp_path)) == 3, "no bound"


def _write(folder: pathlib.Path, size: int) -> None:
    (folder / "weights.safetensors").write_bytes(bytes(size))


def _capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()
