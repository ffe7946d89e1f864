"""`python -m benchmarks.ledger`: tokens of a ledger a second, against AutoTokenizer on the same rows.

Ours is BuildLedger through the door of a running daemon, from the call to the
sealed ledger: start of the worker, digests of dataset and model verified, rows
rendered, encoded, masked, written, sealed. The peer is transformers as its users
call it: AutoTokenizer.apply_chat_template(tokenize=True) over the same rows, already
parsed, in one batch, tokens in memory; its imports and loading do not count. The
second peer gets the texts already rendered: plain tokenizer(texts).

Writes benchmarks/results/ledger.json and a line in benchmarks/HISTORY.md. Ends with
1 if the bar is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from benchmarks import daemons, report
from qlorad.v1 import artifacts_pb2, datasets_pb2, datasets_pb2_grpc, registry_pb2, registry_pb2_grpc
from services.common import shards
from services.common.prompt.example import line_of
from services.common.shelf import Shelf

ROWS, ROUNDS, SEED, LONGEST = 100_000, 5, 20260203, 500
BARS = {"datasets.ledger_tokens_s": (1.0, True)}
"""Ours divided by apply_chat_template."""
PACKAGES = ("tokenizers", "transformers", "jinja2", "orjson", "numpy", "grpcio")


def rows(count: int) -> list[dict[str, Any]]:
    """Chats of two to six turns, made of lines of the standard library."""
    draw = random.Random(SEED)
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    lines = [
        line.strip()
        for path in sorted(library.glob("*.py"))
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if 10 < len(line.strip()) < 100
    ]
    made = []
    for number in range(count):
        messages = []
        if draw.random() < 0.3:
            messages.append({"role": "ROLE_SYSTEM", "parts": [{"text": "You write short Python."}]})
        for turn in range(2 * draw.randint(1, 3)):
            role = "ROLE_ASSISTANT" if turn % 2 else "ROLE_USER"
            text = "\n".join(draw.choices(lines, k=1 + min(4, int(draw.lognormvariate(0.2, 0.7)))))
            messages.append({"role": role, "parts": [{"text": text}]})
        made.append({"chat": {"messages": messages}, "origin": {"file": "made.jsonl", "line": number + 1}})
    return made


def starter(home: pathlib.Path) -> None:
    """models/starter-test in the home."""
    with daemons.running("registry", home), grpc.insecure_channel(daemons.address("registry", home)) as channel:
        stub = registry_pb2_grpc.ModelServiceStub(channel)
        size = registry_pb2.STARTER_SIZE_TEST
        list(stub.MakeStarterModel(registry_pb2.MakeStarterModelRequest(request_id="s", size=size)))


def seal(home: pathlib.Path, made: list[dict[str, Any]]) -> None:
    """datasets/bench in the home."""
    shelf = Shelf(home / "store")
    staged = shelf.stage()
    with shards.ShardWriter(staged.payload, "train") as writer:
        for row in made:
            writer.add(line_of(row))
    (staged.payload / "findings.jsonl").write_bytes(b"")
    sealed = shelf.seal(staged, artifacts_pb2.ARTIFACT_KIND_DATASET, {"made": "for a bench"})
    shelf.set_alias("datasets", "bench", sealed.digest)


def ours(stub: datasets_pb2_grpc.DatasetServiceStub, length: int) -> tuple[float, int, int]:
    """Seconds, tokens and trained tokens of a ledger that nobody built before."""
    request = datasets_pb2.BuildLedgerRequest(
        dataset="datasets/bench", model="models/starter-test", max_length_tokens=length
    )
    begun = time.monotonic()
    (split,) = list(stub.BuildLedger(request, timeout=600))[-1].ledger.splits
    return time.monotonic() - begun, split.tokens, split.trained_tokens


PEER = """
import json, sys, time
from transformers import AutoTokenizer
model, chats, kind = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
talks = [json.loads(line) for line in open(chats, encoding="utf-8")]
texts = tokenizer.apply_chat_template(talks, tokenize=False) if kind == "plain" else None
tokenizer.apply_chat_template(talks[:100], tokenize=True, return_dict=False)
begun = time.monotonic()
if kind == "plain":
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
elif kind == "masked":
    both = tokenizer.apply_chat_template(talks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = both["input_ids"]
else:
    ids = tokenizer.apply_chat_template(talks, tokenize=True, return_dict=False)
print(time.monotonic() - begun, sum(map(len, ids)))
"""


def peer(model: pathlib.Path, chats: pathlib.Path, kind: str) -> tuple[float, int]:
    """Seconds and tokens of transformers, with its threads on."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-W", "ignore", "-c", PEER, str(model), str(chats), kind]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    return float(told[-2]), int(told[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"ours": [], "chat": [], "masked": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder) / "home"
        home.mkdir()
        starter(home)
        made = rows(given.rows)
        seal(home, made)
        chats = home / "chats.jsonl"
        roles = {"ROLE_SYSTEM": "system", "ROLE_USER": "user", "ROLE_ASSISTANT": "assistant"}
        with chats.open("w", encoding="utf-8") as f:
            for row in made:
                turns = [{"role": roles[m["role"]], "content": m["parts"][0]["text"]} for m in row["chat"]["messages"]]
                f.write(json.dumps(turns, ensure_ascii=False) + "\n")
        del made
        model = Shelf(home / "store").open("models", "starter-test").payload
        with daemons.running("datasets", home), grpc.insecure_channel(daemons.address("datasets", home)) as channel:
            stub = datasets_pb2_grpc.DatasetServiceStub(channel)
            for number in range(given.rounds + 1):  # the first round warms the disk cache and does not count
                taken, tokens, trained = ours(stub, LONGEST - number)
                others = {kind: peer(model, chats, kind) for kind in ("chat", "masked", "plain")}
                if any(found != tokens for _, found in others.values()):
                    raise SystemExit(f"not the same tokens: ours {tokens}, peers {others}")
                if number:
                    seconds["ours"].append(taken)
                    for kind, (peers, _) in others.items():
                        seconds[kind].append(peers)
                print(number, f"ours {taken:.2f} s", {k: f"{s:.2f} s" for k, (s, _) in others.items()}, flush=True)
    middle = {k: statistics.median(v) for k, v in seconds.items()}
    results = {
        "datasets.ledger_tokens_s": round(middle["chat"] / middle["ours"], 3),
        "against_masked": round(middle["masked"] / middle["ours"], 3),
        "against_plain": round(middle["plain"] / middle["ours"], 3),
        "tokens": tokens,
        "trained_tokens": trained,
        "tokens_per_second": {k: round(tokens / v) for k, v in middle.items()},
        "seconds": {k: [round(s, 3) for s in v] for k, v in seconds.items()},
        "bars": {k: {"bar": bar} for k, (bar, _) in BARS.items()},
        "conditions": report.conditions(PACKAGES, rows=given.rows, rounds=given.rounds, seeds=[SEED]),
    }
    figures = (
        f"{results['datasets.ledger_tokens_s']} of apply_chat_template, {results['against_masked']} of it with masks, "
        f"{results['against_plain']} of tokenizer(texts), {given.rows} rows"
    )
    report.write("ledger", results, figures)
    report.judge(results, BARS)


if __name__ == "__main__":
    main()
