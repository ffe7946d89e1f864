"""Serving: tokens a second of many adapters at once, latency, loading, growth, beside transformers and peft.

    python -m benchmarks.serve --quick                           # some minutes: the parts of QUICK
    python -m benchmarks.serve                                   # every key
    python -m benchmarks.serve --parts mixed,base,single --rounds 3 --home FOLDER

Ours is the daemon, asked by gRPC; the peers run in a process of their own. Each side's runs come in turns: ours,
theirs, ours, theirs; the figure is the ratio of medians. Both sides have every core, but where a part says
otherwise. No prompt is asked of ours twice. Writes benchmarks/results/serve.json and a line in
benchmarks/HISTORY.md. Ends with 1 if a bar is not met.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
import tempfile
from typing import Any

from benchmarks import report, serve_home
from benchmarks.serve_parts import THREADS, Bench
from benchmarks.serve_shapes import Shapes

PARTS = ("mixed", "base", "single", "grpc", "latency", "adapter", "model", "growth", "load")
QUICK = ("mixed", "base", "single", "grpc", "adapter", "load")
BARS = {
    "serve.mixed8_vs_switching": (8.0, True),
    "serve.mixed8_vs_peft_mixed": (2.0, True),
    "serve.mixed8_vs_vllm": (3.0, True),
    "serve.lora_tax": (0.75, True),
    "serve.base16_vs_hf": (1.0, True),
    "serve.single_vs_hf": (1.2, True),
    "serve.single_best_vs_hf": (2.0, True),
    "serve.single_vs_llamacpp": (0.7, True),
    "serve.grpc_overhead": (1.10, False),
    "serve.ttft_p99_ratio": (2.0, False),
    "serve.itl_p99_ratio": (2.0, False),
    "adapter.load_vs_peft": (0.5, False),
    "model.load_vs_hf": (0.5, False),
    "serve.growth": (1.0, False),
    "serve.load_errors": (0.0, False),
}
GOALS = {
    "serve.mixed8_vs_switching": 12.0, "serve.mixed8_vs_peft_mixed": 3.0, "serve.mixed8_vs_vllm": 5.0,
    "serve.lora_tax": 0.88, "serve.base16_vs_hf": 1.3, "serve.single_vs_hf": 1.8, "serve.single_best_vs_hf": 3.0,
    "serve.single_vs_llamacpp": 1.0, "serve.grpc_overhead": 1.03, "serve.ttft_p99_ratio": 1.3,
    "serve.itl_p99_ratio": 1.3, "adapter.load_vs_peft": 0.3, "model.load_vs_hf": 0.2,
}  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "grpcio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"by default only {','.join(QUICK)}, shorter")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="turns of each side; three by default with --quick, else five")
    parser.add_argument("--home", type=pathlib.Path, help="keeps models and adapters here for the next run")
    parser.add_argument("--vllm", help="a Python that has vLLM; without it that peer is left out")
    parser.add_argument("--llamacpp", help="a Python that has llama-cpp-python and gguf; likewise")
    given = parser.parse_args()
    parts = (given.parts or ",".join(QUICK if given.quick else PARTS)).split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise SystemExit(f"--parts: got {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    rounds = given.rounds or (3 if given.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        home = given.home or pathlib.Path(folder) / "home"
        if not (home / serve_home.MODEL).exists():
            serve_home.make_home(home)
        own = {"vllm": given.vllm or has("vllm"), "llamacpp": given.llamacpp or has("llama_cpp", "gguf")}
        bench = Bench(home, rounds, given.quick, {name: python for name, python in own.items() if python})
        shapes = Shapes(bench)
        with bench:
            for part in parts:
                with bench.timed(part):
                    getattr(bench if hasattr(bench, part) else shapes, part)()
    finish(bench.results, parts, rounds, given.quick)


def has(*modules: str) -> str:
    """This Python, if it has all of these."""
    return sys.executable if all(importlib.util.find_spec(m) for m in modules) else ""


def finish(results: dict[str, Any], parts: list[str], rounds: int, quick: bool) -> None:
    """Writes what was found, and ends with 1 where a bar is not met."""
    judged = {key: bar for key, bar in BARS.items() if key in results}
    whole = not quick and set(parts) == set(PARTS)
    if "serve.lora_tax" in results:
        results["lora_tax_counts"] = results["serve.base16_vs_hf"] >= BARS["serve.base16_vs_hf"][0]
    results["bars"] = {k: {"bar": bar, "goal": GOALS.get(k)} for k, (bar, _) in judged.items()}
    results["conditions"] = report.conditions(
        PACKAGES, rounds=rounds, parts=",".join(parts), seeds=[serve_home.SEED], whole=whole, quick=quick,
        threads=THREADS, peers="bfloat16",
    )  # fmt: skip
    figures = ", ".join(f"{key.partition('.')[2] or key} {results[key]}" for key in judged)
    part = "quick" if quick else "-".join(parts)
    report.write("serve" if whole else f"serve-{part}", results, figures + ("" if whole else " (in part)"))
    report.judge(results, judged)


if __name__ == "__main__":
    main()
