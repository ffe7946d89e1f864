"""What a starter model learns of each dataset in examples/datasets, and the page that tells it (docs/shipped.md).

    python examples/learn_shipped.py [--size test|demo] [--threads N] [--sets NAME …] [--page FILE]

Each set becomes a dataset with a tenth of its rows held out, a QLoRA job on the
starter model, and answers of base and tuned model to questions that were held
out. All of it goes through the daemons and the public command line, as in
demo.py. Nothing is left running; the home ($QLORAD_HOME, else .cache/shipped)
stays. Ends with 1 where a hold-out loss fell by less than was hoped for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Any

from demo import LEAST_DROP, ROOT, Demo, Failed

FOLDER = "examples/datasets"
SEED = "7"
ANSWER_TOKENS = "120"
STEP_TOKENS = 1024
SHOWN_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Shipped:
    """A shipped set, how it is taught, and what to look for in the answers.

    Few rows are soon known by heart, so small sets take fewer steps and more dropout.
    """

    file: str
    steps: int
    dropout: str
    look: str
    options: tuple[str, ...] = ()
    longest: int = 512
    """Tokens of its longest rows, at least. A summary of a paper has all of the paper in its question."""

    @property
    def name(self) -> str:
        return self.file.partition(".")[0]


SETS = (
    Shipped(
        "python-functions.jsonl",
        300,
        "0.0",
        "The shape of a row: the import, type hints, a docstring of a sentence with an example below it, then a body.",
    ),
    Shipped(
        "code-review.jsonl",
        500,
        "0.3",
        "The shape of a review: a severity with a kind in brackets, a finding in prose, then code in a fence.",
    ),
    Shipped(
        "coding-principles.jsonl",
        300,
        "0.4",
        "Prose where the base knows only code; the words of the set, and not yet its parts.",
    ),
    Shipped(
        "genomics-papers.json",
        160,
        "0.3",
        "The form of each section: what is asked, lists of settings and checks, genes between stars.",
        ("--min-score", "0.5"),
        longest=2048,
    ),
)
LEARNING_RATE = {"test": "1e-2", "demo": "6e-3"}
CONTEXT = {"test": 1024, "demo": 2048}
LEAST = {"test": 0.05, "demo": LEAST_DROP}
INTRO = """\
# What the shipped datasets teach

The [shipped sets](../examples/datasets/README.md), each taught to the demo's starter model: a QLoRA job on all linear
modules, a tenth of the rows held out with seed {seed}, learning rate {rate}, 1,024 tokens a step, 2,048 for papers. The
loss is the mean over all trained tokens of the rows that were held out, measured in the same way before the first and
after the last step. All rows of a paper are on one side. Steps and dropout were chosen with these rows in view, so the
figures flatter a little. `python examples/learn_shipped.py --page docs/shipped.md` makes this page; a test holds it
against the files.

The starter has {weights} weights and knows nothing but the source of the Python standard library. So look at form, tone
and words in the answers, not at sense: a model of this size can neither write a function that works nor find a fault.
The same command lines teach a larger base.
"""
FEW = """\
There is too little text in them for this base, which has hardly met prose: more steps
learn the rows by heart, and the hold-out loss rises again."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """What became of a set."""

    shipped: Shipped
    dataset: str
    rows: dict[str, int]
    steps: int
    before: float
    after: float
    samples: tuple[tuple[str, str, str], ...]
    """Question, the base's answer, the tuned model's answer."""

    @property
    def drop(self) -> float:
        return 1 - self.after / self.before


class School(Demo):
    """The demo's daemons, with one job after the other."""

    def __init__(self, home: pathlib.Path, size: str, threads: int) -> None:
        super().__init__(home, size)
        self.threads = threads

    def teach(self, shipped: Shipped) -> Learnt:
        """Uploads a set, trains on it, and asks what was held out."""
        self.qlorad(
            "dataset", "upload", f"{FOLDER}/{shipped.file}", "--name", shipped.name,
            "--validation", "0.1", "--seed", SEED, "--move", *shipped.options,
        )  # fmt: skip
        self.job = f"{shipped.name}-{self.size}-{time.strftime('%Y%m%d-%H%M%S')}"
        model, steps = f"starter-{self.size}", shipped.steps
        longest = min(shipped.longest, CONTEXT[self.size])
        self.qlorad(
            "job", "start", "--model", model, "--dataset", shipped.name, "--template", "all-linear",
            "--set", f"schedule.max_steps={steps}", "--set", f"optimizer.learning_rate={LEARNING_RATE[self.size]}",
            "--set", f"lora.dropout={shipped.dropout}", "--set", f"data.max_length_tokens={longest}",
            "--set", f"data.micro_batch_tokens={max(longest, STEP_TOKENS)}",
            # The smallest starter has too little context for summaries of papers; the job tells how many are dropped.
            *(("--set", "data.over_length=OVER_LENGTH_DROP") if longest < shipped.longest else ()),
            *(("--set", f"threads={self.threads}") if self.threads else ()),
            "--name", shipped.name, "--job-id", self.job, "--free-serving",
        )  # fmt: skip
        result, made = self.ask("job", "show", self.job)["result"], self.ask("dataset", "show", shipped.name)
        held_out = sorted((self.question(row) for row in self.rows_of(shipped.name, "validation")), key=len)
        asked = list(dict.fromkeys((held_out[0], held_out[len(held_out) // 2])))
        return Learnt(
            shipped,
            made["digest"],
            {split: int(count) for split, count in made["stats"]["rows"].items()},
            steps,
            result["eval_loss_before"],
            result["eval_loss_after"],
            tuple((question, *self.answers(question, shipped.name, model)) for question in asked),
        )

    def answers(self, question: str, adapter: str, model: str) -> tuple[str, str]:
        """What the base and the tuned model say, the likeliest token each time."""
        told = self.ask(
            "compare", question, "--adapter", adapter, "--model", model, "--max-tokens", ANSWER_TOKENS,
            "--temperature", "0",
        )  # fmt: skip
        said = {answer["adapter"]: answer["text"] for answer in told["answers"]}
        return said["base"], said[adapter]


def sha256(file: str) -> str:
    return hashlib.sha256((ROOT / FOLDER / file).read_bytes()).hexdigest()


def quoted(text: str) -> str:
    """A text as it stands in the page: in a fence that it does not close, cut where it is long."""
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
    return f"~~~~text\n{shown.strip()}\n~~~~"


def page(learnt: list[Learnt], model: Any) -> str:
    """docs/shipped.md."""
    intro = INTRO.format(seed=SEED, rate=LEARNING_RATE["demo"], weights=f"{model['parameters']:,}")
    lines = [intro, "| set | file, sha256 | learnt | held out | steps | dropout | before | after | less |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for made in learnt:
        loss = f"{made.before:.3f} | {made.after:.3f} | {made.drop:.0%}"
        rows = f"{made.rows['train']} | {made.rows['validation']}"
        taught = f"{made.steps} | {made.shipped.dropout}"
        lines.append(f"| {made.shipped.name} | `{sha256(made.shipped.file)[:16]}` | {rows} | {taught} | {loss} |")
    lines.append("")
    if little := [made.shipped.name for made in learnt if made.drop < LEAST_DROP]:
        lines += [f"Below {LEAST_DROP:.0%}: {', '.join(little)}. {FEW}", ""]
    lines += [f"Model `{model['digest']}`.", ""]
    for made in learnt:
        lines += [f"## {made.shipped.name}", "", f"Dataset `{made.dataset}`. What to look for: {made.shipped.look}", ""]
        for question, base, tuned in made.samples:
            lines += ["Asked, and never learnt:", "", quoted(question), "", "The base says:", "", quoted(base), ""]
            lines += [f"After {made.steps} steps:", "", quoted(tuned), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def run(school: School, chosen: list[Shipped], out: pathlib.Path | None) -> None:
    """All sets in order, then the page; Failed where one was learnt too little."""
    school.start_daemons()
    school.qlorad("model", "starter", "--size", school.size)
    learnt = [school.teach(shipped) for shipped in chosen]
    print()
    for made in learnt:
        print(
            f"{made.shipped.name}: hold-out loss {made.before:.3f} before, {made.after:.3f} after: {made.drop:.0%} less"
        )
    if out is not None:
        out.write_text(page(learnt, school.ask("model", "show", f"starter-{school.size}")), "utf-8")
        print(f"written to {out}")
    least = LEAST[school.size]
    if little := [made.shipped.name for made in learnt if made.drop < least]:
        raise Failed(f"the loss on {', '.join(little)} fell by less than {least:.0%}")


def main() -> int:
    """Runs the lessons; 0 if all went well."""
    parser = argparse.ArgumentParser(description="What a starter model learns of each shipped dataset.")
    parser.add_argument("--size", choices=sorted(LEARNING_RATE), default="demo")
    parser.add_argument("--threads", type=int, default=0, help="of each job; 0 leaves it to the daemon")
    parser.add_argument("--sets", nargs="*", choices=[s.name for s in SETS], default=[s.name for s in SETS])
    parser.add_argument("--page", type=pathlib.Path, default=None, help="where to write the page; else none is written")
    given = parser.parse_args()
    os.chdir(ROOT)
    home = pathlib.Path(os.environ.get("QLORAD_HOME") or ROOT / ".cache" / "shipped").expanduser().absolute()
    school = School(home, given.size, given.threads)
    try:
        run(school, [s for s in SETS if s.name in given.sets], given.page)
    except Failed as e:
        print(f"\nfailed: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        school.end()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
