"""Killed, stopped, started again: nothing finished is lost, and nothing is run twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from batchwright.errors import OutputError, RankError, ReplicaError, ResourceError
from tests.job.fakes import FakeModel, chat_row
from tests.server.running import (
    MODEL,
    PacedEngine,
    RunningServer,
    begin,
    ended,
    lines_of,
    until,
    upload,
)

Start = Callable[..., RunningServer]
ROOT = Path(__file__).parent.parent.parent


@contextmanager
def process(data: Path, pace_s: float) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """A server in a process of its own, killed at the end."""
    command = [sys.executable, "-m", "tests.server.driver", str(data), str(pace_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            url = f"http://127.0.0.1:{int(running.stdout.readline())}/v1"
            with openai.OpenAI(base_url=url, api_key="none") as client:
                yield running, client
        finally:
            running.kill()


def test_killed_again_and_again_a_batch_comes_to_its_end(tmp_path: Path) -> None:
    rows = [chat_row(str(i), max_tokens=2) for i in range(60)] + [b"bad"]
    data, done_before, batch = tmp_path / "data", 0, None
    for _ in range(3):
        with process(data, pace_s=0.1) as (running, client):
            batch = batch or begin(client, rows)
            done_before = until_more(client, batch, done_before)
            running.send_signal(signal.SIGKILL)
    (results,) = data.glob("batches/*.job/results.jsonl")
    before = [line for line in results.read_bytes().splitlines(keepends=True) if b"\n" in line]
    with process(data, pace_s=0) as (_, client):
        found = ended(client, batch)
        assert found.status == "completed"
        lines = lines_of(client, found.output_file_id)
        assert sorted(int(line["custom_id"]) for line in lines) == list(range(60))
        assert len(lines_of(client, found.error_file_id)) == 1
        answered = [line for line in map(json.loads, before) if line["error"] is None]
        assert answered and all(line in lines for line in answered)


def until_more(client: openai.OpenAI, batch: Any, done_before: int) -> int:
    """Wait until more rows are done than before and the batch still runs; returns how many."""

    def look() -> Any:
        found = client.batches.retrieve(batch.id)
        assert found.status in ("validating", "in_progress")
        return found.request_counts.completed > done_before and found

    return int(until(look).request_counts.completed)


def test_the_first_signal_finishes_what_runs(tmp_path: Path) -> None:
    with process(tmp_path / "data", pace_s=0.05) as (running, client):
        batch = begin(client, [chat_row(str(i), max_tokens=4) for i in range(60)])
        until_more(client, batch, 0)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 75
        assert running.stdout is not None and "Stopping" in running.stdout.read()
    with process(tmp_path / "data", pace_s=0) as (running, client):
        assert ended(client, batch).request_counts.completed == 60
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0  # nothing is left to do


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    with process(tmp_path / "data", pace_s=0.05) as (running, client):
        long_rows = [chat_row(str(i), max_tokens=100_000) for i in range(5)]
        batch = begin(client, [chat_row("short", max_tokens=1), *long_rows])
        until_more(client, batch, 0)  # then others run too
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.5)
        running.send_signal(signal.SIGINT)
        assert running.wait(5) == 75


def test_a_batch_that_was_being_checked_is_checked_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    first.stop_work()  # its checking thread does not take anything from here on
    monkeypatch.setattr(first.parts, "is_stopping", False)
    batch = begin(first.client(), [chat_row("a")])
    first.close()
    assert ended(start().client(), batch).status == "completed"


def test_another_model_does_not_go_on_with_a_batch_but_can_cancel_it(start: Start) -> None:
    engine = PacedEngine(max_running=2)
    engine.pace_s = 0.01
    first = start(engine)
    batch = begin(first.client(), [chat_row(str(i), max_tokens=2) for i in range(300)])
    until_more(first.client(), batch, 2)
    first.close()
    other = start(model=FakeModel(PacedEngine(), name="another"))
    client = other.client()
    held = until(lambda: client.batches.retrieve(batch.id).errors)
    assert held.data[0].code == "held" and "begun differently" in held.data[0].message
    after = ended(client, begin(client, [chat_row("a")]))
    assert after.status == "completed"  # it holds up nobody
    cancelled = client.batches.cancel(batch.id)
    assert (cancelled.status, cancelled.errors) == ("cancelled", None)
    assert len(lines_of(client, cancelled.output_file_id)) == cancelled.request_counts.completed > 2


@pytest.mark.parametrize("error", [OutputError("the disk is full"), ResourceError("no memory")])
def test_what_passes_is_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("batchwright.server.engine_thread.RETRY_S", 0.2)
    engine = PacedEngine(max_running=1)

    def on_step(number: int) -> None:
        if number == 3:
            raise error

    engine.on_step = on_step
    client = start(engine).client()
    batch = ended(client, begin(client, [chat_row(str(i)) for i in range(6)]))
    assert (batch.status, batch.request_counts.completed) == ("completed", 6)
    assert len(lines_of(client, batch.output_file_id)) == 6


@pytest.mark.parametrize("kind", [RankError, ReplicaError])
@pytest.mark.parametrize("batch_runs", [True, False])
def test_without_the_processes_that_compute_the_server_ends(
    start: Start, kind: type[Exception], batch_runs: bool
) -> None:
    engine = PacedEngine(max_running=1)

    def on_step(number: int) -> None:
        if number >= 3:
            raise kind("rank 1 was ended by signal 9")

    engine.on_step = on_step
    server = start(engine)
    client = server.client()
    batch = begin(client, [chat_row(str(i)) for i in range(6)]) if batch_runs else None
    if not batch_runs:
        with pytest.raises(openai.APIStatusError, match="signal 9") as told:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=9
            )
        assert (told.value.status_code, told.value.code) == (503, "service_unavailable")
        assert told.value.response.headers["retry-after"] == "30"
    until(lambda: not server.parts.engine_thread.is_alive)
    assert server.parts.engine_thread.gone == "rank 1 was ended by signal 9"
    status, _, body = server.ask("GET", "/health")
    assert (status, json.loads(body)) == (503, {"status": "dead"})
    call = {"messages": [{"role": "user", "content": "a"}]}
    assert server.error("POST", "/v1/chat/completions", call) == (503, "service_unavailable")
    if batch is None:
        return
    found = client.batches.retrieve(batch.id)
    assert found.status == "in_progress" and found.errors.data[0].code == "held"
    server.close()
    found = ended(start().client(), batch)
    assert (found.status, found.request_counts.completed) == ("completed", 6)


def test_a_bug_fails_one_batch_and_keeps_what_it_finished(start: Start) -> None:
    engine = PacedEngine(max_running=1)

    def on_step(number: int) -> None:
        if number == 3:
            raise ValueError("a bug")

    engine.on_step = on_step
    client = start(engine).client()
    batch = ended(client, begin(client, [chat_row(str(i)) for i in range(6)]))
    assert batch.status == "failed" and batch.errors.data[0].code == "internal_error"
    assert ended(client, begin(client, [chat_row("a")])).status == "completed"


def test_an_input_that_vanishes_fails_its_batch(start: Start) -> None:
    engine = PacedEngine()
    engine.pace_s = 0.02
    server = start(engine)
    client = server.client()
    first = begin(client, [chat_row("a", max_tokens=20)])
    file = upload(client, [chat_row("b")])
    second = begin(client, [], input_file_id=file.id)
    until(lambda: client.batches.retrieve(second.id).status == "in_progress")
    server.parts.files.path(file.id).unlink()
    assert ended(client, first).status == "completed"
    batch = ended(client, second)
    assert batch.status == "failed" and batch.errors.data[0].code == "invalid_file"


def test_what_a_crash_left_is_swept_away(start: Start, tmp_path: Path) -> None:
    server = start()
    batch = ended(server.client(), begin(server.client(), [chat_row("a")]))
    server.close()
    files = tmp_path / "data" / "files"
    (files / ("file-" + "0" * 28 + ".jsonl")).write_text("{}")
    (files / ("file-" + "0" * 28 + ".part")).write_text("{}")
    (files / "file-x.json").write_text("{")
    again = start()
    names = sorted(path.name for path in files.iterdir() if path.name != "file-x.json")
    kept = {batch.input_file_id, batch.output_file_id}
    assert {name.partition(".")[0] for name in names} == kept and again.settings.model_name == MODEL
