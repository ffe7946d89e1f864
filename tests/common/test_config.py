"""Flags over environment over file; every fault at once."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field

import pytest

from services.common import config
from services.common.config import ConfigError, setting
from services.common.server import ServerSettings


@dataclass(frozen=True, slots=True)
class Config:
    """A daemon's settings for this test."""

    server: ServerSettings = field(default_factory=ServerSettings)
    max_queue: int = setting(5, "how many", lambda v: 1 <= v <= 9, "1 to 9")
    ratio: float = setting(0.5, "a share")
    loud: bool = setting(False, "says more")
    roots: tuple[str, ...] = setting((), "folders")


@pytest.fixture
def env(tmp_path: pathlib.Path) -> dict[str, str]:
    return {"QLORAD_HOME": str(tmp_path)}


def load(argv: list[str], environ: dict[str, str]) -> Config:
    return config.load(Config, "trainer", argv, environ)


def test_defaults(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    c = load([], env)
    assert (c.max_queue, c.ratio, c.loud, c.roots, c.server.home) == (5, 0.5, False, (), tmp_path)


def test_flags_over_environment_over_file(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.yaml").write_text("all: {max_queue: 2, ratio: 0.1}\ntrainer: {max_queue: 3, loud: true}\n")
    assert (load([], env).max_queue, load([], env).ratio, load([], env).loud) == (3, 0.1, True)
    env["QLORAD_TRAINER_MAX_QUEUE"] = "4"
    assert load([], env).max_queue == 4
    assert load(["--max-queue", "6"], env).max_queue == 6
    assert load(["--max-queue=7", "--roots", "a,b"], env).roots == ("a", "b")


def test_another_services_section_is_not_read(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.yaml").write_text("registry: {anything: 1}\n")
    assert load([], env).max_queue == 5


def test_a_named_file(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "other.yaml").write_text("trainer: {max_queue: 8}\n")
    assert load(["--config", str(tmp_path / "other.yaml")], env).max_queue == 8
    assert load([], {**env, "QLORAD_CONFIG": str(tmp_path / "other.yaml")}).max_queue == 8


def test_all_faults_come_at_once(env: dict[str, str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_qeue: 2, home: /x}\nnowhere: {}\nregistry: 3\n")
    env |= {"QLORAD_TRAINER_RATIO": "nan", "QLORAD_TRAINER_LOUDER": "1"}
    flags = ["--max-queue", "99", "--lout", "1", "--listen", "0.0.0.0:1", "--tls-key", "/none", "--drain-seconds"]
    with pytest.raises(ConfigError) as caught:
        load(flags, env)
    told = "\n".join(caught.value.faults)
    for expected in (
        "unknown setting trainer.max_qeue; did you mean 'max_queue'?",
        "trainer.home: accepted: only a flag or the environment",
        "unknown section 'nowhere'; accepted: all, datasets, registry, trainer, inference",
        "section 'registry' must be a mapping",
        "QLORAD_TRAINER_RATIO: got 'nan'; accepted: a number",
        "QLORAD_TRAINER_LOUDER: no such setting",
        "--max-queue: got '99'; accepted: 1 to 9",
        "--lout: no such flag; did you mean --loud?",
        "--drain-seconds: needs a value",
        "--listen: got '0.0.0.0:1'; accepted: a loopback address",
        "--tls-cert and --tls-key: accepted: both or neither",
        "--tls-key: got '/none', which cannot be read",
    ):
        assert expected in told
    assert len(caught.value.faults) == 12


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\xff"])
def test_a_broken_file_is_named(env: dict[str, str], tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load([], env)
    assert str(tmp_path / "config.yaml") in caught.value.faults[0]


def test_a_file_that_is_not_there_is_named(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load(["--config", "none.yaml"], env)


@pytest.mark.parametrize("raw", ["x", "1.5", "", "True"])
def test_a_whole_number_is_one(env: dict[str, str], raw: str) -> None:
    with pytest.raises(ConfigError, match="a whole number"):
        load([f"--max-queue={raw}"], env)


@pytest.mark.parametrize(("raw", "value"), [("true", True), ("1", True), ("no", False), ("FALSE", False)])
def test_a_switch(env: dict[str, str], raw: str, value: bool) -> None:
    assert load([f"--loud={raw}"], env).loud is value
    assert load(["--loud"], env).loud is True


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "192.0.2.7:0", "[::]:5", "example.org:80"])
@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_only_loopback_without_tls_and_token(env: dict[str, str], flag: str, listen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([flag, listen], env)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(f"{flag}: got {listen!r}; accepted: a loopback address")


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.9.9.9:1", "localhost:5", "[::1]:5"])
def test_loopback_is_taken(env: dict[str, str], listen: str) -> None:
    assert load(["--listen", listen], env).server.listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1", ":5", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:²"])
def test_an_address_has_a_form(env: dict[str, str], listen: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT with a port from 0 to 65535"):
        load(["--listen", listen], env)


def test_help_names_every_setting() -> None:
    text = config.usage(Config, "trainer")
    for known in config.settings_of(Config):
        assert known.flag in text and known.help and known.help in text
