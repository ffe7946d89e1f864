"""`python -m services.inference`: the inference daemon."""

from __future__ import annotations

from services.common import server
from services.inference.app import Config, build


def main() -> None:
    server.main("inference", Config, build)


if __name__ == "__main__":
    main()
