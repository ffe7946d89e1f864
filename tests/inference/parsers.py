"""What reads a stranger's bytes behind InferenceService: each takes any bytes, and ends in a refusal or in nothing.

Law of this room: one function for each reader; what it raises is a fault of ours. No torch.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Mapping

from google.protobuf.message import DecodeError

from qlorad.v1 import inference_pb2, messages_pb2
from services.common import artifacts, config, frames, names
from services.common.errors import Fault, to_status
from services.common.prompt.example import ExampleError, as_template_sees
from services.common.prompt.render import Renderer, RenderError
from services.common.safetensors_header import read_header
from services.inference.answering import submit_of
from services.inference.app import Config
from services.inference.messages import Ask
from services.inference.turns import check_conversation
from tests.common.prompt import models, shapes
from tests.inference.test_asks import CHECKS, held

Parser = Callable[[bytes], None]
_SHAPES = (shapes.CHATML, shapes.MISTRAL, shapes.QWEN, shapes.GEMMA)


def _requests() -> Parser:
    """A request's bytes up to what an engine is told; the first byte says which request."""
    kinds = list(CHECKS)

    def parse(data: bytes) -> None:
        kind = kinds[(data[0] if data else 0) % len(kinds)]
        try:
            asks = CHECKS[kind](kind.FromString(data[1:]))
            for ask in asks if isinstance(asks, list) else [asks]:
                assert isinstance(ask, Ask)
                submit_of(ask, held(), "ada").SerializeToString()
        except DecodeError:
            return
        except Fault as fault:
            assert fault.violations or fault.resource
            to_status(fault).SerializeToString()

    return parse


def _conversations() -> Parser:
    """A conversation's bytes up to its rendering in templates of several families."""
    with tempfile.TemporaryDirectory() as folder:
        payloads = [models.write_model(pathlib.Path(folder) / str(n), shape.source) for n, shape in enumerate(_SHAPES)]
        renderers = [Renderer.open(payload, models.DATE) for payload in payloads]

    def parse(data: bytes) -> None:
        try:
            talk = messages_pb2.Conversation.FromString(data)
        except DecodeError:
            return
        wrong = check_conversation(talk)
        for renderer in renderers:
            try:
                renderer.render(*as_template_sees(talk, renderer.sees_parts), add_generation_prompt=True).text.encode()
            except (ExampleError, RenderError) as error:
                assert str(error)
        assert all(violation.field.startswith("conversation") for violation in wrong)

    return parse


def _frames() -> Parser:
    def parse(data: bytes) -> None:
        try:
            bodies, end = frames.unpack_all(data)
            assert end <= len(data) and b"".join(map(frames.pack, bodies)) == data[:end]
        except frames.BadFrame:
            return

    return parse


def _file(read: Callable[[pathlib.Path], object], *refusals: type[Exception]) -> Parser:
    """A reader of files."""
    path = pathlib.Path(tempfile.mkdtemp()) / "file"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except refusals as error:
            assert str(error)

    return parse


def _pages() -> Parser:
    def parse(data: bytes) -> None:
        try:
            position = names.page_position(data.decode(errors="replace"))
            assert names.page_position(names.page_token(position)) == position
        except Fault as fault:
            assert fault.violations

    return parse


def _presets() -> Parser:
    from services.inference import preset

    def parse(data: bytes) -> None:
        try:
            made = inference_pb2.Preset.FromString(data)
        except DecodeError:
            return
        if not preset.check(made):
            talk = messages_pb2.Conversation(messages=[messages_pb2.Message(role=messages_pb2.ROLE_USER)])
            preset.applied(made, talk).SerializeToString()

    return parse


def _limits(path: pathlib.Path) -> None:
    config.load(Config, "inference", ["--home", str(path.parent), "--limits-file", str(path)], {})


def _tokens(path: pathlib.Path) -> None:
    words = ["--home", str(path.parent), "--tokens-file", str(path), "--limits-file", str(path)]
    config.load(Config, "inference", words, {})


PARSERS: Mapping[str, Callable[[], Parser]] = {
    "requests": _requests,
    "conversations": _conversations,
    "frames": _frames,
    "manifests": lambda: _file(artifacts.read_manifest, Fault),
    "safetensors": lambda: _file(read_header, Fault),
    "pages": _pages,
    "presets": _presets,
    "limits": lambda: _file(_limits, config.ConfigError),
    "tokens": lambda: _file(_tokens, config.ConfigError),
}
