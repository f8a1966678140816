"""Jobs that are broken off and gone on with: each row is answered once, and for what it asks."""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from batchwright.errors import ConfigError, ResourceError
from batchwright.job import select
from batchwright.job.directory import JobDirectory
from batchwright.job.run_job import JobPaths, run_job
from batchwright.job.runner import JobOptions
from batchwright.job.stop import StopControl
from batchwright.job.summary import JobSummary
from batchwright.request import Request
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines, read_rows, write_lines


class Recording(FakeEngine):
    """Remembers which rows it was given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.given: list[str] = []

    def add(self, request: Request) -> None:
        super().add(request)
        self.given.append(request.id)


def go(
    folder: Path,
    rows: list[Any],
    engine: FakeEngine | None = None,
    *,
    stop_at: int | None = None,
    model: str = "fake",
    in_input_order: bool = False,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[JobSummary, list[str]]:
    """Begin or go on with the job in `folder`; returns its summary and the rows that were run."""
    engine = engine or Recording(max_running=2)
    stop = StopControl()
    if stop_at is not None:
        engine.on_step = lambda number: stop.request() if number == stop_at else None
    directory = JobDirectory(folder / "out.jsonl.job")
    try:
        summary = run_job(
            read_rows(write_lines(folder / "in.jsonl", rows)),
            JobPaths(str(folder / "out.jsonl"), str(folder / "err.jsonl"), in_input_order),
            directory,
            FakeModel(engine, name=model),
            JobOptions(model_name="m", created=5, **options),
            settings=settings,
            stop=stop,
        )
    finally:
        directory.close()
    return summary, getattr(engine, "given", [])


def ids(path: Path) -> list[str | None]:
    return [line["custom_id"] for line in read_lines(path)] if path.exists() else []


def rows_named(names: str, **params: Any) -> list[Any]:
    return [chat_row(name, max_tokens=2, **params) for name in names]


def test_a_stopped_job_goes_on_where_it_was_left(tmp_path: Path) -> None:
    rows = rows_named("abcdef")
    summary, _ = go(tmp_path, rows, stop_at=3)
    assert summary.stopped
    before = ids(tmp_path / "out.jsonl")
    assert before == ["a", "b", "c", "d"]
    summary, given = go(tmp_path, rows)
    assert given == ["e", "f"]
    assert ids(tmp_path / "out.jsonl") == list("abcdef")
    assert (summary.num_rows_read, summary.num_skipped, summary.num_succeeded) == (6, 4, 2)
    _, given = go(tmp_path, rows)
    assert given == []
    assert ids(tmp_path / "out.jsonl") == list("abcdef")


def test_rows_that_failed_are_tried_again_and_their_errors_go(tmp_path: Path) -> None:
    rows = [*rows_named("abc"), b"{"]
    go(tmp_path, rows, FakeEngine(break_rows=["b"], refuse=["c"]))
    assert ids(tmp_path / "err.jsonl") == ["c", None, "b"]
    _, given = go(tmp_path, rows)
    assert given == ["b", "c"]
    assert ids(tmp_path / "err.jsonl") == [None]
    assert ids(tmp_path / "out.jsonl") == ["a", "b", "c"]
    go(tmp_path, rows_named("abc"))  # the bad line is gone from the input
    assert not (tmp_path / "err.jsonl").exists()


def test_failed_rows_may_be_kept(tmp_path: Path) -> None:
    rows = rows_named("abc")
    go(tmp_path, rows, FakeEngine(break_rows=["b"]))
    summary, given = go(tmp_path, rows, keep_failed=True)
    assert given == []
    assert summary.num_failed_before == 1
    assert ids(tmp_path / "err.jsonl") == ["b"]


def test_the_input_may_grow_and_change_its_order(tmp_path: Path) -> None:
    go(tmp_path, rows_named("abc"))
    _, given = go(tmp_path, rows_named("dcbae"))
    assert given == ["d", "e"]
    assert sorted(ids(tmp_path / "out.jsonl")) == list("abcde")


def test_a_row_whose_content_changed_is_answered_again(tmp_path: Path) -> None:
    """Also a row without an id, which is known by its line alone."""
    go(tmp_path, [*rows_named("ab"), {"prompt": "x"}])
    changed = [*rows_named("a"), chat_row("b", "Something else", max_tokens=2), {"prompt": "xyz"}]
    _, given = go(tmp_path, changed)
    assert given == ["b", "line-3"]
    answers = {line["custom_id"]: line for line in read_lines(tmp_path / "out.jsonl")}
    assert len(read_lines(tmp_path / "out.jsonl")) == len(answers) == 3
    assert answers["line-3"]["response"]["body"]["usage"]["prompt_tokens"] == 4


def test_a_row_that_cannot_be_routed_any_more_loses_its_answer(tmp_path: Path) -> None:
    a, b = rows_named("ab")
    wrong = b | {"url": "/v1/foo"}
    go(tmp_path, [a, b])
    go(tmp_path, [a, wrong, a])
    assert ids(tmp_path / "out.jsonl") == ["a"]
    assert ids(tmp_path / "err.jsonl") == ["b", "a"]
    _, given = go(tmp_path, [a, wrong, a], keep_failed=True)
    assert given == []
    assert ids(tmp_path / "err.jsonl") == ["b", "a"]
    _, given = go(tmp_path, [a, b], keep_failed=True)
    assert given == ["b"]
    assert ids(tmp_path / "out.jsonl") == ["a", "b"]
    assert not (tmp_path / "err.jsonl").exists()


def test_another_model_or_setting_is_refused_by_name(tmp_path: Path) -> None:
    rows = rows_named("ab")
    go(tmp_path, rows, settings={"template": "A {x}"})
    with pytest.raises(ConfigError, match=r"model was 'fake', is 'other'; template was 'A \{x\}'"):
        go(tmp_path, rows, model="other", settings={"template": "B {x}"})
    assert ids(tmp_path / "out.jsonl") == ["a", "b"]
    go(tmp_path, rows, settings={"template": "A {x}"})


def test_two_processes_cannot_work_on_one_job(tmp_path: Path) -> None:
    directory = JobDirectory(tmp_path / "out.jsonl.job")
    with pytest.raises(ConfigError, match=r"another process \(pid \d+\) works on the job"):
        JobDirectory(tmp_path / "out.jsonl.job")
    directory.close()
    JobDirectory(tmp_path / "out.jsonl.job").close()


def test_a_directory_without_a_job_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.job"
    first = JobDirectory(path)
    lock = os.open(path / "lock", os.O_RDWR)  # as another process does that waits for it
    first.close()
    assert not path.exists()
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with JobDirectory(path) as other:  # the lock that is gone keeps nobody out
        os.close(lock)
        assert other.path.exists()
        other.manifest_path.touch()
    with JobDirectory(path):
        pass
    assert path.exists()
    shutil.rmtree(path)
    with JobDirectory(path):
        shutil.rmtree(path)  # by somebody else, while it is in use


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl.job"
    take = JobDirectory._take_lock

    def removed_first(directory: JobDirectory) -> bool:
        monkeypatch.undo()
        (path / "lock").unlink()
        path.rmdir()
        return take(directory)

    monkeypatch.setattr(JobDirectory, "_take_lock", removed_first)
    with JobDirectory(path), pytest.raises(ConfigError, match="another process"):
        JobDirectory(path)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.job").write_text("mine")
    with pytest.raises(ConfigError, match="is not a directory"):
        JobDirectory(tmp_path / "out.jsonl.job")


def test_output_in_input_order(tmp_path: Path) -> None:
    rows = [chat_row(str(i), max_tokens=9 - i) for i in range(9)]
    go(tmp_path, rows, Recording(max_running=9), in_input_order=True)
    assert ids(tmp_path / "out.jsonl") == [str(i) for i in range(9)]


def test_an_output_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    rows = rows_named("abcd")
    go(tmp_path, rows)
    whole = (tmp_path / "out.jsonl").read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "out.jsonl").write_bytes(whole[:length])
        _, given = go(tmp_path, rows)
        assert given == []
        assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_rows_that_ended_before_an_engine_gave_up_are_kept(tmp_path: Path) -> None:
    def on_step(number: int) -> None:
        if number == 3:
            raise ResourceError("no memory is left")

    with pytest.raises(ResourceError):
        go(tmp_path, rows_named("abcdef"), FakeEngine(max_running=2, on_step=on_step))
    assert ids(tmp_path / "out.jsonl") == ["a", "b"]
    _, given = go(tmp_path, rows_named("abcdef"))
    assert given == list("cdef")


def test_a_job_that_waits_for_its_input_can_be_stopped(tmp_path: Path) -> None:
    stop, silence = StopControl(), threading.Event()
    start_s = time.monotonic()

    def rows() -> Iterator[Any]:
        threading.Timer(0.3, stop.request).start()
        silence.wait(30)
        yield from ()

    with JobDirectory(tmp_path / "out.jsonl.job") as directory:
        summary = run_job(
            rows(),
            JobPaths(str(tmp_path / "out.jsonl"), str(tmp_path / "err.jsonl")),
            directory,
            FakeModel(FakeEngine()),
            JobOptions(model_name="m", created=5),
            stop=stop,
        )
    silence.set()
    assert summary.stopped
    assert time.monotonic() - start_s < 10


def test_a_deadline_expires_what_is_not_done_also_what_is_not_read(tmp_path: Path) -> None:
    rows = [chat_row(str(i), max_tokens=3) for i in range(600)]
    summary, _ = go(tmp_path, rows, deadline_s=0.0)
    assert (summary.num_rows_read, summary.num_expired) == (600, 600)
    assert not summary.stopped
    errors = read_lines(tmp_path / "err.jsonl")
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    summary, given = go(tmp_path, rows)
    assert len(given) == summary.num_succeeded == 600
    assert not (tmp_path / "err.jsonl").exists()


def test_a_row_that_runs_too_long_expires_alone(tmp_path: Path) -> None:
    engine = FakeEngine(max_running=2)
    rows = [chat_row("endless", max_tokens=10**9), *rows_named("ab")]
    summary, _ = go(tmp_path, rows, engine, row_timeout_s=0.02)
    assert ids(tmp_path / "out.jsonl") == ["a", "b"]
    assert ids(tmp_path / "err.jsonl") == ["endless"]
    assert summary.num_expired == 1
    assert summary.error_codes == {"row_timeout": 1}


def select_ids(folder: Path, rows: list[Any], choose: Callable[..., Any]) -> list[str]:
    source = write_lines(folder / "in.jsonl", rows)
    return [row.custom_id for row in choose(read_rows(source))]


def test_shards_have_each_row_once(tmp_path: Path) -> None:
    rows = rows_named("abcdefghijklmnop")
    shards = [
        select_ids(tmp_path, rows, lambda all_rows, index=index: select.shard(all_rows, index, 3))
        for index in range(3)
    ]
    assert sorted(chain.from_iterable(shards)) == list("abcdefghijklmnop")
    assert all(shards)
    reversed_shard = select_ids(tmp_path, rows[::-1], lambda r: select.shard(r, 0, 3))
    assert sorted(reversed_shard) == shards[0]


@pytest.mark.parametrize("num_rows", [1, 5, 16, 20])
def test_a_sample_has_its_number_of_rows(tmp_path: Path, num_rows: int) -> None:
    rows = rows_named("abcdefghijklmnop")
    limit = select.sample_limit(read_rows(write_lines(tmp_path / "in.jsonl", rows)), num_rows)
    chosen = select_ids(tmp_path, rows, lambda all_rows: select.sample(all_rows, limit))
    assert len(chosen) == min(num_rows, 16)
    assert chosen == sorted(chosen)


def test_a_job_that_goes_on_knows_how_long_finished_rows_were(tmp_path: Path) -> None:
    """Of those that are still in the input, for what it asks; the engine does not run them."""
    rows = [*rows_named("abcdef"), chat_row("two", max_tokens=2, n=2)]
    go(tmp_path, rows[:3] + rows[6:])
    engine = Recording(max_running=2)
    changed = chat_row("c", "Something else", max_tokens=2)
    go(tmp_path, [rows[0], changed, *rows[3:]], engine)
    assert engine.earlier == {"a": 2, "two": 2}
    assert engine.given == ["c", "d", "e", "f"]
