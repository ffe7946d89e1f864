"""ImportModel through the door: what is sealed, what is refused, and that nothing of it ever runs."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

import pytest

from qlorad.v1 import registry_pb2
from services.common.prompt.tokens import Tokenizer
from services.common.shelf import Shelf
from tests.registry.doors import Doors, evil, model_folder, open_doors, refusal


def change(path: pathlib.Path, **values: Any) -> None:
    told = json.loads(path.read_bytes())
    told.update(values)
    path.write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))


def nothing_staged(doors: Doors) -> bool:
    return not list((doors.home / "store" / "staging").iterdir())


def test_a_good_folder_is_copied_and_sealed(doors: Doors, tmp_path: pathlib.Path) -> None:
    folder = model_folder(doors.home, tmp_path / "m")
    (folder / "README.md").write_text("not of the model")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.pth").write_bytes(b"left where it is")
    # A cache of the hub is links into another folder.
    shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    request = registry_pb2.ImportModelRequest(request_id="good", path=str(folder), model_id="good")
    told = list(doors.models.ImportModel(request, timeout=120))
    stages = [u.progress.stage for u in told[:-1]]
    assert "copy" in stages and "inspect" in stages
    model = told[-1].model
    starter = doors.get("models/starter-test")
    assert model.digest == starter.digest and model.name == "models/good"
    sealed = Shelf(doors.home / "store").open("models", "good", verify=True)
    assert {p.name for p in sealed.payload.iterdir()}.isdisjoint({"README.md", "original"})
    assert not any(p.is_symlink() for p in sealed.payload.iterdir())
    assert sealed.payload.joinpath("model.safetensors").stat().st_ino != (tmp_path / "blob").stat().st_ino
    assert doors.bring(folder, "good", "again") == model
    assert refusal(lambda: doors.bring(tmp_path, "good", "elsewhere"))[1] == "REJECTED"
    (folder / "generation_config.json").write_text("{}")
    assert refusal(lambda: doors.bring(folder, "good", "changed"))[1] == "ALREADY_EXISTS"
    other = model_folder(doors.home, tmp_path / "other")
    assert refusal(lambda: doors.bring(other, "good", "third"))[:2] == ("ALREADY_EXISTS", "ALREADY_EXISTS")


def pickle_beside(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(payload)


def pickle_as_weights(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "model.safetensors").write_bytes(payload)


def pickle_as_tokenizer(folder: pathlib.Path, payload: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(payload)


def remote_code(folder: pathlib.Path, _: bytes) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})


def remote_code_with_file(folder: pathlib.Path, _: bytes) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")


def remote_tokenizer(folder: pathlib.Path, _: bytes) -> None:
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Evil", None]})


def no_tokenizer(folder: pathlib.Path, _: bytes) -> None:
    (folder / "tokenizer.json").unlink()


def no_weights(folder: pathlib.Path, _: bytes) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: pathlib.Path, _: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def giant_header(folder: pathlib.Path, _: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def deep_config(folder: pathlib.Path, _: bytes) -> None:
    (folder / "config.json").write_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def quantised(folder: pathlib.Path, _: bytes) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})


def no_architecture(folder: pathlib.Path, _: bytes) -> None:
    change(folder / "config.json", architectures=...)


def lying_index(folder: pathlib.Path, _: bytes) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED_AT_ONCE: list[tuple[Callable[[pathlib.Path, bytes], None], str]] = [
    (pickle_beside, "pytorch_model.bin"),
    (pickle_as_weights, "model.safetensors"),
    (pickle_as_tokenizer, "tokenizer.json"),
    (remote_code, "auto_map"),
    (remote_code_with_file, "modeling_evil.py"),
    (remote_tokenizer, "auto_map"),
    (no_tokenizer, "tokenizer.json"),
    (no_weights, "safetensors"),
    (cut_weights, "model.safetensors"),
    (giant_header, "model.safetensors"),
    (deep_config, "config.json"),
    (quantised, "quantization_config"),
    (no_architecture, "architecture"),
    (lying_index, "index"),
]


@pytest.mark.parametrize(("spoil", "named"), REFUSED_AT_ONCE, ids=lambda v: getattr(v, "__name__", ""))
def test_a_bad_folder_is_refused_by_name_and_nothing_runs(
    doors: Doors, tmp_path: pathlib.Path, spoil: Callable[[pathlib.Path, bytes], None], named: str
) -> None:
    mark = tmp_path / "touched"
    folder = model_folder(doors.home, tmp_path / "m")
    spoil(folder, evil(mark))
    alias = spoil.__name__.replace("_", "-")
    code, reason, message = refusal(lambda: doors.bring(folder, alias))
    assert (code, reason) == ("FAILED_PRECONDITION", "REJECTED")
    assert named in message
    assert not mark.exists()
    assert nothing_staged(doors)
    assert Shelf(doors.home / "store").alias("models", alias) is None


def test_weights_that_do_not_fit_the_architecture_are_refused(doors: Doors, tmp_path: pathlib.Path) -> None:
    folder = model_folder(doors.home, tmp_path / "m")
    change(folder / "config.json", num_hidden_layers=3)
    message = refusal(lambda: doors.bring(folder, "misfit"))[2]
    assert "model.layers.2" in message and "LlamaForCausalLM" in message


def test_a_template_that_renders_otherwise_each_time_is_refused(doors: Doors, tmp_path: pathlib.Path) -> None:
    folder = model_folder(doors.home, tmp_path / "m")
    text = "{% for m in messages %}{{ m.content }}{{ range(9999) | random }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)
    _, reason, message = refusal(lambda: doors.bring(folder, "template"))
    assert reason == "REJECTED" and "conversation probe 1" in message and "byte" in message
    failed = doors.get("models/template")
    assert failed.state == registry_pb2.MODEL_STATE_FAILED and failed.error == message
    gone = doors.models.DeleteModel(registry_pb2.DeleteModelRequest(request_id="del-template", name=failed.name))
    assert gone.freed_bytes == 0
    assert refusal(lambda: doors.get("models/template"))[1] == "NOT_FOUND"


def test_where_transformers_reads_a_tokenizer_otherwise_its_own_is_sealed(doors: Doors, tmp_path: pathlib.Path) -> None:
    folder = model_folder(doors.home, tmp_path / "m")
    # This class puts a normalizer of its own before whatever tokenizer.json says.
    change(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", backend=...)
    model = doors.bring(folder, "qwen-like")
    came, starter = (folder / "tokenizer.json").read_bytes(), doors.get("models/starter-test")
    assert model.tokenizer_digest not in (starter.tokenizer_digest, "sha256:" + hashlib.sha256(came).hexdigest())
    payload = Shelf(doors.home / "store").open("models", "qwen-like", verify=True).payload
    assert Tokenizer.open(payload).encode("e\u0301").ids == Tokenizer.open(payload).encode("\u00e9").ids
    assert Tokenizer.open(folder).encode("e\u0301").ids != Tokenizer.open(folder).encode("\u00e9").ids


def test_a_tokenizer_that_transformers_cannot_use_is_refused(doors: Doors, tmp_path: pathlib.Path) -> None:
    folder = model_folder(doors.home, tmp_path / "m")
    change(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer", backend=...)
    _, reason, message = refusal(lambda: doors.bring(folder, "gemma-like"))
    assert reason == "REJECTED" and "text probe 1" in message and "<unk>" in message


@pytest.mark.slow
def test_a_template_that_never_ends_costs_a_worker_and_no_more(
    tmp_path: pathlib.Path, home: pathlib.Path, house_factory
) -> None:
    doors = open_doors(house_factory(home), "--worker-cpu-seconds", "12")
    folder = model_folder(home, tmp_path / "m")
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)
    _, reason, message = refusal(lambda: doors.bring(folder, "loops"))
    assert reason == "REJECTED" and "12 CPU seconds" in message
    assert doors.get("models/starter-test").state == registry_pb2.MODEL_STATE_READY


@pytest.mark.slow
def test_memory_of_a_worker_is_bounded(tmp_path: pathlib.Path, home: pathlib.Path, house_factory) -> None:
    doors = open_doors(house_factory(home), "--worker-memory-bytes", str(6 << 30))
    folder = model_folder(home, tmp_path / "m")
    grow = "{% set ns = namespace(t='x' * 99999) %}{% for a in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(grow)
    assert refusal(lambda: doors.bring(folder, "grows"))[1] in ("REJECTED", "WORKER_LOST")
    assert doors.get("models/starter-test").state == registry_pb2.MODEL_STATE_READY


def test_folders_that_are_not_there_or_not_allowed(tmp_path: pathlib.Path, home: pathlib.Path, house_factory) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    allowed.mkdir()
    doors = open_doors(house_factory(home), "--import-roots", str(allowed))
    model_folder(home, other)
    (allowed / "link").symlink_to(other)
    assert refusal(lambda: doors.bring(allowed / "none", "a"))[:2] == ("NOT_FOUND", "NOT_FOUND")
    for number, path in enumerate((other, allowed / "link", allowed / ".." / "other", pathlib.Path("/proc/self/root"))):
        code, reason, message = refusal(lambda path=path, number=number: doors.bring(path, f"b{number}"))
        assert (code, reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED"), path
        assert str(allowed) in message
    folder = model_folder(home, allowed / "m")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(other / "config.json")
    assert refusal(lambda: doors.bring(folder, "c"))[1] == "PERMISSION_DENIED"
    told = refusal(lambda: doors.bring(pathlib.Path("relative"), "d"))
    assert told[1] == "INVALID_REQUEST" and "path" in told[2]
