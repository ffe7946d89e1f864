"""A worker that does what it is told, for tests of the daemon's side."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from services.common import process
from services.common.frames import Line


def main() -> None:
    process.apply_limits()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    line = Line(parser.parse_args().fd)
    while (body := line.receive()) is not None:
        verb, _, argument = body.decode().partition(" ")
        match verb:
            case "say":
                line.send(argument.encode())
            case "environ":
                line.send("\n".join(f"{k}={v}" for k, v in os.environ.items()).encode())
            case "memory":
                try:
                    line.send(b"ok" if bytearray(int(argument) << 20) else b"")
                except MemoryError:
                    line.send(b"MemoryError")
            case "spin":
                while True:
                    pass
            case "crash":
                print("last words", file=sys.stderr, flush=True)
                os._exit(3)
            case "garbage":
                os.write(line.fileno(), b"\xff" * 64)
            case "descriptors":
                links = (f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd"))
                line.send("\n".join(f"- {os.readlink(p)}" for p in links if os.path.exists(p)).encode())
            case "fork":
                other = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
                line.send(str(other.pid).encode())
            case "deaf":
                line.send(b"deaf")
                while True:
                    os.read(os.pipe()[0], 1)


if __name__ == "__main__":
    main()
