"""`python -m services.datasets`."""

from __future__ import annotations

from services.common import server
from services.datasets.app import Config, build


def main() -> None:
    """Serves until it is told to end."""
    server.main("datasets", Config, build)


if __name__ == "__main__":
    main()
