"""`python -m benchmarks.datasets`: a large JSONL file to a sealed dataset, against datasets.load_dataset.

Ours is everything from the call to the sealed dataset, through the door: digest,
upload, its verification, parsing, validation, exact duplicates, statistics, fsync.
The peer reads the same file as its users do, into a cache that is empty; its import
does not count. The daemon and all of its workers are watched meanwhile.

Writes benchmarks/results/datasets.json and a line in HISTORY.md; ends with 1 if a bar
is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import psutil

import qlorad
from benchmarks import daemons, report

ROWS, ROUNDS, SEED = 1_000_000, 3, 20261121
TWINS = 0.01
"""Share of rows that repeat an earlier one."""
BARS = {"datasets.ingest_vs_hf": (0.25, True), "datasets.ingest_rss_mb": (300.0, False)}
GOAL = 0.5
_PEER = """
import sys, tempfile, time
import datasets
datasets.disable_progress_bars()
with tempfile.TemporaryDirectory(dir=sys.argv[2]) as cache:
    begun = time.perf_counter()
    rows = len(datasets.load_dataset("json", data_files=sys.argv[1], cache_dir=cache)["train"])
    print(rows, time.perf_counter() - begun)
"""


def make(path: pathlib.Path, rows: int) -> None:
    """Instruction rows of about 500 bytes; some repeat an earlier one."""
    draw = random.Random(SEED)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(4000)]
    words += ["தமிழ்", "你好", "naïve", "—"]
    earlier: list[str] = []
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            if earlier and draw.random() < TWINS:
                out.write(draw.choice(earlier))
                continue
            row = {
                "instruction": " ".join(draw.choices(words, k=draw.randint(3, 14))) + "?",
                "input": " ".join(draw.choices(words, k=draw.choice((0, 0, 8, 20)))),
                "output": " ".join(draw.choices(words, k=draw.randint(12, 92))) + ".",
                "id": number,
            }
            line = json.dumps(row, ensure_ascii=False) + "\n"
            if number % 50 == 0:
                earlier.append(line)
            out.write(line)


class Watch:
    """The largest resident size of a process and all below it, asked again and again."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.05):
            total = 0
            for process in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def ours(file: pathlib.Path, folder: str) -> tuple[float, float, float, int]:
    """Seconds in all, seconds of the upload, peak in MB, rows sealed."""
    with tempfile.TemporaryDirectory(dir=folder) as home, daemons.running("datasets", pathlib.Path(home)) as process:
        with qlorad.connect(home=home) as client, Watch(process.pid) as watch:
            begun = time.perf_counter()
            upload = client.datasets.upload(file)
            sent = time.perf_counter()
            made = client.datasets.create("bench", [upload])
            ended = time.perf_counter()
        return ended - begun, sent - begun, watch.peak / 1e6, sum(made.stats.rows.values())


def peer(file: pathlib.Path, folder: str) -> tuple[float, int]:
    """Seconds and rows of load_dataset."""
    told = subprocess.run(
        [sys.executable, "-c", _PEER, str(file), folder],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": folder},
    ).stdout.split()
    return float(told[1]), int(told[0])


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rows", type=int, default=ROWS)
    asked.add_argument("--rounds", type=int, default=ROUNDS)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.jsonl"
        make(file, given.rows)
        took: dict[str, list[float]] = {"ours": [], "upload": [], "peer": []}
        peaks, kept = [], 0
        for _ in range(given.rounds):
            seconds, upload, peak, kept = ours(file, folder)
            took["ours"].append(seconds)
            took["upload"].append(upload)
            peaks.append(peak)
            seconds, read = peer(file, folder)
            took["peer"].append(seconds)
            if read != given.rows:
                raise SystemExit(f"the peer read {read} rows")
        size = file.stat().st_size
    middle = {name: statistics.median(s) for name, s in took.items()}
    results = {
        "datasets.ingest_vs_hf": round(
            statistics.median(p / o for o, p in zip(took["ours"], took["peer"], strict=True)), 3
        ),
        "datasets.ingest_rss_mb": round(max(peaks), 1),
        "rows_per_second": {"ours": round(given.rows / middle["ours"]), "peer": round(given.rows / middle["peer"])},
        "seconds": {name: [round(s, 3) for s in all_] for name, all_ in took.items()},
        "file": {"rows": given.rows, "bytes": size, "kept_rows": kept},
        "bars": {"datasets.ingest_vs_hf": {"bar": 0.25, "goal": GOAL}, "datasets.ingest_rss_mb": {"bar": 300}},
        "conditions": report.conditions(
            ("grpcio", "protobuf", "orjson", "numpy", "datasets", "pyarrow"), rounds=given.rounds, seeds=[SEED]
        ),
    }
    figures = (
        f"ingest {results['datasets.ingest_vs_hf']} of load_dataset ({middle['ours']:.1f} s against "
        f"{middle['peer']:.1f} s), upload {middle['upload']:.1f} s of it, peak {results['datasets.ingest_rss_mb']} MB"
    )
    report.write("datasets", results, figures)
    report.judge(results, BARS)


if __name__ == "__main__":
    main()
