"""Every verb of the command line against the real daemons."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess

import pytest

from tests.client.cli import Cli
from tests.house import ROOT, eventually
from tests.samples import sample_rows

JOB = (
    "--model", "starter-test", "--dataset", "sample", "--template", "all-linear", "--set", "data.max_length_tokens=256",
    "--set", "optimizer.learning_rate=5e-3", "--free-serving",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file of 40 rows."""
    path = tmp_path_factory.mktemp("rows") / "My_Rows.jsonl"
    path.write_bytes(sample_rows(40))
    return path


def test_datasets_go_in_and_come_out(cli: Cli, rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = cli.json("dataset", "upload", str(rows), "--validation", "0.2", "--seed", "3")
    assert made["name"] == "datasets/my-rows" and sum(made["stats"]["rows"].values()) == 40
    assert made["stats"]["rows"]["validation"] > 0
    assert cli.json("dataset", "show", "my-rows")["digest"] == made["digest"]
    assert cli.json("dataset", "show", made["digest"])["digest"] == made["digest"]
    assert {d["name"] for d in cli.json("dataset", "list")["datasets"]} >= {"datasets/my-rows", "datasets/sample"}
    assert "my-rows" in cli.run("dataset", "list").stdout
    assert len(cli.json("dataset", "preview", "my-rows", "--rows", "2")["examples"]) == 2
    assert "[user]" in cli.run("dataset", "preview", "my-rows").stdout
    assert {f["severity"] for f in cli.json("dataset", "findings", "my-rows")["findings"]} >= {"SEVERITY_WARNING"}

    out = tmp_path / "out.jsonl"
    told = cli.json("dataset", "export", "my-rows", "--format", "instruction", "--to", str(out))
    assert (told["file"], told["rows"]) == (str(out), 40)
    assert sorted(out.read_text().splitlines()) == sorted(
        cli.run("dataset", "export", "my-rows", "--format", "instruction").stdout.splitlines()
    )
    assert all("instruction" in json.loads(line) for line in out.read_text().splitlines())

    told = cli.json("dataset", "ledger", "my-rows", "--model", "starter-test", "--max-length", "256", "--rows", "2")
    assert [r["row"] for r in told["rows"]] == [0, 1]
    assert len(told["rows"][0]["ids"]) == len(told["rows"][0]["trained"])
    shown = cli.run("dataset", "ledger", "my-rows", "--model", "starter-test", "--max-length", "256").stdout
    assert "[[" in shown and "]]" in shown and "{{" not in shown and "--- row 0 (My_Rows.jsonl:" in shown
    how = ("--model", "starter-test", "--max-length", "32", "--over-length", "truncate", "--prompt-format", "llama2")
    shown = cli.run("dataset", "ledger", "my-rows", *how).stdout
    assert "[INST] " in shown and "{{" in shown and "}}" in shown
    again = cli.json("dataset", "upload", str(rows), code=1)["error"]
    assert again["code"] == "ALREADY_EXISTS"
    assert cli.json("dataset", "delete", "my-rows")["freed_bytes"] > 0
    assert cli.json("dataset", "show", "my-rows", code=3)["error"]["reason"] == "NOT_FOUND"


def test_models_are_listed_shown_loaded_unloaded(cli: Cli) -> None:
    shown = cli.json("model", "show", "starter-test")
    assert shown["state"] == "MODEL_STATE_READY" and isinstance(shown["parameters"], int)
    assert [m["digest"] for m in cli.json("model", "list")["models"]] == [shown["digest"]]
    assert cli.lines("model", "list") == cli.json("model", "list")["models"]
    table = cli.inside("model", "list").splitlines()
    assert table[0].split()[:2] == ["NAME", "STATE"] and table[1].split()[:2] == ["starter-test", "READY"]
    assert cli.json("model", "starter")["digest"] == shown["digest"]
    loaded = cli.json("model", "load", "starter-test", "--precision", "nf4")
    assert loaded["digest"] == shown["digest"] and loaded["precision"] == "PRECISION_NF4"
    assert [m["digest"] for m in cli.json("model", "loaded")["models"]] == [shown["digest"]]
    assert cli.json("model", "unload")["freed_bytes"] > 0
    assert cli.json("model", "loaded")["models"] == []
    assert "no model is loaded" in cli.run("model", "loaded").stderr
    assert cli.json("model", "unload", code=3)["error"]["code"] == "NOT_FOUND"


def test_adapters_travel_and_keep_their_digest(cli: Cli, tmp_path: pathlib.Path) -> None:
    shown = cli.json("adapter", "show", "sample")
    folder = tmp_path / "adapter"
    cli.run("adapter", "download", "sample", "--to", str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    taken = cli.json("adapter", "import", str(folder), "--base", "starter-test", "--name", "copy")
    assert taken["digest"] == shown["digest"]
    alias = cli.json("adapter", "alias", "prod", "sample", "--generation", "0")
    assert alias["digest"] == shown["digest"] and alias["generation"] == 1
    assert cli.json("adapter", "alias", "prod", "copy", "--generation", "7", code=1)["error"]["code"] == "ABORTED"
    listed = cli.json("adapter", "list", "--model", "starter-test")["adapters"]
    assert {shown["digest"]} == {a["digest"] for a in listed}
    cli.json("adapter", "delete", "copy")
    cli.json("adapter", "delete", "prod")
    assert cli.json("adapter", "show", "prod", code=3)["error"]["resource"] == "adapters/prod"
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04 not safetensors")
    refused = cli.json("adapter", "import", str(folder), "--base", "starter-test", "--name", "bad", code=1)["error"]
    assert refused["reason"] == "REJECTED"
    missing = cli.json("adapter", "import", str(tmp_path), "--base", "starter-test", "--name", "bad", code=2)
    assert "adapter_config.json" in missing["error"]["message"]


def test_answers_stream_and_what_is_needed_is_loaded_first(cli: Cli) -> None:
    asked = ("--max-tokens", "12", "--adapter", "sample", "write a function that can add numbers")
    first = cli.run("generate", *asked)
    assert "loading adapters/sample" in first.stderr and "loading models/" in first.stderr
    told = cli.json("generate", *asked)
    assert told["text"].strip() == first.stdout.strip() and told["finish"]["completion_tokens"] <= 12
    assert told["started"]["adapter_digest"] == cli.json("adapter", "show", "sample")["digest"]
    events = cli.lines("generate", *asked)
    assert list(events[0]) == ["started"] and list(events[-1]) == ["finish"]
    assert "".join(e["delta"]["text"] for e in events[1:-1]) == told["text"]
    raw = cli.json("generate", "--raw", "--adapter", "base", "--max-tokens", "3", "import")
    assert raw["started"]["adapter_digest"] == ""
    piped = subprocess.run(
        cli.command("generate", "-", "--max-tokens", "3", "--seed", "1", "--temperature", "0.5"),
        env=cli.environment, input="hello", capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert piped.stdout
    both = cli.json("compare", "--adapter", "sample", "--max-tokens", "8", "write a function that can add numbers")
    assert [a["adapter"] for a in both["answers"]] == ["base", "sample"]
    assert both["answers"][0]["text"] != both["answers"][1]["text"]
    plain = cli.run("compare", "--adapter", "sample", "--max-tokens", "8", "x").stdout
    assert plain.index("=== base") < plain.index("=== sample")

    beside = cli.on_terminal("compare", "--adapter", "sample", "--max-tokens", "8", "x")
    assert any("base" in line and "sample" in line for line in beside.splitlines()), "side by side"
    assert "tok/s" in beside

    switched = cli.json("adapter", "switch", "sample")
    assert switched["digest"] == told["started"]["adapter_digest"] and switched["previous_digest"] == ""
    assert [a["is_default"] for a in cli.json("adapter", "loaded")["adapters"]] == [True]
    assert cli.json("generate", "x", "--max-tokens", "2")["started"]["adapter_digest"] == switched["digest"]
    cli.json("adapter", "switch", "base")
    assert cli.json("adapter", "unload", "sample")["freed_bytes"] > 0
    wrong = cli.json("generate", "x", "--max-tokens", "100000", "--temperature", "9", code=2)["error"]
    assert len(wrong["violations"]) == 2


def test_chat_holds_a_conversation_and_obeys_its_commands(cli: Cli) -> None:
    typed = "hello\n/adapter sample\nhello\n/base\nhello\n/reset\nhello\n/nonsense\n/adapter no-such\n/quit\nnever\n"
    told = cli.run("chat", "--model", "starter-test", "--max-tokens", "4", "-o", "jsonl", stdin=typed)
    events = [json.loads(line) for line in told.stdout.splitlines()]
    started = [e["started"] for e in events if "started" in e]
    assert [bool(s["adapter_digest"]) for s in started] == [False, True, False, False]
    assert started[0]["prompt_tokens"] < started[1]["prompt_tokens"] < started[2]["prompt_tokens"]
    assert started[3]["prompt_tokens"] == started[0]["prompt_tokens"]
    for word in (
        "sample answers",
        "the base answers",
        "forgotten",
        "is no command",
        "'adapters/no-such' does not exist",
    ):
        assert word in told.stderr, told.stderr


def test_a_job_is_started_followed_and_pictured(cli: Cli) -> None:
    done = cli.run("job", "start", *JOB, "--set", "schedule.max_steps=8", "--name", "followed", "--job-id", "followed")
    assert "step 8/8" in done.stdout and "hold-out loss" in done.stdout and "SUCCEEDED" in done.stdout
    assert "└──" in done.stdout
    job = cli.json("job", "watch", "followed")
    assert job["state"] == "JOB_STATE_SUCCEEDED" and job["result"]["adapter"] == "adapters/followed"
    events = cli.lines("job", "watch", "followed")
    assert [e["sequence"] for e in events] == list(range(1, job["last_sequence"] + 1))
    late = cli.lines("job", "watch", "followed", "--after", "5")
    assert late == events[5:]
    assert [e["sequence"] for e in cli.lines("job", "logs", "followed")] == [e["sequence"] for e in events]
    assert "loading the base" in cli.run("job", "logs", "followed").stdout
    shown = cli.on_terminal("job", "watch", "followed")
    assert "step 8/8" in shown and "QUEUED -> PREPARING" in shown and "└──" in shown
    assert "followed" in cli.run("job", "list", "--state", "succeeded").stdout
    assert "SUCCEEDED" in cli.on_terminal("job", "list")
    assert cli.json("job", "list", "--state", "failed")["jobs"] == []
    assert "standard" in {t["name"] for t in cli.json("job", "templates")["templates"]}
    cli.json("job", "delete", "followed")
    assert cli.json("job", "show", "followed", code=3)["error"]["code"] == "NOT_FOUND"


def test_a_spec_may_come_from_a_file_and_all_that_is_wrong_is_told(cli: Cli, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("model: models/starter-test\ndataset: datasets/sample\nlora: {rank: 4, target_modules: [q_proj]}\n")
    checked = cli.json("job", "start", "--file", str(file), "--set", "lora.rank=2", "--check")
    lora = checked["spec"]["train"]["lora"]
    assert lora["rank"] == 2 and lora["target_modules"]["names"] == ["q_proj"]
    assert checked["name"] not in {j["name"] for j in cli.json("job", "list")["jobs"]}
    wrong = cli.json("job", "start", *JOB, "--set", "lora.rank=0", "--set", "optimizer.learning_rate=7", code=2)
    assert {v["field"].rsplit(".", 1)[-1] for v in wrong["error"]["violations"]} >= {"rank", "learning_rate"}
    near = cli.run("job", "start", *JOB, "--set", "lora.rnak=1", code=2)
    assert "did you mean lora.rank" in near.stderr and near.stdout == ""
    assert cli.json("job", "start", "--model", "none", "--dataset", "sample", code=3)["error"]["code"] == "NOT_FOUND"
    assert cli.json("job", "start", *JOB, "--template", "no-such", code=3)["error"]["code"] == "NOT_FOUND"


def test_ctrl_c_detaches_and_a_cancelled_job_is_exit_code_6(cli: Cli) -> None:
    process = cli.start("job", "start", *JOB, "--set", "schedule.max_steps=4000", "--job-id", "long")
    try:
        assert process.stdout is not None
        while "tok/s" not in (line := process.stdout.readline()):
            assert line, process.stderr and process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "detached; jobs/long goes on. To attach again: qlorad job watch long" in err
    assert not cli.json("job", "show", "long")["is_terminal"]
    assert cli.json("job", "pause", "long")["state"] == "JOB_STATE_PAUSING"
    eventually(lambda: cli.json("job", "show", "long")["state"] == "JOB_STATE_PAUSED", what="the pause")
    assert [j["name"] for j in cli.json("job", "list", "--state", "paused")["jobs"]] == ["jobs/long"]
    assert cli.json("job", "resume", "long")["state"] == "JOB_STATE_QUEUED"
    cli.json("job", "cancel", "long")
    told = cli.run("job", "watch", "long", code=6)
    assert "jobs/long ended CANCELLED" in told.stderr
    assert cli.json("job", "show", "long")["result"]["checkpoint_digest"].startswith("sha256:")


@pytest.mark.slow  # faults/test_trainer.py kills it too, before the same client
def test_a_watch_outlives_kill_9_of_the_trainer_daemon(cli: Cli) -> None:
    cli.run("job", "start", *JOB, "--set", "schedule.max_steps=60", "--job-id", "cut", "--no-watch")
    process = cli.start("job", "watch", "cut", "-o", "jsonl")
    events = []
    try:
        assert process.stdout is not None
        killed = 0
        for line in process.stdout:
            events.append(json.loads(line))
            if killed < 2 and events[-1].get("step", {}).get("step", 0) >= 5 * (killed + 1):
                killed += 1
                told = eventually(lambda: (d := cli.daemon("trainer"))["health"] == "SERVING" and d, 30, "the trainer")
                os.kill(told["pid"], signal.SIGKILL)
        assert process.wait(120) == 0, process.stderr and process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    job = cli.json("job", "show", "cut")
    assert job["state"] == "JOB_STATE_SUCCEEDED" and killed == 2
    assert [e["sequence"] for e in events] == list(range(1, job["last_sequence"] + 1))
    assert [e["step"]["step"] for e in events if "step" in e] == list(range(1, 61))


@pytest.mark.slow  # e2e/test_loop.py goes the same way
def test_the_loop_with_stubs_alone(cli: Cli, rows: pathlib.Path) -> None:
    script = ROOT / "examples" / "loop.py"
    text = script.read_text()
    assert len(text.splitlines()) < 60
    ours = [w for line in text.splitlines() if "import" in line for w in line.split() if w.startswith("qlorad")]
    assert ours and all(word.startswith("qlorad.v1") for word in ours)
    addresses = {f"QLORAD_{d['service'].upper()}_ADDRESS": d["address"] for d in cli.json("status")["daemons"]}
    told = subprocess.run(
        [*cli.command()[:1], str(script), str(rows)], env={**cli.environment, **addresses, "STEPS": "4"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "step 4/4" in told.stdout and "JOB_STATE_SUCCEEDED" in told.stdout and "sha256:" in told.stdout


def test_completion_knows_the_verbs(tmp_path: pathlib.Path) -> None:
    cli = Cli(tmp_path, {"_QLORAD_COMPLETE": "complete_bash", "COMP_WORDS": "qlorad jo", "COMP_CWORD": "1"})
    assert cli.run().stdout.split() == ["job"]
    deeper = Cli(tmp_path, {"_QLORAD_COMPLETE": "complete_bash", "COMP_WORDS": "qlorad dataset ex", "COMP_CWORD": "2"})
    assert deeper.run().stdout.split() == ["export"]


def test_usage_errors_are_exit_code_2_in_both_forms(tmp_path: pathlib.Path) -> None:
    cli = Cli(tmp_path)
    assert cli.json("dataset", "lits", code=2)["error"]["reason"] == "USAGE"
    assert "No such command" in cli.run("dataset", "lits", code=2).stderr
    assert "Missing" in cli.json("adapter", "download", "x", code=2)["error"]["message"]
    assert "Usage: qlorad" in cli.run("--help").stdout
    assert cli.run("--version").stdout.startswith("qlorad 0.1.0")
