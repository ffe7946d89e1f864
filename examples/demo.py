"""`make demo`: from a file of examples to a tuned model's answer, with the public command line and client alone.

    python examples/demo.py [--size test|demo]

Every step is a `qlorad` command that is printed before it runs. Whatever
happens, nothing is left running. The home ($QLORAD_HOME, else .cache/demo in the
repository) stays: the second run finds the starter model on its shelf.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from types import FrameType
from typing import Any

import qlorad

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "datasets" / "python-functions.jsonl"
LEARNING_RATE = {"test": "1e-2", "demo": "6e-3"}
STEPS = {"test": "400", "demo": "200"}
LEAST_DROP = 0.30


class Failed(Exception):
    """A step that did not go well; the text is for people."""


class Demo:
    """The demo in one home."""

    def __init__(self, home: pathlib.Path, size: str) -> None:
        self.size = size
        self.home = home
        self.job = f"demo-{size}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.environ = {**os.environ, "QLORAD_HOME": str(home)}
        self.up = False
        self.over = threading.Event()

    def qlorad(self, *words: str, show: bool = True) -> None:
        """Runs a command before the reader's eyes."""
        if show:
            print(f"\n$ qlorad {shlex.join(words)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "qlorad.cli.main", *words], env=self.environ).returncode
        if code:
            raise Failed(f"qlorad {words[0]} ended with exit code {code}")

    def ask(self, *words: str) -> Any:
        """Runs a command quietly and reads its JSON."""
        command = [sys.executable, "-m", "qlorad.cli.main", *words, "-o", "json"]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        if done.returncode:
            raise Failed(
                f"qlorad {shlex.join(words)} ended with exit code {done.returncode}: {done.stdout}{done.stderr}"
            )
        return json.loads(done.stdout)

    def run(self) -> None:
        """All steps, top to bottom."""
        self.start_daemons()
        model = f"starter-{self.size}"
        self.qlorad("model", "starter", "--size", self.size)
        self.qlorad(
            "dataset", "upload", str(EXAMPLES.relative_to(ROOT)), "--name", "demo", "--validation", "0.1",
            "--seed", "7", "--move",
        )  # fmt: skip
        question = self.check_leaks()
        aside = threading.Thread(target=self.scrape_in_training, daemon=True)
        aside.start()
        self.qlorad(
            "job", "start", "--model", model, "--dataset", "demo", "--template", "all-linear",
            "--set", f"schedule.max_steps={STEPS[self.size]}",
            "--set", f"optimizer.learning_rate={LEARNING_RATE[self.size]}",
            "--name", "demo", "--job-id", self.job,
        )  # fmt: skip
        self.over.set()
        aside.join(30)
        result = self.check_result()
        self.qlorad("compare", question, "--adapter", "demo", "--model", model, "--max-tokens", "96")
        self.scrape("end")
        print(f"\nmetrics of all four, in training and at the end, are in {self.home / 'metrics'}")
        print(f"adapter {result['adapter_digest']}")

    def start_daemons(self) -> None:
        """The four daemons, on free ports, in the demo's own home."""
        if self.ask_status()["supervisor_pid"]:
            if "QLORAD_HOME" in os.environ:
                raise Failed(f"{self.home} is up already; `qlorad down` first, or unset QLORAD_HOME")
            self.qlorad("down")
        self.up = True
        self.qlorad("up", "--detach", "--ports", "0")

    def ask_status(self) -> Any:
        """How the home stands; `status` answers also where its exit code says that not all is up."""
        command = [sys.executable, "-m", "qlorad.cli.main", "status", "-o", "json"]
        return json.loads(subprocess.run(command, env=self.environ, capture_output=True, text=True).stdout)

    def check_leaks(self) -> str:
        """Compares every hold-out row with all training rows; returns a hold-out question."""
        train = {self.key(row) for row in self.rows_of("demo", "train")}
        held_out = self.rows_of("demo", "validation")
        leaks = [row for row in held_out if self.key(row) in train]
        print(f"\nleak check: {len(leaks)} of {len(held_out)} hold-out rows are among the {len(train)} training rows")
        if leaks or not held_out or not train:
            raise Failed("the hold-out is not apart from the training rows")
        return min((self.question(row) for row in held_out), key=len)

    def rows_of(self, dataset: str, split: str) -> list[Any]:
        """The sealed examples of a split."""
        words = ("dataset", "export", dataset, "--split", split)
        done = subprocess.run(
            [sys.executable, "-m", "qlorad.cli.main", *words], env=self.environ, capture_output=True, check=True
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    @staticmethod
    def key(row: Any) -> str:
        """A row as the leak check sees it: what is said, whatever the spaces and the case."""
        body = {k: v for k, v in row.items() if k in ("chat", "completion")}
        return " ".join(json.dumps(body, sort_keys=True).lower().replace("\\n", " ").split())

    @staticmethod
    def question(row: Any) -> str:
        """What the user asks in a row."""
        for message in row.get("chat", {}).get("messages", []):
            if message["role"] == "ROLE_USER":
                return "".join(part["text"] for part in message["parts"])
        return str(row.get("completion", {}).get("prompt", ""))

    def check_result(self) -> Any:
        """Hold-out loss before and after; the demo fails unless it dropped enough."""
        result = self.ask("job", "show", self.job)["result"]
        before, after = result["eval_loss_before"], result["eval_loss_after"]
        drop = 1 - after / before
        print(f"\nhold-out loss {before:.3f} before, {after:.3f} after: {drop:.0%} less", flush=True)
        if drop < LEAST_DROP:
            raise Failed(f"the hold-out loss dropped by {drop:.0%}; at least {LEAST_DROP:.0%} was hoped for")
        return result

    def scrape_in_training(self) -> None:
        """Keeps what the daemons tell Prometheus while the job trains, by a client beside the one that shows it."""
        with qlorad.connect(home=self.home) as client:
            while True:
                try:
                    for event in client.jobs.watch(self.job):
                        if event.step.step >= 2:
                            self.scrape("training")
                            return
                    return
                except qlorad.errors.NotFound:
                    if self.over.wait(0.3):
                        return

    def scrape(self, moment: str) -> None:
        """What each daemon tells Prometheus, kept in the home."""
        folder = self.home / "metrics" / moment
        folder.mkdir(parents=True, exist_ok=True)
        for daemon in self.ask_status()["daemons"]:
            with urllib.request.urlopen(f"http://{daemon['metrics']}/metrics", timeout=10) as answer:
                (folder / f"{daemon['service']}.prom").write_bytes(answer.read())

    def end(self) -> None:
        """Stops a job that is under way, then the daemons. Not to be interrupted."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if not self.up:
            return
        try:
            if not self.ask("job", "show", self.job)["is_terminal"]:
                self.ask("job", "cancel", self.job)
                end = time.monotonic() + 60
                while not self.ask("job", "show", self.job)["is_terminal"] and time.monotonic() < end:
                    time.sleep(0.3)
        except Failed:
            pass  # no such job yet, or no trainer left to ask: `down` comes in any case
        self.qlorad("down")


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the demo; 0 if all went well."""
    parser = argparse.ArgumentParser(description="The qlorad demo.")
    parser.add_argument("--size", choices=sorted(STEPS), default="demo")
    size = parser.parse_args().size
    os.chdir(ROOT)
    home = pathlib.Path(os.environ.get("QLORAD_HOME") or ROOT / ".cache" / "demo").expanduser().absolute()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    demo, begin = Demo(home, size), time.monotonic()
    try:
        demo.run()
    except Failed as e:
        print(f"\nthe demo failed: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nthe demo was interrupted", file=sys.stderr)
        return 130
    finally:
        demo.end()
    print(f"\ndone in {time.monotonic() - begin:.0f} s; nothing is left running")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
