"""P4: a checkpoint on its way to the shelf, cut or refused at every step of the disk: old or new, never half."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from qlorad.v1 import artifacts_pb2
from services.common.shelf import Shelf
from tests.house import ROOT

# Forks once for each step of the disk: the n-th write, fsync, rename, open for writing, mkdir or removal is the last
# thing that the fork does ("die"), or fails with EIO ("eio"). Prints how each ended.
WALK = """
import errno, json, os, pathlib, sys
from qlorad.v1 import artifacts_pb2
from services.common import frames
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf
from services.trainer import launch, sealing
from services.trainer.worker.facts import Teller, synced

root, phase, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
FILES = {"adapter.bin": b"a" * 9000, "optimizer.bin": b"o" * 70000, "state.json": b"{}"}

def work(attempt):
    teller = Teller(attempt)
    folder = teller.fresh_folder("checkpoints/4")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    written = training_pb2.CheckpointWritten(step=4, folder="checkpoints/4", files=synced(folder))
    teller.tell(training_pb2.Fact(checkpoint=written))

def serve(home):
    shelf, attempt = Shelf(home / "store"), home / "attempt"
    told = (attempt / launch.FACTS).read_bytes() if (attempt / launch.FACTS).exists() else b""
    for body in frames.unpack_all(told)[0]:
        fact = training_pb2.Fact.FromString(body)
        sealing.seal_checkpoint(shelf, attempt, fact.checkpoint, "j", {"job": "jobs/j"})

steps = 0

def disturb(at):
    def step(what):
        global steps
        steps += 1
        if steps == at:
            if how == "die":
                os._exit(9)
            raise OSError(errno.EIO, "planted at " + what)
    for name in ("write", "fsync", "fdatasync", "rename", "replace", "sendfile", "pwrite", "ftruncate"):
        def wrapped(*a, _call=getattr(os, name), _name=name, **k):
            step(_name)
            return _call(*a, **k)
        setattr(os, name, wrapped)
    def hook(event, args):
        if event == "open" and str(root) in str(args[0]) and (args[2] & (os.O_WRONLY | os.O_RDWR)):
            step("open")
        elif event in ("os.mkdir", "os.remove") and str(root) in str(args[0]):
            step(event)
    sys.addaudithook(hook)

ended = []
for at in range(1, 400):
    home = root / str(at)
    (home / "attempt").mkdir(parents=True)
    Shelf(home / "store")
    if phase == "serve":
        work(home / "attempt")
    pid = os.fork()
    if pid == 0:
        disturb(at)
        code = 0
        try:
            work(home / "attempt") if phase == "work" else serve(home)
            code = 5 if steps >= at else 0  # it did without that step, as with a folder that is there already
        except BaseException as e:
            print(type(e).__name__, e, file=sys.stderr)
            code = 1
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ended.append(code)
    if code == 0:
        break
print(json.dumps(ended))
"""
# What a fresh daemon does after that: reads what was told, and seals it.
AGAIN = WALK.partition("ended = []")[0] + "serve(root)\n"


@pytest.mark.parametrize("how", ["die", pytest.param("eio", marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["work", "serve"])
def test_p4_a_checkpoint_is_old_or_new_never_half(tmp_path: pathlib.Path, phase: str, how: str) -> None:
    command = [sys.executable, "-c", WALK, str(tmp_path), phase, how]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert told.returncode == 0, told.stderr
    codes = json.loads(told.stdout)
    assert len(codes) > 10 and codes[-1] == 0, codes
    assert set(codes[:-1]) <= ({9} if how == "die" else {1, 5}) and codes.count(5) <= len(codes) / 2, codes
    whole = set()
    for at in range(1, len(codes) + 1):
        home = tmp_path / str(at)
        shelf = Shelf(home / "store")
        before = seen(shelf)
        if phase == "work":
            assert before == []
        # A step of fourteen is tried again by a fresh process; the others differ by nothing but the place of the cut.
        if at % 14 == 0 or at == len(codes):
            again = subprocess.run(
                [sys.executable, "-c", AGAIN, str(home), phase, "again"], cwd=ROOT, capture_output=True, text=True
            )
            assert again.returncode == 0, again.stderr
            after = seen(shelf)
            assert before in ([], after) and len(after) <= 1
            if phase == "serve" or codes[at - 1] in (0, 5):
                assert len(after) == 1
        whole |= set(seen(shelf))
    assert len(whole) == 1, "always the same bytes"


def seen(shelf: Shelf) -> list[str]:
    """Checkpoints that can be seen, every byte compared."""
    found = shelf.every(artifacts_pb2.ARTIFACT_KIND_CHECKPOINT)
    for sealed in found:
        shelf.open("checkpoints", sealed.digest, verify=True)
        assert sorted(f.path for f in sealed.manifest.files) == ["adapter.bin", "optimizer.bin", "state.json"]
    return [sealed.digest for sealed in found]
