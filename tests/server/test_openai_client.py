"""OpenAI's own client, unchanged, against a server that really listens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from batchwright.job.directory import JobDirectory
from batchwright.job.run_job import JobPaths, run_job
from batchwright.job.runner import JobOptions
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines, read_rows, write_lines
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
MESSAGES = [{"role": "user", "content": "Hello"}]


def test_a_batch_from_upload_to_download(server: RunningServer) -> None:
    client = server.client()
    batch = begin(client, [chat_row(str(i)) for i in range(20)], metadata={"who": "me"})
    assert batch.status in ("validating", "in_progress") and batch.object == "batch"
    batch = ended(client, batch)
    assert batch.status == "completed" and batch.errors is None and batch.error_file_id is None
    assert batch.metadata == {"who": "me"} and batch.model == MODEL
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 20, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at == batch.created_at + 24 * 3600
    found = client.files.retrieve(batch.output_file_id)
    text = client.files.content(batch.output_file_id).text
    assert found.bytes == len(text.encode()) and found.purpose == "batch_output"
    assert {json.loads(line)["custom_id"] for line in text.splitlines()} == {
        str(i) for i in range(20)
    }


def test_the_lines_are_those_of_the_command(server: RunningServer, tmp_path: Path) -> None:
    rows = [chat_row(str(i), "x" * i, max_tokens=1 + i % 3, n=1 + i % 2) for i in range(9)]
    rows += [chat_row("hot", temperature="hot"), b"{broken", chat_row("3")]
    client = server.client()
    batch = ended(client, begin(client, rows))
    source = write_lines(tmp_path / "in.jsonl", rows)
    paths = JobPaths(str(tmp_path / "out.jsonl"), str(tmp_path / "out.errors.jsonl"))
    with JobDirectory(tmp_path / "out.jsonl.job") as directory:
        options = JobOptions(model_name=MODEL, created=batch.created_at)
        run_job(read_rows(source), paths, directory, FakeModel(FakeEngine()), options)
    for file_id, path in (
        (batch.output_file_id, paths.output),
        (batch.error_file_id, paths.errors),
    ):
        assert lines_of(client, file_id) == read_lines(Path(path))


def test_a_bad_row_fails_alone(common: RunningServer) -> None:
    client = common.client()
    completion = {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "x"}}
    rows = [chat_row("a"), chat_row("b", temperature="hot"), b"nonsense", completion]
    batch = ended(client, begin(client, rows))
    assert batch.status == "completed"
    assert [line["custom_id"] for line in lines_of(client, batch.output_file_id)] == ["a"]
    codes = {e["custom_id"]: e["error"]["code"] for e in lines_of(client, batch.error_file_id)}
    assert codes == {"b": "invalid_request", None: "invalid_json_line", "c": "url_mismatch"}
    assert batch.request_counts.failed == 3


@pytest.mark.parametrize(
    ("rows", "code", "line"),
    [
        ([], "empty_file", None),
        ([b"{}", b"nope"], "missing_required_parameter", 1),
        ([b"\xff\xfex\0"], "invalid_file", None),
        ([chat_row("a") | {"url": "/v1/completions"}], "unknown_parameter", 1),
    ],
)
def test_a_file_without_a_sound_row_fails_as_a_whole(
    common: RunningServer, rows: list[object], code: str, line: int | None
) -> None:
    client = common.client()
    batch = ended(client, begin(client, rows))
    assert batch.status == "failed" and batch.output_file_id is None
    first = batch.errors.data[0]
    assert (first.code, first.line) == (code, line)
    assert str(common.settings.data) not in str(batch.errors)


def test_several_model_names_are_a_mismatch(common: RunningServer) -> None:
    client = common.client()
    rows = [chat_row(str(i)) for i in range(3)]
    for row, name in zip(rows, ["gpt-x", "gpt-x", "gpt-y"]):
        row["body"]["model"] = name
    batch = ended(client, begin(client, rows))
    assert batch.request_counts.completed == 2
    (failure,) = lines_of(client, batch.error_file_id)
    assert (failure["custom_id"], failure["error"]["code"]) == ("2", "model_mismatch")


def test_cancelling_keeps_what_is_finished(start: Start) -> None:
    engine = PacedEngine(max_running=2)
    engine.pace_s = 0.01
    client = start(engine).client()
    batch = begin(client, [chat_row(str(i), max_tokens=2) for i in range(400)])
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 3)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
    lines = lines_of(client, batch.output_file_id)
    assert 3 < len(lines) == batch.request_counts.completed < 400
    assert batch.request_counts.total == 400
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_batches_run_one_after_the_other_and_waiting_ones_can_be_cancelled(start: Start) -> None:
    engine = PacedEngine()
    engine.pace_s = 0.02
    client = start(engine).client()
    batches = [begin(client, [chat_row("a", max_tokens=20)]) for _ in range(3)]
    until(lambda: client.batches.retrieve(batches[2].id).status == "in_progress")
    cancelled = client.batches.cancel(batches[1].id)
    assert cancelled.status == "cancelled" and cancelled.output_file_id is None
    assert ended(client, batches[0]).completed_at <= ended(client, batches[2]).completed_at
    assert engine.most_unfinished == 1  # never two batches' rows at once


def test_a_batch_expires(start: Start) -> None:
    engine = PacedEngine(max_running=2)
    engine.pace_s = 0.01
    server = start(engine)
    client = server.client()
    file = server.parts.files.records.get(
        upload(client, [chat_row(str(i), max_tokens=2) for i in range(400)]).id
    )
    assert file is not None
    batch = server.parts.batches.create(
        server.parts.batches.new("/v1/chat/completions", file, "1h", 1, None)
    )
    found = ended(client, batch)
    assert found.status == "expired" and found.expired_at
    done, late = lines_of(client, found.output_file_id), lines_of(client, found.error_file_id)
    assert len(done) + len(late) == 400 and late
    assert {line["error"]["code"] for line in late} == {"batch_expired"}


def test_lists_are_paged(server: RunningServer) -> None:
    client = server.client()
    batches = [begin(client, [chat_row("a")]) for _ in range(5)]
    newest_first = [batch.id for batch in reversed(batches)]
    first = client.batches.list(limit=2)
    assert [batch.id for batch in first.data] == newest_first[:2] and first.has_more
    assert [batch.id for batch in client.batches.list(limit=2)] == newest_first  # pages through
    after = client.batches.list(limit=10, after=newest_first[3])
    assert [batch.id for batch in after.data] == newest_first[4:] and not after.has_more
    for batch in batches:
        ended(client, batch)
    assert len(client.files.list(purpose="batch").data) == 5
    assert len(client.files.list().data) == 10
    assert [f.id for f in client.files.list(order="asc", limit=3)] == sorted(
        f.id for f in client.files.list()
    )
    for limit in (0, 10_001, f"000000001{'9' * 5000}"):
        with pytest.raises(openai.BadRequestError, match="limit"):
            client.get(f"/batches?limit={limit}", cast_to=object)
    with pytest.raises(openai.BadRequestError, match="no such id"):
        client.batches.list(after="batch_x")


def test_deleting_files(start: Start) -> None:
    engine = PacedEngine()
    engine.pace_s = 0.02
    server = start(engine)
    client = server.client()
    batch = begin(client, [chat_row("a", max_tokens=20)])
    with pytest.raises(openai.ConflictError, match="still needs"):
        client.files.delete(batch.input_file_id)
    batch = ended(client, batch)
    job = server.parts.batches.job_path(batch.id)
    assert (job / "results.jsonl").exists()
    for file_id in (batch.input_file_id, batch.output_file_id):
        assert client.files.delete(file_id).deleted
        for use in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                use(file_id)
    assert not (job / "results.jsonl").exists()  # the answers are gone wherever they were
    file = upload(client, [chat_row("a")])
    server.parts.files.path(file.id).unlink()  # by somebody else
    with pytest.raises(openai.NotFoundError, match="gone"):
        client.files.content(file.id)
    client.files.delete(file.id)
    assert not list((server.settings.data / "files").iterdir())


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "9999d"}, "completion_window"),
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, "input_file_id"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"extra_body": {"priority": 3}}, "priority"),
    ],
)
def test_what_a_batch_cannot_be(
    common: RunningServer, change: dict[str, object], param: str
) -> None:
    num_before = len(common.client().batches.list().data)
    with pytest.raises(openai.BadRequestError) as caught:
        begin(common.client(), [chat_row("a")], **change)
    assert caught.value.param == param
    assert len(common.client().batches.list().data) == num_before


def test_only_batch_files_are_taken(server: RunningServer) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=b"{}", purpose="fine-tune")
    assert caught.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(
            file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert not list((server.settings.data / "files").iterdir())


def test_models(common: RunningServer) -> None:
    client = common.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "batchwright"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_a_restarted_server_has_everything(start: Start) -> None:
    server = start()
    client = server.client()
    batch = ended(client, begin(client, [chat_row("a")]))
    server.close()
    again = start()
    client = again.client()
    assert client.batches.retrieve(batch.id) == batch
    assert len(lines_of(client, batch.output_file_id)) == 1
    assert time.time() - batch.created_at < 60
