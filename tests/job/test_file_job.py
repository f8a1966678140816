"""run_file: the job that the command runs, from Python, on files and on rows given as dicts."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchwright
from batchwright.errors import ConfigError, InputError, OutputError
from batchwright.job.events import JobEvent, Progressed, RowFailed
from batchwright.job.file_job import run_file
from batchwright.job.stop import StopControl
from batchwright.plan.auto_order import AutoOrder, Measured, Prediction
from batchwright.plan.order import EQUAL_RATES
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines, write_lines


def ids(path: Path) -> list[str | None]:
    return [line["custom_id"] for line in read_lines(path)]


def answers(path: Path) -> dict[str, Any]:
    lines = {line["custom_id"]: line for line in read_lines(path)}
    for line in lines.values():
        line["response"]["body"].pop("created")
    return lines


def test_a_file_and_its_rows_as_dicts_give_the_same(tmp_path: Path) -> None:
    rows = [chat_row("a"), {"prompt": "x", "max_tokens": 2}, {"id": 7, "prompt": "y", "stop": "z"}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    inputs = {"file": source, "list": rows, "once": iter(rows), "path": str(source)}
    for name, given in inputs.items():
        summary = run_file(FakeModel(FakeEngine()), given, tmp_path / f"{name}.jsonl")
        assert (summary.num_succeeded, summary.num_failed, summary.stopped) == (3, 0, False)
    expected = answers(tmp_path / "file.jsonl")
    assert sorted(expected) == ["7", "a", "line-2"]
    assert all(answers(tmp_path / f"{name}.jsonl") == expected for name in inputs)


def test_bad_rows_fail_alone_and_are_told(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"prompt": "x"}
    endless["metadata"] = endless
    rows: list[Any] = [
        {"prompt": "x"},
        {"prompt": "x", "temperature": float("nan")},
        {"prompt_token_ids": np.arange(3)},
        endless,
        "no dict",
        {"prompt": "\ud800"},
        {"prompt": "x", "max_tokens": 0},
        {"id": "line-8", "prompt": "x", "prompts": "y"},
    ]
    events: list[JobEvent] = []
    model = FakeModel(FakeEngine())
    summary = run_file(model, rows, tmp_path / "out.jsonl", on_event=events.append)
    assert (summary.num_succeeded, summary.num_failed) == (1, 7)
    errors = read_lines(tmp_path / "out.errors.jsonl")
    assert sorted(line["error"]["line"] for line in errors) == [2, 3, 4, 5, 6, 7, 8]
    told = [event.line for event in events if isinstance(event, RowFailed)]
    assert sorted(told) == [2, 3, 4, 5, 6, 7, 8]
    assert any(isinstance(event, Progressed) for event in events)


def test_it_goes_on_where_it_was_left_as_the_command_does(tmp_path: Path) -> None:
    stop = StopControl()
    engine = FakeEngine(max_running=2, on_step=lambda n: stop.request() if n == 3 else None)
    rows = [chat_row(name, max_tokens=2) for name in "abcdef"]
    summary = run_file(FakeModel(engine), rows, tmp_path / "out.jsonl", stop=stop)
    assert summary.stopped
    assert engine.num_unfinished == 0
    assert ids(tmp_path / "out.jsonl") == ["a", "b", "c", "d"]
    source = write_lines(tmp_path / "in.jsonl", rows)  # the same job, now from a file
    summary = run_file(FakeModel(engine), source, tmp_path / "out.jsonl")
    assert (summary.num_skipped, summary.num_succeeded) == (4, 2)
    assert ids(tmp_path / "out.jsonl") == list("abcdef")
    assert run_file(FakeModel(engine), source, tmp_path / "out.jsonl", force=True).num_skipped == 0


def test_a_second_model_name_is_refused_on_each_run(tmp_path: Path) -> None:
    """Also when the rows that give the first are done."""
    rows = [chat_row(name, model=model) for name, model in zip("abc", "xyx", strict=True)]
    for _ in range(2):
        run_file(FakeModel(FakeEngine(), name="m"), rows, tmp_path / "out.jsonl")
        assert ids(tmp_path / "out.jsonl") == ["a", "c"]
        assert ids(tmp_path / "out.errors.jsonl") == ["b"]


def test_a_pipe_cannot_be_sampled(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "x"}\n')
    os.close(writing)
    with pytest.raises(ConfigError, match="reads the input twice"):
        run_file(FakeModel(FakeEngine()), f"/dev/fd/{reading}", tmp_path / "out.jsonl", sample=1)
    os.close(reading)


def test_counts_are_those_of_the_run(tmp_path: Path) -> None:
    model = FakeModel(FakeEngine())
    steps = [
        run_file(model, [chat_row("a", max_tokens=5)], tmp_path / name).engine.num_steps
        for name in ("one.jsonl", "two.jsonl")
    ]
    assert steps == [5, 5]


def test_ctrl_c_passes_and_the_model_can_be_used_again(tmp_path: Path) -> None:
    def on_step(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    engine = FakeEngine(max_running=2, on_step=on_step)
    rows = [chat_row(name, max_tokens=2) for name in "abcdef"]
    with pytest.raises(KeyboardInterrupt):
        run_file(FakeModel(engine), rows, tmp_path / "out.jsonl")
    assert engine.num_unfinished == 0
    assert run_file(FakeModel(engine), rows, tmp_path / "out.jsonl").num_done == 6
    assert sorted(ids(tmp_path / "out.jsonl")) == list("abcdef")  # type: ignore[type-var]


def test_nothing_is_printed_and_no_handler_is_installed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_file(FakeModel(FakeEngine(), name="m"), [chat_row("a"), {}], tmp_path / "out.jsonl")
    assert capfd.readouterr() == ("", "")


def once() -> Iterator[dict[str, Any]]:
    yield chat_row("a")


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ([], {}, "empty_file"),
        ("no.jsonl", {}, "No such file"),
        ([chat_row("a")], {"ordred": True}, "unknown arguments: ordred; known: source, output"),
        ([chat_row("a")], {"limit": 0}, "limit is 0"),
        ([chat_row("a")], {"limit": 1, "sample": 1}, "exclude each other"),
        ([chat_row("a")], {"shard": (2, 2)}, r"shard is \(2, 2\)"),
        (once(), {"sample": 1}, "reads the input twice"),
        ([chat_row("a")], {"template": "{b}"}, "no column"),
    ],
)
def test_what_cannot_work_is_told(
    tmp_path: Path, source: Any, arguments: dict[str, Any], words: str
) -> None:
    model = FakeModel(FakeEngine())
    with pytest.raises((ConfigError, InputError), match=words):
        run_file(model, source, tmp_path / "out.jsonl", **arguments)
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.jsonl.job" / "manifest.json").exists()


def test_a_busy_model_and_a_running_job_are_refused(tmp_path: Path) -> None:
    model, events = FakeModel(FakeEngine()), []

    def again(event: JobEvent) -> None:
        events.append(event)
        if len(events) > 1:
            return
        with pytest.raises(ConfigError, match="works on the job"):
            run_file(FakeModel(FakeEngine()), [chat_row("a")], tmp_path / "out.jsonl")
        with pytest.raises(ConfigError, match="still running other requests"):
            run_file(model, [chat_row("a")], tmp_path / "other.jsonl")

    rows = [chat_row("a", max_tokens=3)]
    assert run_file(model, rows, tmp_path / "out.jsonl", on_event=again).num_succeeded == 1


def test_columns_and_parts(tmp_path: Path) -> None:
    rows = [{"text": "x" * i, "label": i} for i in range(1, 9)]
    model = FakeModel(FakeEngine())
    run_file(model, rows, tmp_path / "out.jsonl", column=["prompt=text"], limit=3)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["columns"] for line in lines] == [{"label": 1}, {"label": 2}, {"label": 3}]
    sizes = [
        run_file(
            model, rows, tmp_path / f"{part}.jsonl", column=["prompt=text"], shard=(part, 2)
        ).num_succeeded
        for part in (0, 1)
    ]
    assert sum(sizes) == 8


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, OutputError), match="there is no directory"):
        run_file(FakeModel(FakeEngine()), [chat_row("a")], tmp_path / "no" / "out.jsonl")


def test_it_is_a_public_name_that_imports_no_torch() -> None:
    code = "import sys, batchwright; batchwright.run_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert batchwright.run_file is run_file


def test_a_long_file_measures_the_machine_once_and_before_it_runs(tmp_path: Path) -> None:
    """Its feed has a thread of its own, which must never measure beside the engine."""
    engine = FakeEngine()
    measured_in: list[tuple[threading.Thread, bool]] = []

    def measure() -> Measured:
        measured_in.append((threading.current_thread(), engine.num_unfinished == 0))
        return Measured(lambda job, order, share: Prediction(1.0, 1), EQUAL_RATES, 1e-3)

    rows = [{"prompt": f"{row} " * 40, "max_tokens": 2} for row in range(50)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    for name, token_s, times in (("short", 1e-9, 0), ("long", 1.0, 1)):
        order = AutoOrder(measure, ["fcfs", "prefix_dfs"], measure_s=1e-3, token_s=token_s)
        model = FakeModel(engine, order=order)
        assert run_file(model, source, tmp_path / f"{name}.jsonl").num_succeeded == 50
        assert len(measured_in) == times
    assert measured_in == [(threading.main_thread(), True)]
