"""What an adapter from outside must be before it is sealed.

Law of this room: keys, shapes and values are checked against the base that the
caller named; then the files are written anew, so that equal adapters have equal
bytes and nothing of the stranger's file is kept but the numbers.
"""

import pathlib

from google.protobuf import json_format

from services.common.errors import rejected
from services.common.facts import AdapterFacts
from services.common.frames.v1 import shelf_pb2
from services.common.prompt import golden
from services.common.prompt.render import Renderer
from services.common.safetensors_header import read_model_headers
from services.common.worker import adapter
from services.registry.worker.bounded import read_object


def take(order: shelf_pb2.AdapterWork) -> AdapterFacts:
    """The facts of a received adapter, which is rewritten in place; REJECTED naming what is wrong with it."""
    folder, base = pathlib.Path(order.folder), pathlib.Path(order.base_payload)
    headers = read_model_headers(base)
    told = json_format.MessageToDict(order.base_facts)
    if (folder / adapter.CONFIG).exists():
        read_object(folder / adapter.CONFIG)
    config = adapter.check_adapter(folder, headers)
    tensors = adapter.read_tensors(folder)
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapter.module_names(tensors)})
    foreign = sorted(set(targets) - set(told["target_modules"]))
    if foreign:
        accepted = ", ".join(told["target_modules"])
        raise rejected(adapter.WEIGHTS, f"changes {', '.join(foreign)}; accepted: {accepted}")
    fault = adapter.first_fault(tensors, base)
    if fault:
        raise rejected(adapter.WEIGHTS, fault)
    (folder / adapter.WEIGHTS).unlink()  # mapped still; written anew beside
    rank, alpha = config["r"], float(config["lora_alpha"])
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise rejected(adapter.CONFIG, f"lora_dropout is {dropout!r}; accepted: 0 up to 1")
    rslora = bool(config.get("use_rslora"))
    adapter.save_tensors(folder, tensors, rank, alpha, float(dropout), targets, rslora)
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(targets),
        parameters=sum(t.numel() for t in tensors.values()),
        golden=golden.make(Renderer.open(base, str(told["template_date"]))),
        rslora=rslora,
        dora=bool(config.get("use_dora")),
    )
