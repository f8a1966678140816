"""Single calls, alone and while a batch runs."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from batchwright.errors import ResourceError
from batchwright.server import shared_engine
from tests.job.fakes import FakeEngine, chat_row
from tests.server.running import MODEL, PacedEngine, RunningServer, begin, ended, until

Start = Callable[..., RunningServer]
MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": 1, **options}
    )


def test_chat_and_completions(common: RunningServer) -> None:
    client = common.client()
    answer = chat(client, n=2, logprobs=True, top_logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content == str(answer.usage.prompt_tokens)
    assert answer.choices[0].logprobs.content and answer.model == MODEL
    text = client.completions.create(model=MODEL, prompt="abc", max_tokens=1)
    assert text.choices[0].text == "4" and text.object == "text_completion"


def test_a_list_of_prompts_is_counted_through(common: RunningServer) -> None:
    answer = common.client().completions.create(model=MODEL, prompt=["a", "bcd"], n=2, max_tokens=1)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "2"), (1, "2"), (2, "4"), (3, "4")]
    assert answer.usage is not None and answer.usage.prompt_tokens == 6


def test_a_list_may_be_as_long_as_in_a_row(common: RunningServer) -> None:
    client = common.client()
    answer = client.completions.create(model=MODEL, prompt=["a"] * 2048, max_tokens=1)
    assert [choice.index for choice in answer.choices] == list(range(2048))
    with pytest.raises(openai.BadRequestError, match="at most 2048"):
        client.completions.create(model=MODEL, prompt=["a"] * 2049, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="entry 1 of the list"):
        client.completions.create(model=MODEL, prompt=["a", "\0"], max_tokens=1)


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, openai.BadRequestError, None),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"extra_body": {"stream": 1}}, openai.BadRequestError, "stream"),
    ],
)
def test_bad_calls_are_told_why(
    common: RunningServer, change: dict[str, Any], error: type[openai.APIStatusError], param: Any
) -> None:
    with pytest.raises(error) as caught:
        chat(common.client(), **change)
    assert caught.value.param == param


def test_what_the_engine_refuses_and_what_fails_in_it(start: Start) -> None:
    class Refusing(FakeEngine):
        def add(self, request: Any) -> None:
            if len(request.prompt_token_ids) > 100:
                self.refuse = [request.id]
            if len(request.prompt_token_ids) > 50:
                self.break_rows = [request.id]
            super().add(request)

    client = start(Refusing()).client()
    with pytest.raises(openai.BadRequestError, match="9120 tokens"):
        chat(client, messages=[{"role": "user", "content": "x" * 200}])
    with pytest.raises(openai.APIStatusError, match="not numbers"):
        chat(client, messages=[{"role": "user", "content": "x" * 60}])
    assert chat(client).choices


def test_streaming_gives_the_whole_answer_in_openais_events(common: RunningServer) -> None:
    client = common.client()
    chunks = list(chat(client, stream=True, n=2, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert texts == [chat(client).choices[0].message.content] * 2
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None, "length"] * 2
    assert chunks[-1].usage.completion_tokens == 4 and not chunks[-1].choices
    prompts = client.completions.create(model=MODEL, prompt="abc", max_tokens=1, stream=True)
    assert [c.choices[0].text for c in prompts] == ["4"]


def test_a_refused_stream_is_an_error_with_a_status(common: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(common.client(), stream=True, temperature=-1)


def test_calls_do_not_wait_behind_the_rows_of_a_batch(start: Start) -> None:
    engine = PacedEngine(max_running=2)
    engine.pace_s = 0.005
    client = start(engine).client()
    batch = begin(client, [chat_row(str(i), max_tokens=2) for i in range(1500)])
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    for _ in range(5):
        assert chat(client).choices
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts.completed < 500
    client.batches.cancel(batch.id)


def test_many_calls_at_once_while_a_batch_runs(start: Start) -> None:
    engine = PacedEngine(max_running=16)
    engine.pace_s = 0.002
    server = start(engine)
    client = server.client()
    batch = begin(client, [chat_row(str(i), max_tokens=3) for i in range(600)])

    async def call_all() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
        ) as many:
            calls = [
                many.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "x" * i}], max_tokens=1
                )
                for i in range(200)
            ]
            return await asyncio.gather(*calls)

    answers = asyncio.run(call_all())
    base = int(answers[0].choices[0].message.content)
    assert [int(a.choices[0].message.content) for a in answers] == [base + i for i in range(200)]
    batch = ended(client, batch, 60)
    assert (batch.status, batch.request_counts.completed) == ("completed", 600)
    assert server.parts.shared_engine.num_open_calls == 0
    assert server.parts.bodies.num_bytes == 0


def test_too_many_calls_are_told_to_come_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchwright.server.parts.MAX_CALLS", 3)
    engine = PacedEngine()
    engine.pace_s = 0.05
    server = start(engine)
    begun = [open_call(server.port, max_tokens=1000) for _ in range(3)]
    until(lambda: server.parts.shared_engine.num_open_calls == 3)
    status, headers, body = server.ask("POST", CHAT, {"model": MODEL, "messages": MESSAGES})
    assert status == 429 and int(headers["retry-after"]) > 0
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    for connection in begun:  # whoever goes makes room
        connection.close()
    until(lambda: server.parts.shared_engine.num_open_calls == 0)
    assert chat(server.client()).choices


def open_call(port: int, stream: bool = False, **options: Any) -> socket.socket:
    """A call that is sent, and whose answer nobody reads yet."""
    body = json.dumps({"messages": MESSAGES, "stream": stream, **options}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        + str(len(body)).encode()
        + b"\r\n\r\n"
        + body
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_call_along(start: Start, stream: bool) -> None:
    engine = PacedEngine()
    engine.pace_s = 0.01
    server = start(engine)
    connection = open_call(server.port, stream, max_tokens=100_000)
    until(lambda: engine.running)
    connection.close()
    until(lambda: not engine.running)
    until(lambda: server.parts.shared_engine.num_open_calls == 0)


def test_when_memory_runs_out_calls_fail_and_the_server_goes_on(start: Start) -> None:
    engine = PacedEngine()

    def on_step(number: int) -> None:
        if number == 1:
            raise ResourceError("memory does not suffice for one row")

    engine.on_step = on_step
    client = start(engine).client()
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client)
    assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
    assert chat(client).choices


def test_a_bug_in_a_step_is_no_end(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    engine = PacedEngine()

    def on_step(number: int) -> None:
        if number == 1:
            raise ValueError("secret prompt")

    engine.on_step = on_step
    server = start(engine)
    client = server.client()
    with pytest.raises(openai.InternalServerError):
        chat(client)
    assert chat(client).choices
    assert "ValueError" in caplog.text and "secret" not in caplog.text


def test_stopping_answers_what_runs_and_refuses_the_rest(start: Start) -> None:
    engine = PacedEngine()
    engine.pace_s = 0.01
    server = start(engine)
    connection = open_call(server.port, max_tokens=30)
    until(lambda: engine.running)
    server.parts.stop()
    status, headers, _ = server.ask("POST", CHAT, {"messages": MESSAGES})
    assert status == 503 and "retry-after" in headers
    assert server.error("POST", "/v1/batches", {}) == (503, "service_unavailable")
    connection.settimeout(20)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()


def test_health_is_progress(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchwright.watchdog.MIN_S", 0.3)
    release = []

    def on_step(number: int) -> None:
        while not release:
            time.sleep(0.01)

    engine = PacedEngine(on_step=on_step)
    server = start(engine)
    assert server.ask("GET", "/health")[0] == 200
    connection = open_call(server.port)
    until(lambda: server.ask("GET", "/health")[0] == 503)
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "stuck"}
    release.append(True)
    until(lambda: server.ask("GET", "/health")[0] == 200)
    connection.close()
    server.stop_work()
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "stopping"}


def test_calls_have_ids_that_no_row_has(common: RunningServer) -> None:
    assert shared_engine.CALL_PREFIX == "call-"
    first, second = chat(common.client()), chat(common.client())
    assert first.id != second.id  # so their randomness differs too


def test_metrics_are_those_of_the_batch_that_runs_or_ran_last(server: RunningServer) -> None:
    status, headers, text = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert b"batchwright_rows_total{" not in text
    client = server.client()
    for names in ("a", "bc"):
        batch = ended(client, begin(client, [chat_row(name) for name in names]))
        text = server.ask("GET", "/metrics")[2]
        line = f'batchwright_rows_total{{batch="{batch.id}",state="succeeded"}} {len(names)}.0'
        assert line.encode() in text and text.count(b'state="succeeded"') == 1
