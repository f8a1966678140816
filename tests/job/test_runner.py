"""run_job with an engine that has no model: every row ends once, whatever happens."""

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.job.directory import JobDirectory
from batchwright.job.events import Draining, JobEvent, Progressed, RowFailed
from batchwright.job.feed import CHUNK_ROWS, MAX_CHUNKS_AHEAD
from batchwright.job.journal import MAX_PENDING_ROWS
from batchwright.job.model_names import ModelNames
from batchwright.job.run_job import JobPaths, run_job
from batchwright.job.runner import JobOptions
from batchwright.job.stop import StopControl, StoppedAtOnce
from batchwright.job.summary import JobSummary
from batchwright.request import Request
from tests.job.fakes import (
    FakeEngine,
    FakeModel,
    chat_row,
    read_lines,
    read_rows,
    write_lines,
)

OPTIONS = {"model_name": "m", "created": 5}


class Run:
    """One job in a folder, and all it left behind."""

    def __init__(
        self,
        folder: Path,
        rows: list[Any],
        engine: FakeEngine,
        *,
        stop: StopControl | None = None,
        **options: Any,
    ) -> None:
        self.events: list[JobEvent] = []
        source = write_lines(folder / "in.jsonl", rows)
        options = {"input_bytes": source.stat().st_size, **OPTIONS, **options}
        self.summary = run_rows(
            read_rows(source), folder, engine, stop=stop, on_event=self.events.append, **options
        )
        self.output = read_lines(folder / "out.jsonl")
        errors = folder / "err.jsonl"
        self.errors = read_lines(errors) if errors.exists() else []

    def ids(self) -> tuple[list[str], list[str]]:
        return [line["custom_id"] for line in self.output], [e["custom_id"] for e in self.errors]


def run_rows(
    rows: Iterator[Any],
    folder: Path,
    engine: FakeEngine,
    *,
    stop: StopControl | None = None,
    on_event: Callable[[JobEvent], None] = lambda event: None,
    **options: Any,
) -> JobSummary:
    """The job in `folder`, begun or gone on with."""
    directory = JobDirectory(folder / "out.jsonl.job")
    names = ModelNames("m")
    try:
        return run_job(
            names.watch(rows),
            JobPaths(str(folder / "out.jsonl"), str(folder / "err.jsonl")),
            directory,
            FakeModel(engine),
            JobOptions(**{**OPTIONS, **options}),
            check=names.check,
            stop=stop,
            on_event=on_event,
        )
    finally:
        directory.close()


def test_a_mixed_file(tmp_path: Path) -> None:
    rows = [
        chat_row("a", max_tokens=3),
        b"{not json",
        chat_row("bad", temperature="hot"),
        {"id": "b", "prompt": "xyz", "n": 2},
        chat_row("a"),
        chat_row("long"),
        chat_row("broken"),
        chat_row("template") | {"body": {"messages": [{"role": "nobody", "content": ""}]}},
        {"prompt": "p"},
    ]
    run = Run(tmp_path, rows, FakeEngine(refuse=["long"], break_rows=["broken"]))
    succeeded, failed = run.ids()
    assert sorted(succeeded) == ["a", "b", "line-9"]
    assert failed == [None, "bad", "a", "long", "template", "broken"]
    assert [line["error"]["line"] for line in run.errors] == [2, 3, 5, 6, 8, 7]
    assert run.errors[1]["error"]["param"] == "temperature"
    assert all(line["response"] is None for line in run.errors)
    assert all(line["error"] is None for line in run.output)
    chat = next(line for line in run.output if line["custom_id"] == "a")["response"]["body"]
    assert chat["choices"][0]["message"]["content"] == str(len("<user>Hello\n<assistant>") + 1)
    bare = next(line for line in run.output if line["custom_id"] == "b")["response"]["body"]
    assert [choice["index"] for choice in bare["choices"]] == [0, 1]
    summary = run.summary
    assert (summary.num_rows_read, summary.num_succeeded, summary.num_failed) == (9, 3, 6)
    assert summary.num_length_limited == 1
    assert summary.error_codes["duplicate_custom_id"] == 1
    assert summary.input_ended
    assert not summary.stopped
    failures = [event for event in run.events if isinstance(event, RowFailed)]
    assert [event.line for event in failures] == [2, 3, 5, 6, 8, 7]


def test_no_error_file_without_failures_and_an_old_one_goes(tmp_path: Path) -> None:
    (tmp_path / "err.jsonl").write_text("from an earlier run\n")
    run = Run(tmp_path, [chat_row("a")], FakeEngine())
    assert run.summary.num_succeeded == 1
    assert not (tmp_path / "err.jsonl").exists()


def test_rows_are_written_while_others_run(tmp_path: Path) -> None:
    seen = []
    engine = FakeEngine(max_running=MAX_PENDING_ROWS // 2)
    out = tmp_path / "out.jsonl"
    engine.on_step = lambda number: seen.append(len(read_lines(out)))
    rows = [chat_row(str(i), max_tokens=1) for i in range(MAX_PENDING_ROWS + 1)]
    Run(tmp_path, rows, engine)
    assert seen == [0, 0, MAX_PENDING_ROWS]


def test_the_window_bounds_what_the_engine_holds(tmp_path: Path) -> None:
    rows = [chat_row(str(i)) for i in range(100)]
    engine = FakeEngine()
    run = Run(tmp_path, rows, engine, horizon_rows=10)
    assert run.summary.num_succeeded == 100
    assert engine.most_unfinished <= 10


def test_the_first_row_runs_before_the_last_is_read(tmp_path: Path) -> None:
    num_rows = (MAX_CHUNKS_AHEAD + 4) * CHUNK_ROWS
    rows_read_at_first_step: list[int] = []
    source = write_lines(tmp_path / "in.jsonl", [chat_row(str(i)) for i in range(num_rows)])
    num_read = 0

    def counted() -> Iterator[Any]:
        nonlocal num_read
        for row in read_rows(source):
            num_read += 1
            yield row

    engine = FakeEngine(on_step=lambda number: rows_read_at_first_step.append(num_read))
    summary = run_rows(counted(), tmp_path, engine)
    assert CHUNK_ROWS <= rows_read_at_first_step[0] < num_rows
    assert summary.num_succeeded == num_rows


def test_memory_is_that_of_the_window_not_of_the_input(tmp_path: Path) -> None:
    num_rows = 8000
    lines = (chat_row(str(i), f"{i} " * 500, max_tokens=1) for i in range(num_rows))
    source = write_lines(tmp_path / "in.jsonl", lines)
    engine = FakeEngine(max_running=256)
    tracemalloc.start()
    try:
        summary = run_rows(read_rows(source), tmp_path, engine, horizon_rows=512)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert summary.num_succeeded == num_rows
    # A row takes 12 KB, as text and as tokens: all of them 96 MB; the horizon, the chunks ahead and
    # those in hand, when the feed is as far ahead as it may be, 25 MB.
    assert peak_bytes < 40_000_000


@pytest.mark.parametrize("num_rows", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_files_around_a_whole_chunk(tmp_path: Path, num_rows: int) -> None:
    run = Run(tmp_path, [chat_row(str(i)) for i in range(num_rows)], FakeEngine(max_running=64))
    assert run.summary.num_succeeded == num_rows
    assert run.summary.estimated_rows == num_rows


def test_one_foreign_model_name_is_taken_a_second_is_not(tmp_path: Path) -> None:
    rows = [
        chat_row(name, model=model) for name, model in zip("abcd", ["gpt-x", "m", "gpt-x", "y"])
    ]
    run = Run(tmp_path, rows, FakeEngine())
    assert run.ids() == (["a", "b", "c"], ["d"])
    assert run.errors[0]["error"]["code"] == "model_mismatch"
    assert "'gpt-x'" in run.errors[0]["error"]["message"]


def test_first_stop_finishes_what_runs_and_drops_what_waits(tmp_path: Path) -> None:
    stop = StopControl()
    engine = FakeEngine(max_running=2, on_step=lambda n: stop.request() if n == 2 else None)
    run = Run(tmp_path, [chat_row(str(i), max_tokens=3) for i in range(6)], engine, stop=stop)
    assert run.ids() == (["0", "1"], [])
    summary = run.summary
    assert summary.stopped
    assert (summary.num_succeeded, summary.num_failed, summary.num_cancelled) == (2, 0, 4)
    (draining,) = [event for event in run.events if isinstance(event, Draining)]
    assert draining.num_running == 2


def test_a_stop_leaves_the_rest_of_the_input_unread(tmp_path: Path) -> None:
    stop = StopControl()
    engine = FakeEngine(on_step=lambda n: stop.request() if n == 1 else None)
    rows = [chat_row(str(i)) for i in range(CHUNK_ROWS + 5)]
    run = Run(tmp_path, rows, engine, stop=stop)
    assert run.summary.num_rows_read == CHUNK_ROWS
    assert not run.summary.input_ended
    assert [line["custom_id"] for line in run.output] == ["0", "1", "2", "3"]


def test_draining_ends_after_its_time(tmp_path: Path) -> None:
    stop = StopControl()
    stop.request()
    run = Run(tmp_path, [chat_row("a", max_tokens=50)], FakeEngine(), stop=stop, drain_s=0.0)
    assert run.summary.stopped
    assert run.summary.num_rows_read == 0
    stop, engine = StopControl(), FakeEngine()
    engine.on_step = lambda n: stop.request() if n == 2 else None
    run = Run(tmp_path, [chat_row("a", max_tokens=50)], engine, stop=stop, drain_s=0.0)
    assert run.summary.num_cancelled == 1
    assert run.output == []


def test_second_stop_ends_within_the_step(tmp_path: Path) -> None:
    stop, steps = StopControl(), []

    def on_step(number: int) -> None:
        if number in (2, 3):
            stop.request()
        steps.append(number)

    rows = [chat_row("short", max_tokens=1), chat_row("long", max_tokens=50)]
    run = Run(tmp_path, rows, FakeEngine(on_step=on_step), stop=stop)
    assert steps == [1, 2]
    assert run.ids() == (["short"], [])
    assert run.summary.stopped
    assert run.summary.num_cancelled == 1


def test_third_stop_interrupts_waiting_for_input() -> None:
    stop = StopControl()
    stop.request()
    stop.request()
    with pytest.raises(StoppedAtOnce):
        stop.request()


def test_an_interrupt_while_rows_are_read_counts_them_all(tmp_path: Path) -> None:
    class Interrupted(FakeEngine):
        def add(self, request: Request) -> None:
            if request.id == "2":
                raise StoppedAtOnce
            super().add(request)

    run = Run(tmp_path, [chat_row(str(i)) for i in range(5)], Interrupted())
    assert run.summary.stopped
    assert (run.summary.num_rows_read, run.summary.num_cancelled) == (5, 5)


def test_a_row_cancelled_by_someone_else_fails(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.on_step = lambda number: engine.cancel("a") if number == 2 else None
    run = Run(tmp_path, [chat_row("a", max_tokens=9), chat_row("b", max_tokens=9)], engine)
    assert run.ids() == (["b"], ["a"])
    assert run.errors[0]["error"]["code"] == "cancelled"


def test_progress_is_told_after_every_step(tmp_path: Path) -> None:
    run = Run(tmp_path, [chat_row("a", max_tokens=5)], FakeEngine())
    assert sum(isinstance(event, Progressed) for event in run.events) == 5


def test_time_left_follows_the_lengths_seen() -> None:
    engine = SimpleNamespace(num_generated_tokens=0)
    summary = JobSummary(engine=engine, num_rows_read=10, input_ended=True)
    assert summary.eta_s is None
    # Two rows are done with half of the 400 tokens allowed; the others may have 1,600.
    summary.num_succeeded, summary.num_output_tokens, summary.run_s = 2, 200, 4.0
    summary.num_allowed_tokens, summary.num_allowed_tokens_done = 2000, 400
    engine.num_generated_tokens = 400
    assert summary.eta_s == pytest.approx(6.0)  # 800 expected, 200 there, 100 tokens/s
    engine.num_generated_tokens = 2000  # longer than expected: never nearly zero
    assert summary.eta_s == pytest.approx(200 / 500)
    engine.num_generated_tokens = 400
    summary.input_ended, summary.input_bytes, summary.num_bytes_read = False, 200, 100
    assert summary.eta_s == pytest.approx(16.0)  # as many rows again are unread: 1,000 tokens


def test_rows_that_are_done_leave_nothing_to_expect(tmp_path: Path) -> None:
    rows = [chat_row(str(i), max_tokens=3) for i in range(5)] + [chat_row("broken", max_tokens=9)]
    summary = Run(tmp_path, rows, FakeEngine(break_rows=["broken"])).summary
    assert summary.num_allowed_tokens == summary.num_allowed_tokens_done == 15


def test_rows_of_the_whole_input_are_judged_by_its_bytes() -> None:
    summary = JobSummary(engine=SimpleNamespace(), input_bytes=1000)
    assert summary.estimated_rows is None
    summary.num_rows_read, summary.num_bytes_read = 10, 100
    assert summary.estimated_rows == 100
    summary.input_ended = True
    assert summary.estimated_rows == 10


row_kinds = st.sampled_from(["chat", "bare", "json", "param", "refused", "broken", "twin"])


@given(
    kinds=st.lists(row_kinds, min_size=1, max_size=40),
    horizon=st.integers(1, 12),
    stop_at=st.integers(0, 30),
)
def test_every_row_ends_once(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], horizon: int, stop_at: int
) -> None:
    rows: list[Any] = []
    for number, kind in enumerate(kinds):
        name = f"{kind}-{number}"
        rows.append(
            {
                "chat": chat_row(name, max_tokens=1 + number % 5),
                "bare": {"prompt": "x", "max_tokens": 2},
                "json": b"{",
                "param": chat_row(name, n=0),
                "refused": chat_row(name),
                "broken": chat_row(name),
                "twin": chat_row("twin"),
            }[kind]
        )
    stop = StopControl()
    names = [f"{kind}-{number}" for number, kind in enumerate(kinds)]
    engine = FakeEngine(
        max_running=3,
        refuse=[name for name in names if name.startswith("refused")],
        break_rows=[name for name in names if name.startswith("broken")],
        on_step=lambda number: stop.request() if number == stop_at else None,
    )
    folder = tmp_path_factory.mktemp("job")
    run = Run(folder, rows, engine, horizon_rows=horizon, stop=stop)
    summary = run.summary
    assert (len(run.output), len(run.errors)) == (summary.num_succeeded, summary.num_failed)
    assert summary.num_rows_read == summary.num_finished + summary.num_cancelled
    if not summary.stopped:
        lines = [line["error"]["line"] for line in run.errors]
        assert len(set(lines)) == len(lines)
        assert len(lines) + len(run.output) == len(rows)
        expected_failures = sum(kind not in ("chat", "bare", "twin") for kind in kinds)
        assert summary.num_failed == expected_failures + max(0, kinds.count("twin") - 1)
