"""Certificates for tests, made by openssl: an authority and what it signs."""

from __future__ import annotations

import pathlib
import subprocess
from dataclasses import dataclass

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    cert: pathlib.Path
    key: pathlib.Path


class Authority:
    """A CA with a folder of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.cert, self._key = folder / "ca.pem", folder / "ca.key"
        subject = f"/CN=authority {folder.name}"
        _openssl(
            "req", "-x509", *KEY, "-keyout", str(self._key), "-out", str(self.cert), "-subj", subject, "-days", "2"
        )

    def sign(self, name: str, host: str = "localhost", days: int = 2) -> Pair:
        """A pair for a host; already expired where days is negative."""
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        request, extra = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extra.write_text(f"subjectAltName=DNS:{host}\n")
        _openssl("req", "-new", *KEY, "-keyout", str(pair.key), "-out", str(request), "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.cert), "-CAkey", str(self._key), "-CAcreateserial"),
            *("-days", str(days), "-extfile", str(extra), "-out", str(pair.cert)),
        )
        return pair
