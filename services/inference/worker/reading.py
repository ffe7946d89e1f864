"""From a request to tokens: rendered as its adapter was trained, tokenised, bounded.

Law of this room: touches no model, so any thread may read. What cannot be read is refused with the field.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

from qlorad.v1 import datasets_pb2, messages_pb2
from services.common.errors import Violation, invalid, show
from services.common.frames.v1 import engine_pb2
from services.common.prompt import formats
from services.common.prompt.example import ExampleError, as_template_sees
from services.common.prompt.render import Renderer, RenderError
from services.common.prompt.rows import RowError, make_row
from services.common.prompt.tokens import Tokenizer
from services.inference.messages import check_told

_SPELLED = 1 << 16


class Reader:
    """Tokenizer and templates of one base and its adapters."""

    def __init__(self, name: str, payload: pathlib.Path, template_date: str) -> None:
        self._name = name
        self.context_tokens = self.vocabulary = 0
        """Set once the model is there; nothing is read before."""
        self.renderer_of = functools.cache(lambda chosen: Renderer.open(payload, template_date, chosen))
        self._own: Renderer = self.renderer_of(formats.OWN)
        self._renderers: dict[str, Renderer] = {}
        """Of adapters by digest."""
        self.tokenizer = Tokenizer.open(payload)
        self.spell = functools.lru_cache(_SPELLED)(lambda ident: self.tokenizer.decode((ident,)))
        """The text of one token alone; few of them are most of what is asked for."""

        bytes_of = self.tokenizer.bytes_of()
        self.bytes_of = bytes_of and functools.lru_cache(_SPELLED)(bytes_of)
        """The bytes of one token, where they depend on no other; None for tokenizers of which that is not known."""

    def learn(self, digest: str, renderer: Renderer) -> None:
        """How an adapter's conversations are rendered."""
        self._renderers[digest] = renderer

    def forget(self, digest: str) -> None:
        """An adapter left. What is still to be read for it was cancelled, and comes to nothing however it is read."""
        self._renderers.pop(digest, None)

    def end_text(self, submit: engine_pb2.EngineSubmit) -> str:
        """Text that ends an answer: a model whose tokenizer lacks the format's end token spells it."""
        return (
            formats.end_text(self._renderer(submit.adapter_digest).prompt_format)
            if submit.HasField("conversation")
            else ""
        )

    def prompt(self, submit: engine_pb2.EngineSubmit) -> Sequence[int]:
        """The prompt's tokens; INVALID_ARGUMENT if the template refuses it or it does not fit."""
        if submit.WhichOneof("input") == "prompt":
            field, ids = "prompt", self.tokenizer.encode_prompt(submit.prompt)
        else:
            text = self._render(submit.conversation, submit.adapter_digest)
            field, ids = "conversation", self.tokenizer.encode(text).ids
        longest = self.context_tokens - 1
        if not 1 <= len(ids) <= longest:
            accepted = f"1 to {longest} tokens (the context is {self.context_tokens}, and one is for the answer)"
            raise invalid([Violation(field, f"{len(ids)} tokens", accepted)])
        self._check_known(field, ids)
        return ids

    def _check_known(self, field: str, ids: Sequence[int]) -> None:
        """A tokenizer may have got tokens that the model never had."""
        most = max(ids)
        if most >= self.vocabulary:
            given = f"{self.tokenizer.decode((most,))!r}, token {most}"
            raise invalid([Violation(field, show(given), f"tokens of the model, which has {self.vocabulary}")])

    def scored(self, order: engine_pb2.EngineScore) -> tuple[Sequence[int], Sequence[bool]]:
        """What is to be scored, and which of its tokens count; INVALID_ARGUMENT if nothing does."""
        ids: Sequence[int]
        counted: Sequence[bool]
        if order.WhichOneof("input") == "prompt":
            field, ids = "prompt", self.tokenizer.encode_prompt(order.prompt)
            counted = [number > 0 for number in range(len(ids))]
        else:
            field = "conversation"
            ids, counted = self._trained(order)
        if not 2 <= len(ids) <= self.context_tokens or not any(counted):
            accepted = f"2 to {self.context_tokens} tokens, at least one of them to be scored"
            raise invalid([Violation(field, f"{len(ids)} tokens, {sum(counted)} of them to be scored", accepted)])
        check_told(field, len(ids), order.alternatives)
        self._check_known(field, ids)
        return ids, counted

    def rendered(self, order: engine_pb2.EngineRender) -> engine_pb2.EngineRendered:
        """What the model would see of an input; INVALID_ARGUMENT if that is more than one answer tells."""
        if order.WhichOneof("input") == "prompt":
            field, text, ids = "text", order.prompt, self.tokenizer.encode_prompt(order.prompt)
        else:
            field = "conversation"
            text = self._render(order.conversation, order.adapter_digest)
            ids = self.tokenizer.encode(text).ids
        check_told(field, len(ids))
        rendered = engine_pb2.EngineRendered(text=text)
        for ident in ids:
            rendered.tokens.add(id=ident, text=self.spell(ident))
        return rendered

    def _renderer(self, digest: str) -> Renderer:
        return self._renderers.get(digest, self._own)

    def _trained(self, order: engine_pb2.EngineScore) -> tuple[Sequence[int], Sequence[bool]]:
        """A conversation as training sees it; its first token counts never, since nothing foretells it."""
        example = datasets_pb2.Example(chat=order.conversation)
        renderer, policy = self._renderer(order.adapter_digest), datasets_pb2.OVER_LENGTH_ERROR
        try:
            row = make_row(example, renderer, self.tokenizer, self.context_tokens, policy)
        except RowError as e:
            turn = f"conversation.messages[{e.turn - 1}]" if e.turn else "conversation"
            raise invalid([Violation(turn, show(e.message), "a conversation that could be trained on")]) from None
        return row.ids, [bool(m) and n > 0 for n, m in enumerate(row.mask)]

    def _render(self, conversation: messages_pb2.Conversation, digest: str) -> str:
        renderer = self._renderer(digest)
        try:
            messages, tools = as_template_sees(conversation, renderer.sees_parts)
            return renderer.render(messages, tools, add_generation_prompt=True).text
        except ExampleError as e:
            raise invalid(
                [Violation(f"conversation.{e.field}", show(e.message), "what the template can show")]
            ) from None
        except RenderError as e:
            where = f"conversation.messages[{_refused_turn(renderer, messages, tools)}]"
            own = renderer.prompt_format == formats.OWN
            taken = f"what {self._name}'s template takes" if own else "what the adapter's prompt format takes"
            raise invalid([Violation(where, f"refused: {e.message[:300]}", taken)]) from None


def _refused_turn(renderer: Renderer, messages: list, tools: list | None) -> int:
    """The first turn with which the template refuses; the last if it takes every beginning."""
    for count in range(1, len(messages)):
        try:
            renderer.render(messages[:count], tools)
        except RenderError:
            return count - 1
    return len(messages) - 1
