"""Where the client looks for the daemons, and what it does with a token."""

from __future__ import annotations

import json
import pathlib

import pytest

import qlorad
from qlorad import _connection, errors
from qlorad._connection import PORTS, Connection


def way(home: pathlib.Path, environ: dict[str, str] | None = None, **given: object) -> Connection:
    """A connection as connect() makes it."""
    arguments: dict[str, object] = {"addresses": {}, "ca": "", "cert": "", "key": "", "tls": None, "token": None}
    return _connection.connection(home, environ=environ or {}, **{**arguments, **given})  # type: ignore[arg-type]


def tell(home: pathlib.Path, service: str, address: str, tls: bool = False) -> None:
    """A run file as a daemon writes it."""
    path = home / "state" / "run" / f"{service}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pid": 1, "address": address, "metrics": "x", "tls": tls, "token": False}))


def test_the_argument_goes_over_the_environment_over_the_run_file_over_the_default(tmp_path: pathlib.Path) -> None:
    default = way(tmp_path).target("trainer")
    assert (default.address, default.source) == (f"127.0.0.1:{PORTS['trainer']}", "default")
    tell(tmp_path, "trainer", "127.0.0.1:7")
    assert way(tmp_path).target("trainer").address == "127.0.0.1:7"
    environ = {"QLORAD_TRAINER_ADDRESS": "127.0.0.1:8"}
    assert way(tmp_path, environ).target("trainer").address == "127.0.0.1:8"
    assert way(tmp_path, environ, addresses={"trainer": "127.0.0.1:9"}).target("trainer").address == "127.0.0.1:9"
    assert way(tmp_path, environ).target("datasets").source == "default"


def test_a_named_home_without_a_daemon_calls_nobody_else(tmp_path: pathlib.Path) -> None:
    def of(home: pathlib.Path | None, environ: dict[str, str]) -> Connection:
        return _connection.connection(home, {}, "", "", "", None, None, environ)

    for named in (of(tmp_path, {}), of(None, {"QLORAD_HOME": str(tmp_path)})):
        with pytest.raises(errors.Unavailable, match="no qlorad-trainer runs in the home"):
            named.metadata(named.target("trainer"))
        tell(tmp_path, "registry", "127.0.0.1:7")
        assert named.metadata(named.target("registry")) == ()
    unnamed = of(None, {"HOME": str(tmp_path)})
    assert unnamed.metadata(unnamed.target("inference")) == ()


def test_the_default_ports_are_those_of_the_house() -> None:
    assert PORTS == {"datasets": 50051, "registry": 50052, "trainer": 50053, "inference": 50054}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', "\x00"])
def test_a_run_file_that_tells_nothing_is_passed_over(tmp_path: pathlib.Path, text: str) -> None:
    tell(tmp_path, "trainer", "x")
    (tmp_path / "state" / "run" / "trainer.json").write_text(text)
    assert way(tmp_path).target("trainer").source == "default"


def test_tls_comes_from_the_argument_the_ca_or_the_run_file(tmp_path: pathlib.Path) -> None:
    tell(tmp_path, "registry", "127.0.0.1:7", tls=True)
    assert way(tmp_path).target("registry").tls
    assert not way(tmp_path, tls=False).target("registry").tls
    assert way(tmp_path, ca="ca.pem").target("trainer").tls
    assert way(tmp_path, {"QLORAD_TLS_CA": "ca.pem"}).target("trainer").tls
    assert not way(tmp_path).target("trainer").tls


def test_half_a_pair_of_certificate_and_key_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="both or neither"):
        way(tmp_path, cert="cert.pem")


def test_a_file_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"ca: .*missing\.pem"):
        way(tmp_path, ca=str(tmp_path / "missing.pem")).credentials()


def test_the_token_goes_to_loopback_or_over_tls_and_is_never_shown(tmp_path: pathlib.Path) -> None:
    secret = "qlt_canary"
    tell(tmp_path, "trainer", "127.0.0.1:7")
    here = way(tmp_path, token=secret)
    assert here.metadata(here.target("trainer")) == (("authorization", f"Bearer {secret}"),)
    assert secret not in repr(here) and secret not in str(here)
    assert secret not in repr(way(tmp_path, {"QLORAD_TOKEN": secret}))
    far = way(tmp_path, token=secret, addresses={"trainer": "trainer.example:443"})
    with pytest.raises(errors.InvalidArgument) as refused:
        far.metadata(far.target("trainer"))
    assert secret not in str(refused.value) and "TLS" in str(refused.value)
    safe = way(tmp_path, token=secret, addresses={"trainer": "trainer.example:443"}, tls=True)
    assert safe.metadata(safe.target("trainer"))
    assert way(tmp_path, {"QLORAD_TOKEN": secret}, token="").metadata(here.target("trainer")) == ()


def test_the_home_is_the_argument_or_the_variable(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORAD_HOME", str(tmp_path / "a"))
    with qlorad.connect() as client:
        assert client.home == tmp_path / "a"
    with qlorad.connect(home=tmp_path / "b") as client:
        assert client.home == tmp_path / "b"


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/x", True),
        ("10.0.0.1:1", False),
        ("example.com:1", False),
        ("127.0.0.1.example.com:1", False),
    ],
)
def test_what_counts_as_this_machine(address: str, here: bool) -> None:
    assert _connection.is_loopback(address) is here


def test_who_cannot_be_reached_is_told_soon(tmp_path: pathlib.Path) -> None:
    with qlorad.connect(home=tmp_path, trainer="127.0.0.1:1") as client:
        with pytest.raises(errors.Unavailable, match="TLS or certificate mismatch looks just the same"):
            client.jobs.get("x")
        with pytest.raises(errors.Unavailable):
            list(client.jobs.watch("x", patience_seconds=0.1))
