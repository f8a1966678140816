"""run_engine: results, reasons of failures, limits, memory, and nothing left running."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from batchwright.bench.fresh_process import EngineFailure, EngineRun, run_engine, write_job
from batchwright.bench.workloads import WorkRequest
from tests.bench.fake_engine import fake_engine

REQUESTS = [WorkRequest([1, 2, 3], 2), WorkRequest([4], 1)]


def run(folder: Path, body: str, *, longest_s: float = 20.0, ready_s: float = 20.0) -> EngineRun:
    engine = fake_engine(folder / "engine", body)
    write_job(folder, REQUESTS, {"model": "m"})
    return run_engine([engine], folder, dict(os.environ), longest_s=longest_s, ready_s=ready_s)


def failure(folder: Path, body: str, **limits: float) -> EngineFailure:
    with pytest.raises(EngineFailure) as caught:
        run(folder, body, **limits)
    return caught.value


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for is there as a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def test_a_run(tmp_path: Path) -> None:
    found = run(tmp_path, "time.sleep(0.3); loaded(); finished(answers, speed=7)")
    assert found.token_ids == [[3, 3], [4]]
    assert found.seconds == 2.0
    assert found.ready_s >= 0.3
    assert found.version == "1.2" and found.settings == {"model": "m"}
    assert found.more == {"speed": 7}


def test_memory_of_all_processes_is_counted(tmp_path: Path) -> None:
    fill = "x = b'1' * 100_000_000; import time; time.sleep(1.5)"
    body = f"p = subprocess.Popen([sys.executable, '-c', {fill!r}])\n"
    body += "y = b'1' * 50_000_000; loaded(); p.wait(); finished(answers)"
    assert run(tmp_path, body).peak_bytes > 150_000_000


def test_its_last_words_are_the_reason(tmp_path: Path) -> None:
    found = failure(tmp_path, "print('hm'); sys.exit('no module named engine')")
    assert str(found) == "ended with status 1: no module named engine"
    assert not found.was_ready


def test_failing_with_the_rows(tmp_path: Path) -> None:
    found = failure(tmp_path, "loaded(); sys.exit(3)")
    assert str(found) == "ended with status 3: it said nothing"
    assert found.was_ready


def test_too_long(tmp_path: Path) -> None:
    """What it has started is ended with it, though it does not listen."""
    body = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
    body += "p = subprocess.Popen(['sleep', '60']); open(folder + '/pid', 'w').write(str(p.pid))\n"
    body += "loaded(); time.sleep(60)"
    start = time.monotonic()
    found = failure(tmp_path, body, longest_s=0.5)
    assert "not done after" in str(found) and found.was_ready
    assert time.monotonic() - start < 15
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_not_ready_in_time(tmp_path: Path) -> None:
    found = failure(tmp_path, "time.sleep(60)", ready_s=0.5)
    assert "not ready" in str(found) and not found.was_ready


def test_no_such_interpreter(tmp_path: Path) -> None:
    write_job(tmp_path, REQUESTS, {})
    with pytest.raises(EngineFailure, match=r"cannot run .*No such file") as caught:
        run_engine([str(tmp_path / "none")], tmp_path, {}, longest_s=1)
    assert not caught.value.was_ready
