"""Adapters through the door: taken in and sent out whole, refused by name, named by compare-and-swap."""

from __future__ import annotations

import hashlib
import json
import pathlib
import threading

import numpy as np
import pytest
from safetensors.numpy import load, save

from qlorad.v1 import artifacts_pb2, registry_pb2
from services.common import artifacts
from services.common.errors import Fault
from services.common.facts import AdapterFacts, from_manifest
from services.common.frames.v1 import shelf_pb2
from services.common.shelf import Shelf
from tests.registry.doors import CONFIG, WEIGHTS, Doors, adapter_files, evil, open_doors, pieces, refusal


@pytest.fixture(scope="module")
def taken(doors: Doors) -> registry_pb2.Adapter:
    """An adapter that came in whole."""
    return doors.take(adapter_files(doors.home), "first")


def page(doors: Doors, size: int = 0, token: str = "", base: str = ""):
    request = registry_pb2.AdapterServiceListAdaptersRequest(page_size=size, page_token=token, base_model=base)
    return doors.adapters.ListAdapters(request, timeout=10)


def get(doors: Doors, name: str) -> registry_pb2.Adapter:
    return doors.adapters.GetAdapter(registry_pb2.GetAdapterRequest(name=name), timeout=10).adapter


def download(doors: Doors, name: str) -> dict[str, bytes]:
    files: dict[str, bytearray] = {}
    told: dict[str, artifacts_pb2.FileEntry] = {}
    last = ""
    for piece in doors.adapters.DownloadAdapter(registry_pb2.DownloadAdapterRequest(name=name), timeout=30):
        if piece.HasField("file"):
            last = piece.file.path
            told[last], files[last] = piece.file, bytearray()
        else:
            files[last] += piece.data
    for path, data in files.items():
        assert len(data) == told[path].size_bytes
        assert hashlib.sha256(data).hexdigest() == told[path].sha256
    return {path: bytes(data) for path, data in files.items()}


def test_a_good_adapter_is_sealed_for_its_base(doors: Doors, taken: registry_pb2.Adapter) -> None:
    base = doors.get("models/starter-test")
    assert taken.name == "adapters/first"
    assert (taken.rank, taken.alpha, list(taken.target_modules)) == (4, 8.0, ["q_proj", "v_proj"])
    assert taken.lineage.base_digest == base.digest
    assert taken.lineage.tokenizer_digest == base.tokenizer_digest
    assert taken.lineage.template_digest == base.template_digest
    assert list(taken.jobs) == [] and [a.name for a in taken.aliases] == ["adapters/first"]
    sealed = Shelf(doors.home / "store").open("adapters", "first", verify=True)
    assert taken.digest == artifacts.digest_of(sealed.manifest.kind, sealed.manifest.files, taken.lineage)
    facts = from_manifest(AdapterFacts, sealed.manifest)
    assert facts.golden and facts.parameters == taken.parameters == 4 * (128 * 2 + 128 + 64) * 2
    assert get(doors, f"adapters/{taken.digest}") == get(doors, "adapters/first") == taken


def test_it_comes_out_as_it_went_in_but_for_names(doors: Doors, taken: registry_pb2.Adapter) -> None:
    sent, got = adapter_files(doors.home), download(doors, taken.name)
    assert set(got) == {CONFIG, WEIGHTS}
    before, after = load(sent[WEIGHTS]), load(got[WEIGHTS])
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    config = json.loads(got[CONFIG])
    assert config["base_model_name_or_path"] == "" and config["target_modules"] == ["q_proj", "v_proj"]
    assert config["r"] == 4 and config["lora_alpha"] == 8 and "revision" not in config


def test_equal_adapters_have_one_digest_however_they_were_written(doors: Doors, taken: registry_pb2.Adapter) -> None:
    files = adapter_files(doors.home)
    told = json.loads(files[CONFIG])
    told.update(target_modules="all-linear", base_model_name_or_path="elsewhere", task_type=None)
    files = {WEIGHTS: save(dict(reversed(load(files[WEIGHTS]).items()))), CONFIG: json.dumps(told, indent=9).encode()}
    twin = doors.take(files, "twin")
    assert twin.digest == taken.digest
    assert {a.name for a in twin.aliases} == {"adapters/first", "adapters/twin"}
    assert doors.take(files, "twin") == twin  # the same request again
    assert refusal(lambda: doors.take(adapter_files(doors.home, seed=9), "twin"))[1] == "REQUEST_ID_REUSED"
    other = adapter_files(doors.home, seed=2)
    assert refusal(lambda: doors.take(other, "twin", "twin-2"))[:2] == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    moved = doors.take(other, "twin", "twin-3", move_alias=True)
    assert moved.digest != taken.digest and moved.aliases[0].generation == 2
    assert get(doors, "adapters/twin").digest == moved.digest


def test_a_rank_stabilised_adapter_stays_one(doors: Doors, taken: registry_pb2.Adapter) -> None:
    files = adapter_files(doors.home)
    told = {**json.loads(files[CONFIG]), "use_rslora": True}
    made = doors.take({**files, CONFIG: json.dumps(told).encode()}, "stabilised")
    assert made.rslora and not taken.rslora and made.digest != taken.digest
    told["use_rslora"] = "yes"
    refused = refusal(lambda: doors.take({**files, CONFIG: json.dumps(told).encode()}, "said-yes"))
    assert refused[1] == "REJECTED" and "use_rslora" in refused[2]


def test_the_stream_must_be_in_order(doors: Doors) -> None:
    files = adapter_files(doors.home)
    header = registry_pb2.ImportAdapterHeader(request_id="o", adapter_id="o", base_model="models/starter-test")

    def send(*messages: registry_pb2.ImportAdapterRequest) -> tuple[str, str, str]:
        return refusal(lambda: doors.adapters.ImportAdapter(iter(messages), timeout=10))

    head = registry_pb2.ImportAdapterRequest(header=header)
    path = registry_pb2.ImportAdapterRequest(path=CONFIG)
    assert "header first" in send()[2]
    assert "header first" in send(path)[2]
    assert send(head, head)[1] == "INVALID_REQUEST"
    assert send(head, registry_pb2.ImportAdapterRequest(data=b"x"))[1] == "INVALID_REQUEST"
    assert send(head, path, path)[1] == "INVALID_REQUEST"
    assert WEIGHTS in send(head, path)[2]
    assert send(head, path, registry_pb2.ImportAdapterRequest(data=bytes((1 << 20) + 1)))[1] == "TOO_LARGE"
    bad = registry_pb2.ImportAdapterHeader(request_id="", adapter_id="A b", base_model="x")
    told = refusal(lambda: doors.adapters.ImportAdapter(pieces(bad, files), timeout=10))
    assert all(f in told[2] for f in ("request_id", "adapter_id", "base_model"))
    header.base_model = "models/none"
    assert refusal(lambda: doors.adapters.ImportAdapter(pieces(header, files), timeout=10))[1] == "NOT_FOUND"
    assert not list((doors.home / "store" / "staging").iterdir())


def test_a_pickle_is_refused_and_never_run(doors: Doors, tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "touched"
    payload, files = evil(mark), adapter_files(doors.home)
    told = refusal(lambda: doors.take({CONFIG: files[CONFIG], "adapter_model.bin": payload}, "p1"))
    assert told[1] == "REJECTED" and "adapter_model.bin" in told[2]
    told = refusal(lambda: doors.take({CONFIG: files[CONFIG], WEIGHTS: payload}, "p2"))
    assert told[1] == "REJECTED" and WEIGHTS in told[2]
    assert not mark.exists()
    assert refusal(lambda: get(doors, "adapters/p2"))[1] == "NOT_FOUND"


def with_magnitudes(home: pathlib.Path, tensors: dict, factor: float) -> dict:
    """They, with the base's own magnitudes times a factor."""
    from safetensors import safe_open

    (path,) = Shelf(home / "store").open("models", "starter-test").payload.glob("*.safetensors")
    found = dict(tensors)
    with safe_open(path, "pt") as f:
        for name in (k for k in tensors if k.endswith(".lora_A.weight")):
            module = name.removesuffix(".lora_A.weight")
            weight = f.get_tensor(f"{module.removeprefix('base_model.model.')}.weight").float().numpy()
            found[f"{module}.lora_magnitude_vector"] = factor * np.linalg.norm(weight, axis=1)
    return found


def test_a_dora_adapter_comes_in_with_its_magnitudes(starter_home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Also one whose magnitudes alone have an effect."""
    from services.registry.worker import adapter

    base = Shelf(starter_home / "store").open("models", "starter-test")
    files = adapter_files(starter_home)
    plain = {k: v * 0 if "lora_B" in k else v for k, v in load(files[WEIGHTS]).items()}
    (tmp_path / WEIGHTS).write_bytes(save(with_magnitudes(starter_home, plain, 1.1)))
    (tmp_path / CONFIG).write_text(json.dumps({**json.loads(files[CONFIG]), "use_dora": True}))
    order = shelf_pb2.AdapterWork(
        folder=str(tmp_path), base_payload=str(base.payload), base_facts=base.manifest.facts, name="adapters/x"
    )
    told = adapter.take(order)
    assert told.dora and told.parameters == 4 * (128 * 2 + 128 + 64) * 2 + 2 * (128 + 64)
    assert json.loads((tmp_path / CONFIG).read_text())["use_dora"] is True


def spoiled(home: pathlib.Path, how: str) -> dict[str, bytes]:
    """An adapter with one thing wrong."""
    files = adapter_files(home)
    config, tensors = json.loads(files[CONFIG]), dict(load(files[WEIGHTS]))
    first = min(k for k in tensors if "lora_A" in k)
    match how:
        case "foreign":
            tensors["base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight"] = tensors[first]
        case "embedding":
            for part, shape in (("A", (4, 2048)), ("B", (128, 4))):
                tensors[f"base_model.model.model.embed_tokens.lora_{part}.weight"] = np.ones(shape, np.float32)
        case "other base":
            tensors = {k: np.ones((v.shape[0] * 2, v.shape[1]), np.float32) for k, v in tensors.items()}
        case "half":
            del tensors[first]
        case "zero":
            tensors = {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}
        case "nan":
            tensors[first] = tensors[first] * np.nan
        case "rank":
            config["r"] = 5
        case "dora":
            config["use_dora"] = True
        case "plain":
            tensors = with_magnitudes(home, tensors, 1.0)
        case "fresh":
            config["use_dora"] = True
            tensors = with_magnitudes(home, {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, 1.0)
        case "kind":
            config["peft_type"] = "IA3"
        case "whole layers":
            config["modules_to_save"] = ["lm_head"]
        case "empty":
            tensors = {}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors)}


SPOILED = {
    "foreign": "x_proj", "embedding": "embed_tokens", "other base": "shape", "half": "lora_A", "zero": "effect",
    "nan": "finite", "rank": "shape", "dora": "lora_magnitude_vector", "plain": "use_dora",
    "fresh": "effect", "kind": "IA3", "whole layers": "modules_to_save",
    "empty": "no tensors",
}  # fmt: skip


def test_a_spoiled_adapter_is_refused_through_the_door(doors: Doors) -> None:
    for how in ("zero", "foreign"):
        code, reason, message = refusal(lambda how=how: doors.take(spoiled(doors.home, how), f"bad-{how}"))
        assert (code, reason) == ("FAILED_PRECONDITION", "REJECTED")
        assert SPOILED[how] in message
    assert not list((doors.home / "store" / "staging").iterdir())


@pytest.mark.parametrize(("how", "named"), SPOILED.items())
def test_the_worker_names_what_is_wrong(
    starter_home: pathlib.Path, tmp_path: pathlib.Path, how: str, named: str
) -> None:
    from services.registry.worker import adapter

    base = Shelf(starter_home / "store").open("models", "starter-test")
    for path, data in spoiled(starter_home, how).items():
        (tmp_path / path).write_bytes(data)
    order = shelf_pb2.AdapterWork(
        folder=str(tmp_path), base_payload=str(base.payload), base_facts=base.manifest.facts, name="adapters/x"
    )
    with pytest.raises(Fault, match=named) as caught:
        adapter.take(order)
    assert caught.value.message.startswith(("adapter_", "tensor"))


def test_aliases_move_by_compare_and_swap(doors: Doors, taken: registry_pb2.Adapter) -> None:
    def move(
        request_id: str, expected: int | None = None, alias: str = "live", target: str = ""
    ) -> artifacts_pb2.Alias:
        request = registry_pb2.SetAdapterAliasRequest(
            request_id=request_id, alias=f"adapters/{alias}", adapter=target or taken.name, expected_generation=expected
        )
        return doors.adapters.SetAdapterAlias(request, timeout=10).alias

    made = move("m1", 0)
    assert (made.name, made.digest, made.generation) == ("adapters/live", taken.digest, 1)
    assert move("m1", 0) == made
    code, reason, message = refusal(lambda: move("m2", 0))
    assert (code, reason) == ("ABORTED", "STALE_GENERATION") and "generation 1" in message
    assert refusal(lambda: move("m3", target="adapters/none"))[1] == "NOT_FOUND"
    other = doors.take(adapter_files(doors.home, seed=3), "third")
    won: list[int] = []
    lost: list[str] = []

    def race(number: int) -> None:
        try:
            move(f"race-{number}", 1, target=other.name)
            won.append(number)
        except Exception as error:
            lost.append(str(error.code().name))  # type: ignore[attr-defined]

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1 and lost == ["ABORTED"] * 7
    assert get(doors, "adapters/live").digest == other.digest
    assert move("m4").generation == 3


def test_lists_are_paged_and_told_by_base(doors: Doors, taken: registry_pb2.Adapter) -> None:
    everything = page(doors).adapters
    assert taken.digest in {a.digest for a in everything}
    digests: list[str] = []
    token = ""
    while True:
        answer = page(doors, 1, token, "models/starter-test")
        digests += [a.digest for a in answer.adapters]
        token = answer.next_page_token
        if not token:
            break
    assert digests == [a.digest for a in everything] and len(set(digests)) == len(digests)
    assert list(page(doors, base="models/sha256:" + "0" * 64).adapters) == []
    for call in (
        lambda: page(doors, 1001),
        lambda: page(doors, -1),
        lambda: page(doors, 1, "x"),
        lambda: page(doors, 0, "", "models/none"),
    ):
        assert refusal(call)[1] == "INVALID_REQUEST"


def test_what_is_in_use_is_not_removed(doors: Doors) -> None:
    adapter = doors.take(adapter_files(doors.home, seed=4), "held")

    def remove(name: str, request_id: str) -> int:
        request = registry_pb2.DeleteAdapterRequest(request_id=request_id, name=name)
        return doors.adapters.DeleteAdapter(request, timeout=10).freed_bytes

    pin = Shelf(doors.home / "store").pin(adapter.digest, "jobs/j1")
    code, reason, message = refusal(lambda: remove("adapters/held", "d1"))
    assert (code, reason) == ("FAILED_PRECONDITION", "IN_USE") and "jobs/j1" in message
    pin.release()
    assert refusal(lambda: remove(f"adapters/{adapter.digest}", "d2"))[1] == "IN_USE"  # by its alias
    assert remove("adapters/held", "d3") == adapter.size_bytes
    assert remove("adapters/held", "d3") == adapter.size_bytes
    assert refusal(lambda: get(doors, adapter.name))[1] == "NOT_FOUND"
    base = doors.get("models/starter-test")
    pin = Shelf(doors.home / "store").pin(base.digest, "engine")
    request = registry_pb2.DeleteModelRequest(request_id="d4", name="models/starter-test")
    # Other tests may have named the model twice; then the alias goes and the files stay.
    pointing = [a.name for a in Shelf(doors.home / "store").aliases("models") if a.digest == base.digest]
    assert pointing == ["models/starter-test"]
    told = refusal(lambda: doors.models.DeleteModel(request, timeout=10))
    assert told[1] == "IN_USE" and "engine" in told[2]
    pin.release()


def test_damage_on_the_shelf_is_told_and_not_sent(home: pathlib.Path, house_factory) -> None:
    doors = open_doors(house_factory(home))
    doors.take(adapter_files(home), "x")
    path = Shelf(home / "store").open("adapters", "x").payload / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, reason, message = refusal(lambda: download(doors, "adapters/x"))
    assert (code, reason) == ("DATA_LOSS", "CORRUPT") and WEIGHTS in message


def test_larger_adapters_than_allowed_are_cut_off(home: pathlib.Path, house_factory) -> None:
    doors = open_doors(house_factory(home), "--max-adapter-bytes", "5000")
    code, reason, message = refusal(lambda: doors.take(adapter_files(home), "x"))
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "TOO_LARGE") and "5000" in message
    assert not list((home / "store" / "staging").iterdir())
