"""Chat templates: finding nothing, reading no files, only compiling and rendering.

A template is untrusted code that comes with a model. It runs in jinja2's immutable sandbox with the
names transformers gives it (`raise_exception`, `strftime_now`, `tojson`, `namespace`, `dict`,
loop controls, `{% generation %}`), and the output equals transformers' `apply_chat_template`
byte for byte. Template source and rendered output are bounded; limits on time need a process that
can be killed and are not here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from batchwright.errors import RequestError
from batchwright.text.chat_messages import Message, prepare_messages, prepare_tools

MAX_TEMPLATE_BYTES = 1 << 20
MAX_RENDERED_CHARS = 1 << 24

# What a template may raise while it runs, and when it is compiled, which computes constants:
# its own errors, and those of the values it handles.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,  # jinja2 writes an infinite constant as a name
    RuntimeError,  # also RecursionError
    SyntaxError,
    TypeError,
    ValueError,
)
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # removed again; the trailing space tells of trimming
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now"})


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote; it renders as is.

    The body runs as a call block, as in transformers, so a `{% set %}` inside stays inside.
    """

    tags = {"generation"}  # the name and type jinja2 asks for

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without underscore names: they lead to the interpreter's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Dict:
    """`dict()` and `dict.fromkeys()`, and nothing else that the type `dict` would offer."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_attribute_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with _")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`json.dumps`; jinja2's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _Dict()
    return environment


class Template(Protocol):
    """A chat template and a way to render it: `ChatTemplate`, or a row's own in another process."""

    @property
    def source(self) -> str: ...
    @property
    def render(self) -> Callable[..., str]: ...  # as ChatTemplate.render


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template. Thread-safe; make one with `compile_chat_template`.

    Attributes:
        source: the template's text.
        variables: names it reads that a row may set (`chat_template_kwargs`).
    """

    source: str
    variables: frozenset[str]
    _template: jinja2.Template

    @cached_property
    def accepts_parts(self) -> bool:
        """Whether the template handles message content given as a list of text parts.

        Found by trying: a list renders, its text is there, and its Python form is not.
        """
        parts = [{"type": "text", "text": "probe-7351"}]
        try:
            text = "".join(self._pieces([{"role": "user", "content": parts}], {}))
        except _TEMPLATE_ERRORS:
            return False
        return "probe-7351" in text and "'type'" not in text and '"type"' not in text

    def render(
        self,
        messages: Sequence[Message],
        *,
        now: datetime,
        special_tokens: Mapping[str, str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Render a conversation exactly as transformers' `apply_chat_template` does.

        Args:
            messages: JSON-like dicts; lists of text parts are joined, without a separator, into
                one string unless the template handles lists itself.
            now: what `strftime_now` tells; one value per job, so that a row is repeatable.
            special_tokens: `bos_token`, `eos_token`, ... as the template reads them.
            tools: JSON schemas.
            template_kwargs: further variables; each must be one the template reads.
            continue_final_message: leave the last message open; implies no generation prompt.
        Raises:
            RequestError: the row or the template is at fault; the message says how.
        """
        prepared = prepare_messages(messages, keep_parts=lambda: self.accepts_parts)
        context = {
            "tools": prepare_tools(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "strftime_now": lambda form: now.strftime(form),
            **(special_tokens or {}),
            **self._checked_kwargs(template_kwargs or {}, special_tokens or {}),
        }
        if continue_final_message:
            return self._render_open(prepared, context)
        return self._render(prepared, context)

    def _checked_kwargs(
        self, kwargs: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> Mapping[str, Any]:
        allowed = self.variables - set(special_tokens)
        unknown = sorted(str(name) for name in kwargs if name not in allowed)
        if unknown:
            raise RequestError(
                f"chat_template_kwargs {', '.join(map(repr, unknown))} cannot be set: the model's "
                f"chat template reads {sorted(allowed) or 'no such variables'}",
                param="chat_template_kwargs",
            )
        return kwargs

    def _pieces(self, messages: list[Message], context: Mapping[str, Any]) -> Iterator[str]:
        return self._template.generate(messages=messages, **context)

    def _render(self, messages: list[Message], context: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._pieces(messages, context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    break
        except _TEMPLATE_ERRORS as error:
            detail = str(error) or type(error).__name__
            raise RequestError(
                f"the chat template refused the messages: {detail}", param="messages"
            ) from error
        if num_chars > MAX_RENDERED_CHARS:
            raise RequestError(
                f"the chat template wrote more than {MAX_RENDERED_CHARS} characters; "
                "shorten the messages or mend the template",
                param="messages",
            )
        return "".join(pieces)

    def _render_open(self, messages: list[Message], context: Mapping[str, Any]) -> str:
        """Render with a tag at the end of the last message, and cut there."""
        final = messages[-1].get("content")
        if "content" not in self.source or not isinstance(final, str | list):
            raise _cannot_continue("the last message has no content to continue")
        if isinstance(final, list):
            part = final[-1]
            final = part["text"]
            part["text"] = final + _CONTINUE_TAG
        else:
            messages[-1]["content"] = final + _CONTINUE_TAG
        text = self._render(messages, context)
        if final.strip() not in text or _CONTINUE_TAG.strip() not in text:
            raise _cannot_continue("the chat template drops part of the last message")
        end = text.rindex(_CONTINUE_TAG.strip())
        if text.startswith(_CONTINUE_TAG, end):
            return text[:end]
        return text[:end].rstrip()  # the template trims messages


def _cannot_continue(why: str) -> RequestError:
    return RequestError(f"continue_final_message: {why}", param="continue_final_message")


@lru_cache(maxsize=64)
def compile_chat_template(source: str) -> ChatTemplate:
    """Compile a chat template, once per source text.

    Raises:
        RequestError: the source is over MAX_TEMPLATE_BYTES or not valid jinja2.
    """
    num_bytes = len(source.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise RequestError(
            f"the chat template has {num_bytes} bytes, the limit is {MAX_TEMPLATE_BYTES}; "
            "give a shorter one"
        )
    environment = _environment()
    try:
        template = environment.from_string(source)
        names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except _TEMPLATE_ERRORS as error:
        raise RequestError(f"the chat template is not valid: {error}") from error
    variables = frozenset(names) - _RESERVED - frozenset(environment.globals)
    return ChatTemplate(source, variables, template)


def choose_chat_template(
    templates: str | Mapping[str, str] | None, *, with_tools: bool
) -> ChatTemplate:
    """Pick a model's template as transformers does: `tool_use` if tools are given, else `default`.

    Raises:
        RequestError: the model has no template, or several and none is the default.
    """
    if isinstance(templates, Mapping):
        if with_tools and "tool_use" in templates:
            return compile_chat_template(templates["tool_use"])
        if "default" not in templates:
            raise RequestError(
                f"the model has chat templates {sorted(templates)} but no default one; "
                'use "prompt" instead of "messages", or give a template'
            )
        return compile_chat_template(templates["default"])
    if templates is None:
        raise RequestError(
            'the model has no chat template; use "prompt" instead of "messages", '
            "or give a template (chat_template.jinja in the model's directory)"
        )
    return compile_chat_template(templates)
