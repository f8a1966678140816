"""Chat templates that rows bring, rendered in this process as the worker's process does it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from batchwright.errors import RequestError
from batchwright.text.chat_template import compile_chat_template

DEADLINE_S = 0.2  # of CPU time; the worker's process is killed at its deadline
NOW = datetime(2024, 7, 26, 12, 30)
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": "y", "reasoning": "z"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


class Late(BaseException):
    """The deadline has passed."""


def run(data: bytes) -> None:
    """The first byte chooses how to render; the rest is the template.

    Powers are left out: one that takes minutes is a single instruction, which only the end of a
    process interrupts. tests/structured/test_worker.py shows that.
    """
    choice, source = (data[0] if data else 0), data[1:].decode("utf-8", "surrogateescape")
    if "**" in source or "pow" in source:
        return
    try:
        with deadline():
            text = compile_chat_template(source).render(
                MESSAGES,
                now=NOW,
                special_tokens={"bos_token": "<s>"},
                tools=TOOLS if choice & 1 else None,
                continue_final_message=bool(choice & 2),
            )
        assert isinstance(text, str)
    except (RequestError, Late):
        pass


@contextmanager
def deadline() -> Iterator[None]:
    """Raise Late in the context when the time is over.

    And again every now and then: a finalizer that happens to run swallows it.
    """

    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, DEADLINE_S, DEADLINE_S / 4)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def seeds() -> list[bytes]:
    """Templates as models have them, small, and one for each thing they may use."""
    return [bytes([index % 4]) + text.encode() for index, text in enumerate(TEMPLATES)]


TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}",
    "{%- if messages[0]['role'] == 'system' %}{%- set s = messages[0].content %}{%- endif %}",
    "{% set ns = namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}",
    "{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{{ strftime_now('%d %b %Y') }}",
    "{% macro f(x, y=3) %}{{ x ~ y }}{{ caller() }}{% endmacro %}{% call f('a') %}b{% endcall %}",
    "{% generation %}{{ bos_token }}{% endgeneration %}{{ raise_exception('no') }}",
    "{{ dict(a=1).items() | list }}{{ dict.fromkeys([1, 2]) }}{{ 'x'.split('x')[::-1] }}",
    "{{ range(3) | map('string') | join(',') }}{{ [3, 1] | sort | first }}{{ 7 // 2 % 3 }}",
    "{% for i in range(99999) %}{% if i > 5 %}{% break %}{% endif %}{% continue %}{% endfor %}",
    "{{ '%s %5.2f' | format('a', 1.5) }}{{ 'a' is string and not none is defined }}{{ 1e9 | int }}",
    "{% filter upper %}a{% endfilter %}{% raw %}{{ x }}{% endraw %}{# c #}{{ cycler('a').next() }}",
    "{% for m in messages recursive %}{{ loop.index }}{{ loop([m]) if loop.first }}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ 'abc' | batch(2) | list }}{{ [1] | slice(2) | list }}{{ 'a b' | wordwrap(1) | indent }}",
    "{% with a = 1 %}{{ a }}{% endwith %}{% set x %}b{% endset %}{{ joiner() }}{{ lipsum(1) }}",
    "{% autoescape true %}{{ '<' | e }}{% endautoescape %}{% include 'x' %}",
    "{% block a %}{% endblock %}{{ 1e999 if messages else -1 }}",
)

WORDS = (
    "{{ }} {% %} {%- -%} {# #} endfor endif endmacro elif else import extends super() loop.index "
    "__class__ __globals__ .append( | (1e999) 99999999 ~ is divisibleby round truncate groupby "
    "unique xmlattr urlize random sum tojson recursive"
).split()
