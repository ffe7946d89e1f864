"""The registry daemon: `python -m services.registry`."""

from services.common import server
from services.registry.app import Config, build


def main() -> None:
    server.main("registry", Config, build)


if __name__ == "__main__":
    main()
