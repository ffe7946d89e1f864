"""`python -m tests.hub ROOT --port 0`: serves ROOT's repositories and prints the port."""

from __future__ import annotations

import argparse
import pathlib
import threading

from tests.hub.repos import Repos
from tests.hub.server import Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("root", type=pathlib.Path, help="holds datasets/OWNER/NAME and models/OWNER/NAME")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one")
    told = parser.parse_args()
    hub = Hub(Repos(told.root), told.port)
    print(hub.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
