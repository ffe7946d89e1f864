"""The command line put together: groups, exit codes, one place for errors.

Exit codes: 0 ok, 1 other, 2 usage or invalid, 3 not found, 4 authentication,
5 unavailable, 6 a job failed, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("the command line needs two more packages: pip install 'qlorad[cli]'") from None

from qlorad.cli import adapter, dataset, house, job, model, output, presets, talk
from qlorad.errors import QloradError

EXIT_CODES = {
    "INVALID_ARGUMENT": 2,
    "OUT_OF_RANGE": 2,
    "NOT_FOUND": 3,
    "UNAUTHENTICATED": 4,
    "PERMISSION_DENIED": 4,
    "UNAVAILABLE": 5,
    "DEADLINE_EXCEEDED": 5,
    "JOB_FAILED": 6,
    "CANCELLED": 130,
}
INTERRUPTED = 130

app = typer.Typer(
    name="qlorad",
    help="Fine-tune and serve on your own hardware: documents, dataset, QLoRA job, adapter, streamed answers.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
house.add_to(app)
app.add_typer(dataset.app, name="dataset")
app.add_typer(model.app, name="model")
app.add_typer(job.app, name="job")
app.add_typer(adapter.app, name="adapter")
app.add_typer(presets.app, name="preset")
talk.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        import qlorad

        print(f"qlorad {qlorad.__version__}")
        raise typer.Exit


@app.callback()
def root(
    home: Annotated[str, typer.Option(help="Where store, state and logs live; else QLORAD_HOME, else ~/.qlorad.")] = "",
    ca: Annotated[str, typer.Option(help="PEM file of the CA that the daemons' certificates are of.")] = "",
    cert: Annotated[str, typer.Option(help="PEM file of our certificate, for mutual TLS.")] = "",
    key: Annotated[str, typer.Option(help="PEM file of our private key, for mutual TLS.")] = "",
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell it.")] = False,
) -> None:
    """What holds for all commands. Addresses: QLORAD_DATASETS_ADDRESS and so on; the token: QLORAD_TOKEN."""
    for variable, value in (
        ("QLORAD_HOME", home),
        ("QLORAD_TLS_CA", ca),
        ("QLORAD_TLS_CERT", cert),
        ("QLORAD_TLS_KEY", key),
    ):
        if value:
            os.environ[variable] = value


def main() -> None:
    """Runs a command and ends with its exit code."""
    raise SystemExit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs a command; prints its failure, if it fails, in the format asked for."""
    wanted = output.asked_for(argv)
    try:
        code: Any = app(argv, prog_name="qlorad", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except QloradError as e:
        output.emit_error(wanted, e)
        return EXIT_CODES.get(e.code, 1)
    except typer.TyperException as e:
        return _usage(wanted, e)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as in `| head`; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _usage(wanted: output.Format, error: Any) -> int:
    if wanted is output.Format.table or not hasattr(error, "format_message"):
        shown = getattr(error, "show", None)
        if shown is None:
            output.say("qlorad: aborted")
            return 1
        shown()
    else:
        described = {"code": "INVALID_ARGUMENT", "reason": "USAGE", "message": error.format_message()}
        output.emit_json({"error": described})
    return int(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
