"""The store: what is visible is whole, whoever dies; nobody removes what another uses."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorad.v1 import artifacts_pb2, errors_pb2
from services.common import artifacts
from services.common.errors import Fault
from services.common.shelf import Sealed, Shelf
from tests.common.child import child
from tests.house import ROOT

MODEL = artifacts_pb2.ARTIFACT_KIND_MODEL
ADAPTER = artifacts_pb2.ARTIFACT_KIND_ADAPTER


def put(shelf: Shelf, files: dict[str, bytes], kind: int = MODEL, **how: object) -> Sealed:
    staged = shelf.stage()
    for name, data in files.items():
        path = staged.payload / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return shelf.seal(staged, kind, {"n": 1}, **how)


@pytest.fixture
def shelf(tmp_path: pathlib.Path) -> Shelf:
    return Shelf(tmp_path / "store")


def reason(caught: pytest.ExceptionInfo[Fault]) -> str:
    return errors_pb2.Reason.Name(caught.value.reason)


def test_the_digest_is_the_one_that_the_proto_tells(shelf: Shelf) -> None:
    import hashlib

    sealed = put(shelf, {"b": b"two", "a/x": b"one"})
    lines = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {len(data)}  {path}\n" for path, data in (("a/x", b"one"), ("b", b"two"))
    )
    assert sealed.digest == "sha256:" + hashlib.sha256(("qlorad model 1\n" + lines).encode()).hexdigest()


def test_an_adapters_digest_knows_its_base(shelf: Shelf) -> None:
    digests = {
        put(shelf, {"a": b"1"}, ADAPTER, lineage=artifacts_pb2.Lineage(base_digest=base)).digest for base in ("x", "y")
    }
    assert len(digests) == 2


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.binary(max_size=20), min_size=1))
def test_same_bytes_same_digest_other_bytes_another(files: dict[str, bytes]) -> None:
    entries = [artifacts_pb2.FileEntry(path=p, size_bytes=len(d), sha256=d.hex()) for p, d in files.items()]
    digest = artifacts.digest_of(MODEL, entries)
    assert digest == artifacts.digest_of(MODEL, reversed(entries))
    assert digest != artifacts.digest_of(ADAPTER, entries)
    for e in entries:
        changed = artifacts_pb2.FileEntry(path=e.path, size_bytes=e.size_bytes, sha256=e.sha256 + "0")
        assert artifacts.digest_of(MODEL, [changed if o is e else o for o in entries]) != digest


def test_the_same_bytes_are_one_artifact_with_two_stories(shelf: Shelf) -> None:
    first = put(shelf, {"a": b"1"}, provenance=("job-1", {"seed": 1}))
    again = put(shelf, {"a": b"1"}, provenance=("job-2", {"seed": 2}))
    assert again.digest == first.digest and len(shelf.every(MODEL)) == 1
    assert shelf.provenance(again) == {"job-1": {"seed": 1}, "job-2": {"seed": 2}}
    assert again.manifest.create_time == first.manifest.create_time
    assert list((shelf.root / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda p: (p / "a").write_bytes(b"x"), "file 'a' differs"),
        (lambda p: (p / "a").unlink(), "file 'a' is missing"),
        (lambda p: (p / "z").write_bytes(b"x"), "foreign file 'z'"),
        (lambda p: (p / "z").symlink_to("/etc/passwd"), "is a link"),
        (lambda p: (p.parent / "manifest.json").write_text("{}"), "manifest format 0"),
        (lambda p: (p.parent / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda p: (p.parent / "manifest.json").write_bytes(b"\xff"), "manifest cannot be read"),
    ],
)
def test_harm_is_found_and_named(shelf: Shelf, harm: object, told: str) -> None:
    sealed = put(shelf, {"a": b"1", "b": b"2"})
    harm(sealed.payload)
    with pytest.raises(Fault, match=told) as caught:
        shelf.open("models", sealed.digest, verify=True)
    assert reason(caught) == "REASON_CORRUPT"


def test_a_manifest_that_lies_about_its_digest_is_refused(shelf: Shelf) -> None:
    sealed = put(shelf, {"a": b"1"})
    path = sealed.folder / "manifest.json"
    path.write_text(path.read_text().replace('"size_bytes": "1"', '"size_bytes": "2"'))
    with pytest.raises(Fault, match="does not match its own digest"):
        shelf.open("models", sealed.digest)


@pytest.mark.parametrize("name", ["a\nb", "bad\udcff", "tab\t"])
def test_a_file_name_that_breaks_the_manifest_is_refused(shelf: Shelf, name: str) -> None:
    staged = shelf.stage()
    (staged.payload / name).write_bytes(b"")
    with pytest.raises(Fault, match="cannot be printed"):
        shelf.seal(staged, MODEL, {})
    assert shelf.every(MODEL) == []


def test_a_corrupt_neighbour_does_not_hide_the_rest_and_can_be_removed(shelf: Shelf) -> None:
    good, bad = put(shelf, {"a": b"1"}), put(shelf, {"a": b"2"})
    (bad.folder / "manifest.json").write_text("{")
    assert [s.digest for s in shelf.every(MODEL)] == [good.digest]
    assert shelf.remove("models", bad.digest) == 1


def test_found_by_alias_digest_and_its_beginning(shelf: Shelf) -> None:
    sealed = put(shelf, {"a": b"1"})
    shelf.set_alias("models", "m", sealed.digest)
    for ident in ("m", sealed.digest, sealed.digest[:20]):
        assert shelf.open("models", ident, verify=True).digest == sealed.digest
    for ident in ("n", "sha256:" + "0" * 64, "sha256:00000000"):
        with pytest.raises(Fault) as caught:
            shelf.open("models", ident)
        assert reason(caught) == "REASON_NOT_FOUND"
    with pytest.raises(Fault, match="did you mean 'models/m'"):
        shelf.open("models", "mm")


def test_a_beginning_that_fits_two_asks_for_more(shelf: Shelf) -> None:
    for tail in ("0", "1"):
        (shelf.root / "models" / ("ab" * 31 + "a" + tail)).mkdir()
    with pytest.raises(Fault, match="more digits") as caught:
        shelf.open("models", "sha256:" + "ab" * 10)
    assert reason(caught) == "REASON_INVALID_REQUEST"


@pytest.mark.parametrize("name", ["../x", "", "A", "base", ".lock"])
def test_an_alias_is_checked_before_it_is_a_path(shelf: Shelf, name: str) -> None:
    sealed = put(shelf, {"a": b"1"})
    with pytest.raises(Fault, match="alias"):
        shelf.set_alias("models", name, sealed.digest)
    assert shelf.alias("models", name) is None


def test_an_alias_points_to_what_is_there(shelf: Shelf) -> None:
    with pytest.raises(Fault) as caught:
        shelf.set_alias("models", "m", "sha256:" + "0" * 64)
    assert reason(caught) == "REASON_NOT_FOUND"


def test_compare_and_swap(shelf: Shelf) -> None:
    one, two = put(shelf, {"a": b"1"}), put(shelf, {"a": b"2"})
    assert shelf.set_alias("models", "m", one.digest, 0).generation == 1
    assert shelf.set_alias("models", "m", one.digest).generation == 1
    with pytest.raises(Fault) as caught:
        shelf.set_alias("models", "m", two.digest, 0)
    assert reason(caught) == "REASON_STALE_GENERATION" and caught.value.metadata["generation"] == "1"
    assert shelf.set_alias("models", "m", two.digest, 1).generation == 2


MOVER = """
import pathlib, sys
from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.common.shelf import Shelf
shelf, (one, two) = Shelf(pathlib.Path(sys.argv[1])), sys.argv[2:]
won = 0
while won < 20:
    now = shelf.alias("models", "m")
    try:
        shelf.set_alias("models", "m", two if now.digest == one else one, now.generation)
        won += 1
    except Fault as fault:
        assert fault.reason == errors_pb2.REASON_STALE_GENERATION
"""


def test_many_processes_move_one_alias_and_no_move_is_lost(shelf: Shelf) -> None:
    digests = [put(shelf, {"a": data}).digest for data in (b"1", b"2")]
    shelf.set_alias("models", "m", digests[0])
    movers = [subprocess.Popen([sys.executable, "-c", MOVER, str(shelf.root), *digests], cwd=ROOT) for _ in range(4)]
    assert [m.wait(60) for m in movers] == [0, 0, 0, 0]
    alias = shelf.alias("models", "m")
    assert alias is not None and alias.generation == 1 + 4 * 20
    assert [p.name for p in (shelf.root / "models" / "aliases").iterdir() if p.name != ".lock"] == ["m.json"]


PIN = """
import pathlib, sys
from services.common.shelf import Shelf
pin = Shelf(pathlib.Path(sys.argv[1])).pin(sys.argv[2], "jobs/7")
"""


def test_a_pin_holds_until_its_process_is_killed(shelf: Shelf) -> None:
    sealed = put(shelf, {"a": b"1"})
    shelf.set_alias("models", "m", sealed.digest)
    with child(PIN, str(shelf.root), sealed.digest) as holder:
        for ident in ("m", sealed.digest):
            with pytest.raises(Fault) as caught:
                shelf.remove("models", ident)
            assert reason(caught) == "REASON_IN_USE"
        assert shelf.holders(sealed.digest) == ["jobs/7"]
        holder.kill()
        holder.wait(30)
        assert shelf.holders(sealed.digest) == []
        assert shelf.remove("models", "m") == 1
    assert shelf.every(MODEL) == [] and shelf.alias("models", "m") is None


def test_a_released_pin_holds_nothing(shelf: Shelf) -> None:
    sealed = put(shelf, {"a": b"1"})
    pins = [shelf.pin(sealed.digest, f"jobs/{n}") for n in (1, 2)]
    with pytest.raises(Fault, match="jobs/1, jobs/2"):
        shelf.remove("models", sealed.digest)
    for pin in pins:
        pin.release()
    assert shelf.remove("models", sealed.digest) == 1


def test_pins_let_go_while_someone_looks_are_simply_gone(shelf: Shelf) -> None:
    sealed = put(shelf, {"a": b"1"})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            pins = [shelf.pin(sealed.digest, f"jobs/{n}") for n in range(40)]
            done = pool.submit(lambda pins: [pin.release() for pin in pins], pins)
            while not done.done():
                assert len(shelf.holders(sealed.digest)) <= 40
            done.result()
            assert shelf.holders(sealed.digest) == []


def test_what_is_gone_cannot_be_pinned(shelf: Shelf) -> None:
    with pytest.raises(Fault) as caught:
        shelf.pin("sha256:" + "0" * 64, "jobs/1")
    assert reason(caught) == "REASON_NOT_FOUND"


def test_the_last_alias_takes_the_files_along(shelf: Shelf) -> None:
    sealed = put(shelf, {"a": b"12345"})
    for name in ("m", "n"):
        shelf.set_alias("models", name, sealed.digest)
    with pytest.raises(Fault, match="models/m, models/n") as caught:
        shelf.remove("models", sealed.digest)
    assert reason(caught) == "REASON_IN_USE"
    assert shelf.remove("models", "m") == 0
    assert shelf.open("models", "n").digest == sealed.digest
    assert shelf.remove("models", "n") == 5
    assert shelf.every(MODEL) == []


# Each line below is a step of sealing; a process that dies right there must leave nothing visible, or all of it.
DIE = """
import os, pathlib, sys
from qlorad.v1 import artifacts_pb2
from services.common.shelf import Shelf
steps, at = 0, int(sys.argv[2])
def watch(event, args):
    global steps
    if event in ("open", "os.rename", "os.mkdir", "os.remove") and sys.argv[1] in str(args[0]):
        steps += 1
        if steps == at:
            os._exit(9)
shelf = Shelf(pathlib.Path(sys.argv[1]))
sys.addaudithook(watch)
staged = shelf.stage()
(staged.payload / "a").write_bytes(b"1" * 1000)
sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_MODEL, {})
shelf.set_alias("models", "m", sealed.digest)
"""


def test_death_at_every_step_leaves_nothing_half(tmp_path: pathlib.Path) -> None:
    ended, seen = 0, 0
    for at in range(1, 40):
        root = tmp_path / str(at)
        code = subprocess.run([sys.executable, "-c", DIE, str(root), str(at)], cwd=ROOT, timeout=60).returncode
        shelf = Shelf(root)
        found = shelf.every(MODEL)
        for sealed in found:
            shelf.open("models", sealed.digest, verify=True)
        for alias in shelf.aliases("models"):
            assert shelf.open("models", alias.name.removeprefix("models/"), verify=True).digest == alias.digest
        seen += code == 9
        if code == 0:
            ended = at
            break
        assert code == 9
    assert ended > 8 and seen == ended - 1 and len(shelf.aliases("models")) == 1


FULL = """
import pathlib, sys
from qlorad.v1 import artifacts_pb2, errors_pb2
from services.common.errors import Fault
from services.common.interceptors import fault_of
from services.common.shelf import Shelf
import os
shelf = Shelf(pathlib.Path("store"))
for size in (4000, 1_000_000):
    staged = shelf.stage()
    try:
        (staged.payload / "a").write_bytes(os.urandom(size))
        shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_MODEL, {})
    except (OSError, Fault) as e:
        assert fault_of(e).reason == errors_pb2.REASON_DISK_FULL, e
        assert fault_of(e).retry_seconds > 0
        shelf.drop(staged)
        assert size == 1_000_000
        break
else:
    raise SystemExit("the disk was not full")
filler = pathlib.Path("filler")
free = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize
filler.write_bytes(b"x" * (free - 4096))
for many in range(100):
    staged = None
    try:
        staged = shelf.stage()
        (staged.payload / "a").write_bytes(os.urandom(100))
        shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_MODEL, {})
    except (OSError, Fault) as e:
        assert fault_of(e).reason == errors_pb2.REASON_DISK_FULL, e
        if staged: shelf.drop(staged)
        break
else:
    raise SystemExit("sealing never met the full disk")
before = len(shelf.every(artifacts_pb2.ARTIFACT_KIND_MODEL))
for sealed in shelf.every(artifacts_pb2.ARTIFACT_KIND_MODEL):
    shelf.open("models", sealed.digest, verify=True)
filler.unlink()
staged = shelf.stage()
(staged.payload / "a").write_bytes(b"there is space again")
shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_MODEL, {})
assert len(shelf.every(artifacts_pb2.ARTIFACT_KIND_MODEL)) == before + 1
"""


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a tmpfs needs root on Linux")
def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path: pathlib.Path) -> None:
    mount = f'mount -t tmpfs -o size=512k none {tmp_path} && cd {tmp_path} && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, FULL],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
