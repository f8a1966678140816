"""An engine and a tokenizer without a model: what they answer is known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from batchwright.errors import RequestError
from batchwright.job.formats.read_input import read_input
from batchwright.job.rows import InputRow, RowError
from batchwright.parts import Parts
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.fcfs import fcfs
from batchwright.plan.shape import ModelShape
from batchwright.request import (
    NO_MARKUP,
    Completion,
    FinishReason,
    Markup,
    Request,
    Result,
    TokenLogprob,
)
from batchwright.sched.work import Work

BOS = 256


class ByteTokenizer:
    """One token per UTF-8 byte, and one token (256) put first."""

    backend: Any = None
    bos_token_id = BOS
    eos_token_id = None
    chat_markup = NO_MARKUP

    def markup(self, *, with_tools: bool, template: Any = None) -> Markup:
        return self.chat_markup

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        if "\0" in "".join(texts):
            raise RequestError("the text has a character that this vocabulary lacks")
        return [[BOS] * add_special_tokens + list(text.encode()) for text in texts]

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
        if messages[0]["role"] == "nobody":
            raise RequestError("the chat template does not know the role 'nobody'")
        text = "".join(f"<{m['role']}>{m.get('content')}\n" for m in messages)
        if options.get("add_generation_prompt", True):
            text += "<assistant>"
        return text, self.encode_batch([text])[0]


def token_bytes(token_id: int) -> bytes:
    return b"<s>" if token_id == BOS else bytes([token_id])


@dataclass
class FakeEngine:
    """Answers every request with its number of prompt tokens, `max_tokens` steps after it began.

    Args:
        max_running: rows that run at once; the others wait.
        refuse: ids that `add` refuses.
        break_rows: ids whose result is an error.
        on_step: called with the number of each step.
    """

    max_model_len = 8192

    max_running: int = 4
    refuse: Iterable[str] = ()
    break_rows: Iterable[str] = ()
    on_step: Callable[[int], None] = lambda number: None
    waiting: list[Request] = field(default_factory=list)
    running: dict[str, tuple[Request, int]] = field(default_factory=dict)
    done: list[Result] = field(default_factory=list)
    most_unfinished: int = 0
    earlier: dict[str, int] = field(default_factory=dict)
    stats: Any = field(
        default_factory=lambda: SimpleNamespace(
            num_steps=0,
            num_prompt_tokens=0,
            num_computed_tokens=0,
            num_cached_tokens=0,
            num_generated_tokens=0,
            num_preemptions=0,
            num_recomputed_tokens=0,
            num_folded=0,
            work=Work(),
        )
    )

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.done)

    def add(self, request: Request) -> None:
        if request.id in self.refuse:
            raise RequestError("prompt has 9120 tokens, model allows 8192", param="prompt")
        self.waiting.append(request)
        self.most_unfinished = max(self.most_unfinished, self.num_unfinished)

    @property
    def load(self) -> Any:
        return SimpleNamespace(
            num_running_seqs=len(self.running),
            num_waiting_seqs=len(self.waiting),
            kv_used_fraction=len(self.running) / self.max_running,
            helper_bytes=0,
        )

    def note_earlier(self, request: Request, num_output: int) -> None:
        self.earlier[request.id] = num_output

    def waiting_ids(self) -> list[str]:
        return [request.id for request in self.waiting]

    def abandon(self) -> None:
        self.waiting, self.running, self.done = [], {}, []

    def cancel(self, request_id: str) -> None:
        if any(result.request_id == request_id for result in self.done):
            return  # its result is on its way
        request, _ = self.running.pop(request_id, (None, 0))
        for waiting in [w for w in self.waiting if w.id == request_id]:
            self.waiting.remove(waiting)
            request = waiting
        assert request is not None
        self.done.append(answer(request, FinishReason.CANCELLED))

    def step(self) -> list[Result]:
        self.stats.num_steps += 1
        self.on_step(self.stats.num_steps)
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting.pop(0)
            self.running[request.id] = (request, request.params.max_tokens or 1)
            self.stats.num_computed_tokens += len(request.prompt_token_ids)
            self.stats.work.num_prompt_tokens += len(request.prompt_token_ids)
        self.stats.work.num_rows += len(self.running)
        for request_id, (request, left) in list(self.running.items()):
            self.stats.num_generated_tokens += request.params.n
            self.running[request_id] = (request, left - 1)
            if left == 1:
                del self.running[request_id]
                reason = FinishReason.LENGTH if request.params.max_tokens else FinishReason.STOP
                self.done.append(answer(request, reason))
                if request_id in self.break_rows:
                    self.done[-1].error = RequestError("the model's logits were not numbers")
        done, self.done = self.done, []
        return done


@dataclass
class FakeModel:
    """An engine with what a job needs beside it."""

    engine: FakeEngine
    tokenizer: Any = field(default_factory=ByteTokenizer)
    grammars: Any = None
    name: str = "fake"
    shape: ModelShape | None = None
    order: OrderFunction = fcfs
    more_identity: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def token_bytes(token_id: int) -> bytes:
        return token_bytes(token_id)

    def identity(self) -> dict[str, Any]:
        return {"model": self.name, **self.more_identity}

    def compile_s(self) -> float:
        return 0.0

    def settings(self) -> dict[str, Any]:
        return {"dtype": "float32", "num_threads": 1}


def answer(request: Request, reason: FinishReason) -> Result:
    if request.parts:
        parts = Parts()
        parts.open(request)
        (whole,), _ = parts.take(answer(part, reason) for part in request.parts)
        return whole
    text = str(len(request.prompt_token_ids))
    return Result(
        request_id=request.id,
        prompt_token_ids=request.prompt_token_ids.tolist(),
        prompt=request.prompt,
        num_cached_tokens=1,
        outputs=[
            Completion(
                index=index,
                text=text,
                token_ids=list(text.encode()),
                finish_reason=reason,
                logprobs=logprobs(request.params.logprobs, text),
            )
            for index in range(request.params.n)
        ],
        prompt_logprobs=prompt_logprobs(request),
    )


def logprobs(num_top: int | None, text: str) -> list[TokenLogprob] | None:
    if num_top is None:
        return None
    top = tuple((65 + rank, -0.5 - rank) for rank in range(num_top))
    return [TokenLogprob(byte, -1.5, 3, top) for byte in text.encode()]


def prompt_logprobs(request: Request) -> list[TokenLogprob | None] | None:
    num_top = request.params.prompt_logprobs
    if num_top is None:
        return None
    entries: list[TokenLogprob | None] = [None]
    for token_id in request.prompt_token_ids.tolist()[1:]:
        top = tuple((65 + rank, -0.5 - rank) for rank in range(num_top))
        entries.append(TokenLogprob(token_id, float("-inf"), 9, top))
    return entries


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows as JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else msgspec.json.encode(row) for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_rows(path: Path) -> Iterator[InputRow | RowError]:
    return read_input(str(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def chat_row(custom_id: str, content: str = "Hello", **params: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    body = {"model": "m", "messages": messages, **params}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
