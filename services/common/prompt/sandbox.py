"""The Jinja that chat templates are written for, sandboxed.

Law of this room: a template sees plain values only and can reach nothing else;
what it renders equals, byte for byte, what transformers would render. Which
characters an assistant generates is told by `{% generation %}` marks.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

_SPANS = "__generated_spans__"


@dataclass(slots=True)
class _Spans:
    """Where a rendering stands and what its marks enclosed so far."""

    position: int = 0
    found: list[tuple[int, str]] = field(default_factory=list)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: renders its body as it is, and remembers where."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.met = False

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        self.met = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: jinja2.runtime.Context, caller: Any) -> str:
        text: str = caller()
        spans = context.get(_SPANS)
        if isinstance(spans, _Spans):
            spans.found.append((spans.position, text))
        return text


class _Dict:
    """What a template gets as `dict`: to make one, and no way to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that takes no underscored names: they lead into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with '_', as {name!r} does")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


@dataclass(frozen=True, slots=True)
class Template:
    """One compiled chat template."""

    compiled: jinja2.Template
    has_generation_marks: bool

    @classmethod
    def compile(cls, source: str, today: datetime.date) -> Template:
        """Compiles; jinja2.TemplateSyntaxError if it is none. `strftime_now` always tells `today`."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        now = datetime.datetime.combine(today, datetime.time())
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = now.strftime
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        compiled = environment.from_string(source)
        tag = environment.extensions[_GenerationTag.identifier]
        return cls(compiled, isinstance(tag, _GenerationTag) and tag.met)

    def render(self, variables: Mapping[str, Any]) -> tuple[str, tuple[tuple[int, int], ...] | None]:
        """The text, and the marked spans of it in characters.

        Spans are None where the template has no marks, or where its structure
        (a macro, a captured block) hides their places: no wrong place is told.
        Raises whatever the template raises.
        """
        spans = _Spans()
        blocks = []
        for block in self.compiled.generate({**variables, _SPANS: spans}):
            blocks.append(block)
            spans.position += len(block)
        text = "".join(blocks)
        if not self.has_generation_marks:
            return text, None
        if any(not text.startswith(inside, start) for start, inside in spans.found):
            return text, None
        return text, tuple((start, start + len(inside)) for start, inside in spans.found)
