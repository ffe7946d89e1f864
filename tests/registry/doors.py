"""What the registry's tests share: its two doors, and small models and adapters on disk."""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from safetensors.numpy import save

from qlorad.v1 import errors_pb2, registry_pb2, registry_pb2_grpc
from services.common.safetensors_header import read_model_headers
from services.common.shelf import Shelf
from tests.house import House

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Doors:
    """A running registry."""

    house: House
    models: registry_pb2_grpc.ModelServiceStub
    adapters: registry_pb2_grpc.AdapterServiceStub

    @property
    def home(self) -> pathlib.Path:
        return self.house.home

    def make(self, request_id: str, model_id: str = "", size: int = registry_pb2.STARTER_SIZE_TEST) -> list[Any]:
        request = registry_pb2.MakeStarterModelRequest(request_id=request_id, model_id=model_id, size=size)  # type: ignore[arg-type]
        return list(self.models.MakeStarterModel(request, timeout=170))

    def bring(self, path: pathlib.Path, model_id: str, request_id: str = "") -> registry_pb2.Model:
        request = registry_pb2.ImportModelRequest(
            request_id=request_id or f"import-{model_id}", path=str(path), model_id=model_id
        )
        return list(self.models.ImportModel(request, timeout=120))[-1].model

    def take(
        self, files: Mapping[str, bytes], adapter_id: str, request_id: str = "", **header: Any
    ) -> registry_pb2.Adapter:
        told = registry_pb2.ImportAdapterHeader(
            request_id=request_id or f"take-{adapter_id}",
            adapter_id=adapter_id,
            base_model=header.pop("base_model", "models/starter-test"),
            **header,
        )
        return self.adapters.ImportAdapter(pieces(told, files), timeout=120).adapter

    def get(self, name: str) -> registry_pb2.Model:
        return self.models.GetModel(registry_pb2.GetModelRequest(name=name), timeout=10).model


def open_doors(house: House, *flags: str) -> Doors:
    """Starts the registry and connects."""
    house.start("registry", *flags)
    channel = house.channel("registry")
    return Doors(house, registry_pb2_grpc.ModelServiceStub(channel), registry_pb2_grpc.AdapterServiceStub(channel))


def pieces(
    header: registry_pb2.ImportAdapterHeader, files: Mapping[str, bytes], size: int = 1 << 16
) -> Iterator[registry_pb2.ImportAdapterRequest]:
    """An adapter as the stream of its import."""
    yield registry_pb2.ImportAdapterRequest(header=header)
    for path, data in files.items():
        yield registry_pb2.ImportAdapterRequest(path=path)
        for at in range(0, len(data), size):
            yield registry_pb2.ImportAdapterRequest(data=data[at : at + size])


def refusal(call: Callable[[], Any]) -> tuple[str, str, str]:
    """Status code, reason and message of a call that must fail."""
    try:
        answer = call()
    except grpc.RpcError as error:
        status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])  # type: ignore[attr-defined]
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info), status
        assert info.reason in {n.removeprefix("REASON_") for n in errors_pb2.Reason.keys()}
        return error.code().name, info.reason, status.message  # type: ignore[attr-defined]
    raise AssertionError(f"answered: {answer}")


def model_folder(home: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of the starter's files, to be changed at will."""
    shutil.copytree(Shelf(home / "store").open("models", "starter-test").payload, target)
    return target


def adapter_files(
    home: pathlib.Path, rank: int = 4, seed: int = 1, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> dict[str, bytes]:
    """A plain LoRA adapter that fits the starter, as peft would write it."""
    shapes = read_model_headers(Shelf(home / "store").open("models", "starter-test").payload)
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, info in shapes.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets and len(info.shape) == 2:
            out_features, in_features = info.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = draw.normal(size=(rank, in_features)).astype(
                np.float32
            )
            tensors[f"base_model.model.{module}.lora_B.weight"] = draw.normal(size=(out_features, rank)).astype(
                np.float32
            )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/else",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "target_modules": list(reversed(targets)),
        "bias": "none",
        "revision": None,
    }
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


class _Payload:
    def __init__(self, mark: pathlib.Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (pathlib.Path.touch, (self.mark,))


def evil(mark: pathlib.Path) -> bytes:
    """A pickle that touches a file when it is loaded, which is proven by loading it once."""
    data = pickle.dumps(_Payload(mark))
    pickle.loads(data)
    assert mark.exists()
    mark.unlink()
    return data
