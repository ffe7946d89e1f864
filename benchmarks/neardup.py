"""`python -m benchmarks.neardup`: near duplicates of many rows, against datasketch's MinHashLSH in memory.

Ours is the worker's near.groups over a spool that lies on disk, from the call to
the groups: rows read and parsed, bags of words, signatures, bands written, sorted
and compared, the true similarity of every pair that is proposed. Reading a source
and sealing are not part of it. The peer is datasketch as its users call it (128
permutations, MinHash.update_batch, one MinHashLSH, a query for each row, groups by
union), over the same texts already in memory, with the same words as members, and
believes what the index proposes. Each runs in a process of its own; imports do not
count; memory is the growth of the peak meanwhile. Both are then held against what
was planted: copies at a true similarity of 0.8 or more, and copies just below it.

Writes benchmarks/results/neardup.json and a line in HISTORY.md. There is no bar.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import report

ROWS, ROUNDS, SEED, SIMILARITY = 100_000, 3, 20261121, 0.8
_SPOOL = """
import pathlib, sys
import orjson
from services.datasets.worker.plain import weigh
from services.datasets.worker.spool import Segment
segment = Segment(pathlib.Path(sys.argv[2]), 0)
with open(sys.argv[1], "rb") as f:
    for n, line in enumerate(f, 1):
        content, characters, words = weigh(orjson.loads(line))
        segment.add(line[:-1], content, n, n, (characters, words), 0, 0, 0, 4)
segment.close()
print("{}")
"""
_OURS = r"""
import json, pathlib, re, sys, time
import numpy as np, rensa
from services.datasets.worker import near
from services.datasets.worker.spool import Spool
rss = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e6
folder = pathlib.Path(sys.argv[2])
spool, before = Spool(folder, [0]), rss()
begun = time.perf_counter()
found = near.groups(spool, np.ones(spool.rows, bool), float(sys.argv[3]), folder, lambda *_: None)
took, after = time.perf_counter() - begun, rss()
print(json.dumps({"seconds": took, "rss_mb": after - before, "groups": found.tolist()}))
"""
_PEER = r"""
import json, re, sys, time
from collections import Counter
from datasketch import MinHash, MinHashLSH
rss = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e6
with open(sys.argv[1], "rb") as f:
    texts = [json.loads(line)["completion"]["completion"] for line in f]
before = rss()
begun = time.perf_counter()
lsh = MinHashLSH(threshold=float(sys.argv[3]), num_perm=128)
roots = list(range(len(texts)))
def root(n):
    while roots[n] != n:
        roots[n] = roots[roots[n]]
        n = roots[n]
    return n
for n, text in enumerate(texts):
    seen, members = Counter(), []
    for word in text.lower().split():
        members.append(f"{word} {seen[word]}".encode())
        seen[word] += 1
    signature = MinHash(num_perm=128)
    signature.update_batch(members)
    for other in lsh.query(signature):
        one, two = sorted((root(other), root(n)))
        roots[two] = one
    lsh.insert(n, signature, check_duplication=False)
groups = [root(n) for n in range(len(texts))]
took, after = time.perf_counter() - begun, rss()
print(json.dumps({"seconds": took, "rss_mb": after - before, "groups": groups}))
"""


def make(path: pathlib.Path, rows: int) -> dict[int, tuple[int, bool]]:
    """Texts of 20 to 100 words in random order; of the places of copies, those of their originals and whether near."""
    draw = random.Random(SEED)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    texts: list[list[str]] = []
    copies: dict[int, tuple[int, bool]] = {}
    while len(texts) < rows:
        text = draw.choices(words, k=draw.randint(20, 100))
        texts.append(text)
        if draw.random() < 0.15 and len(texts) < rows:
            # A text with k of n words new has a similarity of (n - k) / (n + k), so 0.8 with one in nine.
            most = len(text) // 9
            is_near = draw.random() < 2 / 3
            count = draw.randint(0 if is_near else most + 1, most if is_near else 2 * most + 2)
            changed = list(text)
            for n, at in enumerate(draw.sample(range(len(text)), count)):
                changed[at] = f"new{len(texts)}x{n}"
            copies[len(texts)] = (len(texts) - 1, is_near)
            texts.append(changed)
    order = list(range(len(texts)))
    draw.shuffle(order)
    place = {number: at for at, number in enumerate(order)}
    with path.open("w") as out:
        for number in order:
            out.write(json.dumps({"completion": {"completion": " ".join(texts[number])}}) + "\n")
    return {place[copy]: (place[first], is_near) for copy, (first, is_near) in copies.items()}


def one(program: str, file: pathlib.Path, folder: str) -> dict[str, Any]:
    """What a program says of the file."""
    asked = [sys.executable, "-c", program, str(file), folder, str(SIMILARITY)]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=report.ROOT).stdout
    answer: dict[str, Any] = json.loads(told)
    return answer


def judged(groups: list[int], copies: dict[int, tuple[int, bool]]) -> dict[str, float]:
    """How many of the planted copies were found, and how much of what was found was planted."""
    right = sum(is_near and groups[copy] == groups[first] for copy, (first, is_near) in copies.items())
    joined = len(groups) - len(set(groups))
    return {
        "recall": round(right / max(1, sum(is_near for _, is_near in copies.values())), 4),
        "precision": round(right / max(1, joined), 4),
    }


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rows", type=int, default=ROWS)
    asked.add_argument("--rounds", type=int, default=ROUNDS)
    given = asked.parse_args()
    took: dict[str, list[float]] = {"ours": [], "peer": []}
    rss: dict[str, list[float]] = {"ours": [], "peer": []}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.jsonl"
        copies = make(file, given.rows)
        size = file.stat().st_size
        one(_SPOOL, file, folder)
        for _ in range(given.rounds):
            for name, program in (("ours", _OURS), ("peer", _PEER)):
                told = one(program, file, folder)
                took[name].append(told["seconds"])
                rss[name].append(told["rss_mb"])
                found[name] = judged(told["groups"], copies)
    speed = {name: round(given.rows / statistics.median(s)) for name, s in took.items()}
    ratio = statistics.median(p / o for o, p in zip(took["ours"], took["peer"], strict=True))
    results = {
        "datasets.neardup_rows_s": {"ours": speed["ours"], "peer": speed["peer"], "ratio": round(ratio, 3)},
        "found": found,
        "rss_mb": {name: round(max(all_), 1) for name, all_ in rss.items()},
        "seconds": {name: [round(s, 3) for s in all_] for name, all_ in took.items()},
        "rows": {
            "all": given.rows,
            "bytes": size,
            "near": sum(is_near for _, is_near in copies.values()),
            "just_below": sum(not is_near for _, is_near in copies.values()),
            "similarity": SIMILARITY,
        },
        "conditions": report.conditions(
            ("numpy", "rensa", "orjson", "datasketch", "scipy"), rounds=given.rounds, seeds=[SEED]
        ),
    }
    figures = (
        f"{speed['ours']} rows/s, {ratio:.2f} of datasketch ({speed['peer']}), recall {found['ours']['recall']} "
        f"({found['peer']['recall']}), precision {found['ours']['precision']} ({found['peer']['precision']}), "
        f"memory {results['rss_mb']['ours']} MB ({results['rss_mb']['peer']}), {given.rows} rows"
    )
    report.write("neardup", results, figures)


if __name__ == "__main__":
    main()
