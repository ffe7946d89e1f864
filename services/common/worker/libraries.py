"""Heavy libraries, imported without what nobody here needs of them.

Law of this room: whoever imports bitsandbytes, or peft which does, calls
`spare_the_compiler` before; a worker's first step comes most of a second earlier.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch


def spare_the_compiler() -> None:
    """Imports bitsandbytes, and not the whole of torch's compiler with it.

    It has four functions compiled by decorators, and goes on plainly where that
    fails. They serve devices without kernels of their own: CPU and CUDA have them.
    """
    if "bitsandbytes" in sys.modules:
        return
    compile_ = torch.compile

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("nothing is compiled while bitsandbytes is imported")

    torch.compile = refuse  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_
