"""The other side of `worker.py`: runs one task after the other until its parent is gone."""

from __future__ import annotations

import resource
import signal
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import llguidance
import msgspec

from batchwright.errors import RequestError
from batchwright.structured.grammar_text import guidance_grammar, open_matcher
from batchwright.structured.spec import GrammarKind, GrammarSpec
from batchwright.structured.vocabulary import Vocabulary, guidance_tokenizer
from batchwright.text.chat_template import compile_chat_template


class Tasks:
    """What can be asked of the process; every method takes plain data and returns text."""

    def __init__(self) -> None:
        self._tokenizer: llguidance.LLTokenizer | None = None

    def vocabulary(self, tokens: list[bytes], special_ids: list[int], end_ids: list[int]) -> str:
        """Compile against these tokens from now on."""
        self._tokenizer = guidance_tokenizer(Vocabulary(tokens, special_ids, end_ids))
        return ""

    def compile(self, kind: str, text: str) -> str:
        """The llguidance form of a GrammarSpec, which is known to compile."""
        assert self._tokenizer is not None
        try:
            grammar = guidance_grammar(GrammarSpec(GrammarKind(kind), text))
            open_matcher(self._tokenizer, grammar)
        except ValueError as error:
            raise RequestError(str(error)) from error
        return grammar

    def render(self, source: str, options: dict[str, Any]) -> str:
        """A chat template's text."""
        options["now"] = datetime.fromisoformat(options["now"])
        return compile_chat_template(source).render(**options)


def run(tasks: Tasks, name: str, arguments: tuple[Any, ...]) -> tuple[str, str, str | None]:
    """("text", it, None), or ("error", message, parameter at fault)."""
    try:
        return "text", getattr(tasks, name)(*arguments), None
    except RequestError as error:
        return "error", error.message, error.param
    except BaseException as error:  # noqa: BLE001 - also Rust's panics; the task's row fails
        return "error", f"{type(error).__name__} {error}".strip(), None


def main(file_descriptor: int, memory_bytes: int) -> None:
    """Serve tasks from a socket: (seconds, method, arguments); all in MessagePack."""
    tasks, decode = Tasks(), msgspec.msgpack.Decoder().decode
    _limit_memory(memory_bytes)
    with Connection(file_descriptor) as connection:
        connection.send_bytes(b"ready")
        while True:
            try:
                seconds, name, arguments = decode(connection.recv_bytes())
            except EOFError:
                return
            # The parent kills a process that is late. This is for one whose parent was killed.
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
            connection.send_bytes(msgspec.msgpack.encode(run(tasks, name, arguments)))
            signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(num_bytes: int) -> None:
    """Allow num_bytes on top of what the process has mapped now."""
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux, where the limit has no effect anyway
        return
    resource.setrlimit(resource.RLIMIT_AS, (mapped + num_bytes, mapped + num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
