"""One frozen configuration a daemon: flags over environment over file.

Law of this room: every fault is found before anything starts, and all are
reported at once. A setting is a field of a frozen dataclass made with
`setting(...)`; nested dataclasses group settings, their names stay flat.
Field `max_queue` of the trainer is `--max-queue`, `QLORAD_TRAINER_MAX_QUEUE`,
and `max_queue:` under `trainer:` in the file (or under `all:` for settings
that every daemon has).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
SERVICES = ("datasets", "registry", "trainer", "inference")


class ConfigError(Exception):
    """All faults of a configuration, one a line."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


def setting(default: Any, help: str, check: Callable[[Any], bool] | None = None, accepted: str = "") -> Any:
    """A field of a configuration with its documentation and its bounds."""
    meta = {"help": help, "check": check, "accepted": accepted}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """One setting as the loader and the documentation see it."""

    name: str
    kind: Any
    default: Any
    help: str
    check: Callable[[Any], bool] | None
    accepted: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def settings_of(kind: type) -> list[Known]:
    """Every setting of a configuration class, nested ones flat."""
    found: list[Known] = []
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += settings_of(hint)
        else:
            m = f.metadata
            found.append(Known(f.name, hint, f.default, m.get("help", ""), m.get("check"), m.get("accepted", "")))
    return found


def _parse(kind: Any, raw: object) -> Any:
    """A raw value as the setting's type; ValueError says what is accepted."""
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(raw).lower() in words:
            return words[str(raw).lower()]
        raise ValueError("true or false")
    if kind is int:
        if isinstance(raw, bool):
            raise ValueError("a whole number")
        try:
            return int(str(raw))
        except ValueError:
            raise ValueError("a whole number") from None
    if kind is float:
        try:
            number = float(str(raw))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError("a number")
        return number
    if kind is pathlib.Path:
        return pathlib.Path(str(raw)).expanduser()
    if typing.get_origin(kind) is tuple:
        items = raw if isinstance(raw, list) else [p for p in str(raw).split(",") if p]
        inner = typing.get_args(kind)[0]
        return tuple(_parse(inner, item) for item in items)
    return str(raw)


def _from_flags(known: Mapping[str, Known], argv: Sequence[str], faults: list[str]) -> dict[str, tuple[str, object]]:
    by_flag = {k.flag: k for k in known.values()}
    given: dict[str, tuple[str, object]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in by_flag:
            near = difflib.get_close_matches(flag, by_flag, n=1)
            if not equals and flag.startswith("--") and words and not words[0].startswith("--"):
                words.pop(0)  # its value
            faults.append(f"{flag}: no such flag" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        if not equals:
            if by_flag[flag].kind is bool and (not words or words[0].startswith("--")):
                value = "true"
            elif words:
                value = words.pop(0)
            else:
                faults.append(f"{flag}: needs a value")
                continue
        given[by_flag[flag].name] = (flag, value)
    return given


def _from_file(
    path: pathlib.Path, service: str, known: Mapping[str, Known], faults: list[str]
) -> dict[str, tuple[str, object]]:
    try:
        text = path.read_text()
    except OSError as e:
        faults.append(f"{path}: cannot be read: {e.strerror}")
        return {}
    except UnicodeDecodeError:
        faults.append(f"{path}: is not UTF-8 text")
        return {}
    try:
        tree = read_yaml(text) or {}
    except ValueError as e:
        faults.append(f"{path}: is not YAML: {e}")
        return {}
    if not isinstance(tree, dict):
        faults.append(f"{path}: must be a mapping of sections to settings")
        return {}
    given: dict[str, tuple[str, object]] = {}
    sections = ("all", *SERVICES)
    for section, values in tree.items():
        if section not in sections:
            faults.append(f"{path}: unknown section {section!r}; accepted: {', '.join(sections)}")
            continue
        if not isinstance(values, dict):
            faults.append(f"{path}: section {section!r} must be a mapping")
            continue
        if section not in ("all", service):
            continue
        for key, value in values.items():
            if key in ("home", "config"):
                faults.append(
                    f"{path}: {section}.{key}: accepted: only a flag or the environment, which find this file"
                )
            elif key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                faults.append(
                    f"{path}: unknown setting {section}.{key}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            elif section == service or key not in given:
                given[str(key)] = (f"{path}: {section}.{key}", value)
    return given


def _build(kind: type[T], values: Mapping[str, Any], faults: list[str]) -> T | None:
    """The configuration and its groups; each group adds its own faults."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[f.name] = _build(hint, values, faults)
        elif f.name in values:
            arguments[f.name] = values[f.name]
    if any(arguments[f.name] is None for f in dataclasses.fields(kind) if f.name in arguments):  # type: ignore[arg-type]
        return None  # a group has said why
    try:
        return kind(**arguments)
    except ConfigError as e:
        faults += e.faults
        return None


def home_of(environ: Mapping[str, str]) -> pathlib.Path:
    """Where everything lives."""
    return pathlib.Path(environ.get("QLORAD_HOME") or "~/.qlorad").expanduser().absolute()


def read_yaml(text: str) -> Any:
    """The values of a YAML text; ValueError says what is wrong with it, whatever that is."""
    import yaml  # only a daemon that has a file pays for it

    try:
        return yaml.safe_load(text)
    except Exception as e:  # a date or a number that is none, or depth, raises whatever Python makes of it
        raise ValueError(str(e) or type(e).__name__) from None


def load(kind: type[T], service: str, argv: Sequence[str], environ: Mapping[str, str] | None = None) -> T:
    """The configuration of a daemon, or ConfigError with every fault.

    The file is `--config FILE`, else `QLORAD_CONFIG`, else `config.yaml` in the
    home if there is one. Does not touch anything else on disk.
    """
    environ = os.environ if environ is None else environ
    faults: list[str] = []
    known = {k.name: k for k in settings_of(kind)}
    flags = _from_flags(known, argv, faults)
    prefix = f"QLORAD_{service.upper()}_"
    env = {n: (f"{prefix}{n.upper()}", environ[prefix + n.upper()]) for n in known if prefix + n.upper() in environ}
    for variable in environ:
        if variable.startswith(prefix) and variable.removeprefix(prefix).lower() not in known:
            faults.append(f"{variable}: no such setting")
    if "home" not in env and environ.get("QLORAD_HOME"):
        env["home"] = ("QLORAD_HOME", str(home_of(environ)))
    if "config" not in env and environ.get("QLORAD_CONFIG"):
        env["config"] = ("QLORAD_CONFIG", environ["QLORAD_CONFIG"])
    home = pathlib.Path(str({**env, **flags}.get("home", ("", "~/.qlorad"))[1])).expanduser().absolute()
    named = {**env, **flags}.get("config")
    path = pathlib.Path(str(named[1])) if named and str(named[1]) else home / "config.yaml"
    file = _from_file(path, service, known, faults) if (named and str(named[1])) or path.exists() else {}
    values: dict[str, Any] = {}
    for name, (source, raw) in {**file, **env, **flags}.items():
        k = known[name]
        try:
            value = _parse(k.kind, raw)
        except ValueError as e:
            faults.append(f"{source}: got {raw!r}; accepted: {e}")
            continue
        if k.check is not None and not k.check(value):
            faults.append(f"{source}: got {raw!r}; accepted: {k.accepted}")
            continue
        values[name] = value
    values["home"] = home
    config = _build(kind, values, faults)
    if faults or config is None:
        raise ConfigError(faults)
    return config


def usage(kind: type, service: str) -> str:
    """What `--help` prints."""
    lines = [f"qlorad-{service}: settings (flags over environment over file)", ""]
    for k in settings_of(kind):
        default = "" if k.default in ("", (), dataclasses.MISSING) else f" [{k.default}]"
        bound = f" ({k.accepted})" if k.accepted else ""
        lines.append(f"  {k.flag:<28} {k.help}{bound}{default}")
    return "\n".join(lines)
