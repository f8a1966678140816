"""Lines that come slowly: what is there does not wait for what is not."""

import io
import os
import sys
import threading
from collections.abc import Iterator
from random import Random

import pytest

from batchwright.job.feed import Feed
from batchwright.job.formats.pipe import PipeLines, is_pipe
from batchwright.job.formats.read_input import read_input
from tests.job.fakes import ByteTokenizer

ROW = b'{"id": "%d", "prompt": "x", "max_tokens": 2}\n'


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(to read, to write); the test closes the second one."""
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)


@pytest.mark.parametrize("seed", range(20))
def test_the_lines_are_those_of_a_file(pipe: tuple[int, int], seed: int) -> None:
    random = Random(seed)
    lengths = [0, 1, 3, 50, 200_000]
    data = b"".join(b"x" * random.choice(lengths) + b"\n" for _ in range(30)) + b"end"
    size = random.choice([1, 7, 1000, 1 << 20])
    if size < 1000:
        data = data[-500:]

    def write() -> None:
        start = 0
        while start < len(data):
            start += os.write(pipe[1], data[start : start + random.choice([1, 10, 100_000])])
        os.close(pipe[1])

    writer = threading.Thread(target=write)
    writer.start()
    lines, whole = PipeLines(pipe[0]), io.BytesIO(data)
    while expected := whole.readline(size):
        assert lines.readline(size) == expected
    assert lines.readline(size) == lines.readline(size) == b""
    assert not lines.would_wait()
    writer.join()


def test_rows_do_not_wait_for_one_that_is_not_written_yet(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = pipe
    assert is_pipe(read_end)
    with open(read_end, closefd=False, encoding="utf-8") as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        os.write(write_end, ROW % 0 + b"{broken\n")
        feed = Feed(read_input("-"), ByteTokenizer())
        seen = []
        for number in range(1, 4):
            while (chunk := feed.get(wait=True)) is None:
                pass
            seen.append(chunk.num_read)
            os.write(write_end, b"".join(ROW % (10 * number + i) for i in range(number)))
        os.close(write_end)
        while not feed.ended:
            chunk = feed.get(wait=True)
            seen += [] if chunk is None else [chunk.num_read]
        feed.close()
    assert seen == [2, 1, 2, 3]


def test_a_file_in_place_of_a_pipe(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(ROW % i for i in range(600)))
    with path.open(encoding="utf-8") as file:
        assert not is_pipe(file.fileno())
        monkeypatch.setattr(sys, "stdin", file)
        rows = list(read_input("-"))
    assert len(rows) == 600 and not any(row.pause_follows for row in rows)
