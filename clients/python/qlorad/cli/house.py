"""`qlorad up`, `down`, `status`, `doctor`, `token`: the four daemons of this machine."""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qlorad.cli import output as out
from qlorad.cli.output import Format, Output

if TYPE_CHECKING:
    from qlorad.cli.daemons import Seen

START_SECONDS = 60.0
END_SECONDS = 40.0

token_app = typer.Typer(help="Bearer tokens.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    app.command("up")(up)
    app.command("down")(down)
    app.command("status")(status)
    app.command("doctor")(doctor)
    app.add_typer(token_app, name="token")


def _home(given: pathlib.Path | None) -> pathlib.Path:
    import os

    from qlorad._connection import home_of

    return home_of(given, os.environ)


Home = Annotated[pathlib.Path | None, typer.Option(help="Where store, state and logs live; else QLORAD_HOME.")]


def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave a supervisor behind and return.")] = False,
    home: Home = None,
    ports: Annotated[
        int | None, typer.Option(min=0, max=65528, help="The first of eight ports in a row; 0 = any free ones.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Starts the four daemons and keeps them alive. Other settings: the home's config.yaml."""
    from qlorad import errors
    from qlorad.cli import supervisor

    _need_services()
    where = _home(home)
    try:
        if detach:
            _detached(where, ports)
            _show_status(output, where)
            return
        with supervisor.only_one(where):
            supervisor.Supervisor(where, ports, out.say).run(lambda: _ready(output, where))
    except supervisor.CannotStart as e:
        raise errors.FailedPrecondition(str(e), reason="WRONG_STATE") from None


def down(home: Home = None, output: Output = Format.table) -> None:
    """Ends the daemons of a home, and their supervisor. Training workers of running jobs go on."""
    from qlorad.cli import ending

    where = _home(home)
    ended = ending.end(where, END_SECONDS)
    if output is not Format.table:
        out.emit_json({"home": str(where), "ended": ended})
    else:
        print(f"ended: {', '.join(ended)}" if ended else f"{where} was not up")


def status(home: Home = None, output: Output = Format.table) -> None:
    """Shows the daemons. Exit code 5 unless all four serve."""
    seen = _show_status(output, _home(home))
    if any(s.health != "SERVING" for s in seen):
        raise typer.Exit(5)


def doctor(home: Home = None, output: Output = Format.table) -> None:
    """Looks at the machine, the installation and the home, and says what may be wrong."""
    from qlorad.cli import diagnosis

    where = _home(home)
    findings = diagnosis.examine(where)
    if output is Format.json:
        out.emit_json({"home": str(where), "checks": [f.as_dict() for f in findings]})
    elif output is Format.jsonl:
        for finding in findings:
            out.emit_json(finding.as_dict())
    else:
        out.table(["", "CHECK", "FOUND"], [[f.mark, f.check, f.found] for f in findings])
    if any(f.mark == "bad" for f in findings):
        raise typer.Exit(1)


@token_app.command("new")
def token_new(
    name: Annotated[str, typer.Argument(help="Whose it is: 1 to 63 of [a-z0-9._-].")] = "me",
    output: Output = Format.table,
) -> None:
    """Makes a token. It is shown this once; the daemons keep its hash alone."""
    import hashlib
    import re
    import secrets

    from qlorad import errors

    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
        raise errors.invalid("name", name, "1 to 63 of [a-z0-9._-]")
    token = "qlt_" + secrets.token_urlsafe(32)
    line = f"{hashlib.sha256(token.encode()).hexdigest()} {name}"
    if output is not Format.table:
        out.emit_json({"token": token, "tokens_file_line": line})
        return
    print(token)
    out.say("Callers set it as QLORAD_TOKEN. Add this line to the daemons' --tokens-file:")
    print(line)


def _need_services() -> None:
    import importlib.util

    from qlorad import errors

    if importlib.util.find_spec("services") is None or importlib.util.find_spec("services.common") is None:
        raise errors.FailedPrecondition(
            f"the daemons (qlorad-services) are not installed for {sys.executable}; install them from the repository: "
            "pip install -e '.[train]'",
            reason="WRONG_STATE",
        )


def _detached(home: pathlib.Path, ports: int | None) -> None:
    """Leaves a supervisor behind; returns once all four serve."""
    import subprocess
    import time

    from qlorad.cli import daemons, supervisor

    if supervisor.holder(home):
        with supervisor.only_one(home):
            return
    log = home / "logs" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlorad.cli.supervisor", str(home), "-" if ports is None else str(ports)],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while any(s.health != "SERVING" for s in daemons.look(home, 1.0)) or supervisor.holder(home) != process.pid:
        if process.poll() is not None:
            with log.open("rb") as told:
                told.seek(begin)
                raise supervisor.CannotStart(told.read().decode(errors="replace").strip())
        if time.monotonic() > end:
            process.terminate()
            raise supervisor.CannotStart(f"the daemons did not serve within {START_SECONDS:.0f} s; see {log.parent}")
        time.sleep(0.05)


def _ready(output: Format, home: pathlib.Path) -> None:
    _show_status(output, home)
    out.say("up; Ctrl-C ends all four")


def _show_status(output: Format, home: pathlib.Path) -> list[Seen]:
    from qlorad.cli import daemons, supervisor

    seen = daemons.look(home)
    pid = supervisor.holder(home)
    if output is Format.json:
        out.emit_json({"home": str(home), "supervisor_pid": pid, "daemons": [s.as_dict() for s in seen]})
    elif output is Format.jsonl:
        for one in seen:
            out.emit_json(one.as_dict())
    else:
        print(f"home {home}" + (f", supervised by pid {pid}" if pid else ""))
        rows = [[s.service, s.health, s.address, s.metrics, str(s.pid or ""), _door(s)] for s in seen]
        out.table(["DAEMON", "HEALTH", "ADDRESS", "METRICS", "PID", "DOOR"], rows)
        for one in seen:
            if one.note:
                out.say(f"{one.service}: {one.note}")
    return seen


def _door(seen: Seen) -> str:
    if seen.health == "DOWN":
        return ""
    return " + ".join(w for w, there in (("TLS", seen.tls), ("token", seen.token)) if there) or "open on loopback"
