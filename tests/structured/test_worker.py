"""Bombs end within their deadline as row errors, and the next task works."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from batchwright.errors import BatchwrightError, RequestError
from batchwright.structured import spec as specs
from batchwright.structured.compile import GrammarCompiler
from batchwright.structured.spec import GrammarSpec
from batchwright.structured.vocabulary import read_vocabulary
from batchwright.structured.worker import Worker
from batchwright.text.tokenizer import Tokenizer
from tests.structured.conftest import VOCAB_SIZE

SLACK_S = 1.5  # to kill and start a process on a machine under load

ENDLESS_TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
OPTIONS = {"messages": [{"role": "user", "content": "Hi"}], "now": datetime(2026, 1, 1)}

WIDE = {
    "type": "object",
    "properties": {
        f"p{i}": {"type": "integer", "minimum": i, "maximum": 10**9} for i in range(4000)
    },
}
COMBINED: dict[str, Any] = {"$defs": {"d0": {"type": "string", "maxLength": 9}}}
for i in range(1, 24):  # each level has the one below twice
    below = {"$ref": f"#/$defs/d{i - 1}"}
    COMBINED["$defs"][f"d{i}"] = {"allOf": [below, {"anyOf": [below, below]}]}
COMBINED |= {"$ref": "#/$defs/d23"}

BOMBS = {
    "nested quantifiers": specs.regex(r"(((\w{1,500}x?){1,500}y?){1,500}z?){1,500}"),
    "long classes": specs.regex(r"(\p{L}\p{N}?){1,1000}" * 50),
    "many properties": specs.json_schema(WIDE | {"required": list(WIDE["properties"])}),
    "doubling references": specs.json_schema(COMBINED),
    "reference to itself": specs.json_schema(
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}
    ),
    "deep arrays": GrammarSpec("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000),
    "long strings": specs.json_schema({"type": "string", "minLength": 10**8, "maxLength": 10**9}),
    "ambiguous grammar": specs.grammar("start: " + " ".join(["a"] * 2000) + '\na: "x"? a? | "y"'),
    "deep gbnf": specs.grammar("root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
}


@pytest.fixture(scope="module")
def bombed(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    compiler.compile(specs.regex("a"))  # the process runs
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", BOMBS)
def test_grammar_bombs_end_in_time(name: str, bombed: GrammarCompiler) -> None:
    start_s = time.monotonic()
    with contextlib.suppress(RequestError):
        bombed.compile(BOMBS[name])
    took_s = time.monotonic() - start_s
    # A grammar that is fine after all is compiled twice, here and there.
    assert took_s < 2 * bombed.worker.deadline_s + SLACK_S
    bombed.compile(specs.regex(f"after {name}"))


def test_template_bombs_end_in_time() -> None:
    worker = Worker(deadline_s=0.3)
    assert worker.render("{{ messages[0].content }}!", OPTIONS) == "Hi!"
    start_s = time.monotonic()
    with pytest.raises(RequestError, match=r"takes more than 0.3 s; simplify"):
        worker.render(ENDLESS_TEMPLATE, OPTIONS)
    assert time.monotonic() - start_s < 0.3 + SLACK_S
    assert worker.render("{{ messages[0].role }}", OPTIONS) == "user"
    worker.close()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 3000000000 }}", "MemoryError"),
        (
            "{% set x = namespace(s='a') %}{% for i in range(40) %}{% set x.s = x.s ~ x.s %}"
            "{% endfor %}{{ x.s | length }}",
            "Memory|more than",
        ),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "more than 16777216"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "not valid"),
        ("{{ raise_exception('no') }}", "no"),
    ],
)
def test_templates_are_contained(template: str, words: str, bombed: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        bombed.template(template).render(**OPTIONS)
    assert caught.value.message.startswith("chat_template: ")
    assert caught.value.param in ("chat_template", "messages")


def test_a_process_that_dies_is_replaced(tokenizer: Tokenizer) -> None:
    worker = Worker(memory_bytes=200 << 20)
    vocabulary = read_vocabulary(tokenizer, VOCAB_SIZE)
    worker.compile(vocabulary, specs.regex("a"))
    assert worker._end is not None
    process = worker._end.peek()[2][0]
    process.kill()
    with pytest.raises(RequestError, match="memory"):
        worker.compile(vocabulary, specs.regex("b"))
    assert worker.compile(vocabulary, specs.regex("b"))  # the vocabulary was sent again
    worker.close()


def test_the_process_ends_with_its_owner() -> None:
    worker = Worker()
    worker.render("", OPTIONS)
    assert worker._end is not None
    process = worker._end.peek()[2][0]
    os.kill(process.pid, 0)
    del worker
    gc.collect()
    assert process.returncode is not None


def test_a_process_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(BatchwrightError, match="exit code 1"):
        Worker().render("", OPTIONS)
