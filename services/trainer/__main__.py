"""`python -m services.trainer`."""

from services.common import server
from services.trainer.app import Config, build


def main() -> None:
    """Runs the daemon."""
    server.main("trainer", Config, build)


if __name__ == "__main__":
    main()
