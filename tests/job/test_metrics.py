"""metrics.jsonl as a job writes it."""

import fcntl
import os
import threading
from pathlib import Path

import msgspec
import pytest

from batchwright.job.directory import JobDirectory, running_process
from batchwright.job.metrics import INTERVAL_S, MetricsLog, RunStart, Sample
from batchwright.job.run_job import JobPaths, run_job
from batchwright.job.runner import JobOptions
from batchwright.sched.work import Work
from tests.job.fakes import FakeEngine, FakeModel, chat_row, read_lines, read_rows, write_lines


def run(folder: Path, rows: list[object], engine: FakeEngine, **options: object) -> list[dict]:
    source = write_lines(folder / "in.jsonl", rows)
    with JobDirectory(folder / "out.jsonl.job") as directory:
        run_job(
            read_rows(source),
            JobPaths(str(folder / "out.jsonl"), str(folder / "err.jsonl")),
            directory,
            FakeModel(engine),
            JobOptions(model_name="m", created=5, load_s=1.5, **options),  # type: ignore[arg-type]
        )
    return read_lines(folder / "out.jsonl.job" / "metrics.jsonl")


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    rows = [chat_row("a", max_tokens=3), chat_row("b", max_tokens=2), b"{", chat_row("c", n=2)]
    start, first, *_, last = run(tmp_path, rows, FakeEngine())
    assert (start["event"], start["model"], start["load_s"]) == ("start", "m", 1.5)
    assert start["settings"] == {"dtype": "float32", "num_threads": 1}
    assert start["machine"]["num_cpus"] >= 1
    assert "event" not in first
    assert last["event"] == "end"
    sample = msgspec.convert(last, Sample)
    assert (sample.rows_read, sample.rows_succeeded, sample.rows_failed) == (4, 3, 1)
    assert sample.error_codes == {"invalid_json_line": 1}
    assert sample.generated_tokens == 3 + 2 + 2
    assert sample.rows_length_limited == 2
    assert sum(sample.prompt_lengths) == 3
    assert sum(sample.output_lengths) == 4
    assert sample.peak_memory_bytes > 10**6
    assert sample.input_ended
    assert sample.t_s >= sample.step_s + sample.idle_s + sample.write_s > 0


def test_the_first_line_does_not_wait_for_the_first_step(tmp_path: Path) -> None:
    lines: list[int] = []
    path = tmp_path / "out.jsonl.job" / "metrics.jsonl"
    engine = FakeEngine(on_step=lambda number: lines.append(len(read_lines(path))))
    run(tmp_path, [chat_row("a", max_tokens=3)], engine)
    assert lines[0] == 2


def test_an_engine_that_has_worked_before_starts_from_zero(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.stats.num_generated_tokens, engine.stats.work = 1000, Work(num_prompt_tokens=500)
    last = run(tmp_path, [chat_row("a", max_tokens=2)], engine)[-1]
    assert last["generated_tokens"] == 2
    assert last["computed_prompt_tokens"] < 100


def test_a_run_that_breaks_off_says_so(tmp_path: Path) -> None:
    def on_step(number: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        run(tmp_path, [chat_row("a")], FakeEngine(on_step=on_step))
    assert read_lines(tmp_path / "out.jsonl.job" / "metrics.jsonl")[-1]["event"] == "error"


def test_a_line_a_second(tmp_path: Path) -> None:
    now_s = 0.0
    log = MetricsLog(tmp_path / "m.jsonl", now=lambda: now_s, wall=lambda: 100.0)
    written = 0
    for tick in range(40):
        now_s = tick / 10
        if log.is_due:
            log.write(Sample())
            written += 1
    log.close()
    assert written == 4 / INTERVAL_S


def test_a_torn_line_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"t_s":1.0,"ti')
    log = MetricsLog(path, now=lambda: 0.0, wall=lambda: 100.0)
    log.start(RunStart(model="m"))
    log.write(Sample())
    log.close()
    torn, start, _ = path.read_bytes().splitlines()
    assert torn == b'{"t_s":1.0,"ti'
    assert msgspec.json.decode(start)["event"] == "start"


def test_looking_at_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    assert running_process(folder) is None
    with JobDirectory(folder):
        assert (running_process(folder) or "").startswith("pid ")
        assert (running_process(folder) or "").startswith("pid ")  # looking changes nothing
    assert running_process(folder) is None


def test_a_job_that_starts_waits_out_somebody_who_looks(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "lock").touch()
    fd = os.open(folder / "lock", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    looks = threading.Timer(0.05, os.close, [fd])
    looks.start()
    with JobDirectory(folder):
        pass
    looks.join()
