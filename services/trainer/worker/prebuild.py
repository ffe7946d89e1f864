"""Builds DeepSpeed's compiled part once: `python -m services.trainer.worker.prebuild`.

Promises: afterwards a job with several ranks starts without compiling, and a
second call ends at once. Needs g++ and ninja; says so where they are missing.
Takes about two minutes the first time.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import warnings

from services.common.extensions import extensions_folder


def main() -> None:
    folder = extensions_folder(os.environ.get("QLORAD_TORCH_EXTENSIONS", ""), sys.prefix)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        print(f"not built: {' and '.join(missing)} not found; jobs with ranks above 1 need it", file=sys.stderr)
        raise SystemExit(1)
    for lock in folder.glob("**/lock"):
        lock.unlink(missing_ok=True)  # of a build that was killed
    warnings.filterwarnings("ignore")
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    print(f"built: {folder}")


if __name__ == "__main__":
    main()
