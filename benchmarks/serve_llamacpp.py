"""An optional peer of the serving benchmark: llama.cpp with Q4_K_M weights, in an environment of its own.

    python -m venv FOLDER && FOLDER/bin/pip install llama-cpp-python gguf
    .venv/bin/python -m benchmarks.serve --parts single --llamacpp FOLDER/bin/python

The base is written as GGUF in half precision and quantised by llama.cpp itself.
"""

from __future__ import annotations

import json
import math
import pathlib
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import talk


def tensors(folder: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Names and values of the bfloat16 tensors of a model, as fp32."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, told in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + n for n in told["data_offsets"])
                high = np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16
                yield name, high.view(np.float32).reshape(told["shape"])


def write_gguf(folder: pathlib.Path, target: pathlib.Path) -> None:
    """A Llama with a byte-level BPE as llama.cpp reads it."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    heads, groups, layers = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers"))
    w = gguf.GGUFWriter(target, "llama")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_block_count(layers)
    w.add_head_count(heads)
    w.add_head_count_kv(groups)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_dimension_count(config["hidden_size"] // heads)
    w.add_rope_freq_base(config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    w.add_vocab_size(config["vocab_size"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    words = sorted(model["vocab"], key=model["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(words)
    w.add_token_types([gguf.TokenType.CONTROL if word.startswith("<|") else gguf.TokenType.NORMAL for word in words])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    w.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, values in tensors(folder):
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            if part in name:  # halves of a head lie side by side there, and interleaved here
                rows, columns = values.shape
                values = values.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        told = names.get_name(name, try_suffixes=(".weight",))
        w.add_tensor(told, values if values.ndim == 1 else values.astype(np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


class LlamaCpp:
    """The base in Q4_K_M."""

    def __init__(self, folder: str, threads: int) -> None:
        import llama_cpp

        whole, small = (pathlib.Path(folder) / f"{kind}.gguf" for kind in ("f16", "q4-k-m"))
        if not small.exists():
            write_gguf(pathlib.Path(folder), whole)
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
            if llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), how):
                raise SystemExit("llama.cpp did not quantise the model")
        self._llm = llama_cpp.Llama(str(small), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        self._end = self._llm.token_eos()

    def base(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """One prompt after another."""
        import llama_cpp

        endless = llama_cpp.LogitsProcessorList([self._not_the_end])
        ids: list[list[int]] = []
        begun = time.perf_counter()
        for prompt in prompts:
            self._llm.reset()
            made: list[int] = []
            for token in self._llm.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0, logits_processor=endless):
                made.append(int(token))
                if len(made) == new:
                    break
            ids.append(made)
        return {"seconds": time.perf_counter() - begun, "tokens": sum(map(len, ids)), "ids": ids}

    def _not_the_end(self, _ids: Any, scores: Any) -> Any:
        scores[self._end] = -math.inf
        return scores


def main() -> None:
    peer = LlamaCpp(sys.argv[2], int(sys.argv[3]))
    talk.obey({"base": peer.base}, int(sys.argv[1]))


if __name__ == "__main__":
    main()
