"""Result files: private, whole lines, clear errors."""

import os
import stat
from pathlib import Path

import pytest

from batchwright.errors import OutputError, RequestError
from batchwright.job.formats.jsonl_writer import JsonlWriter, error_line, success_line
from tests.job.fakes import read_lines


def test_lines_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    writer = JsonlWriter(path)
    writer.write(success_line("a", {"x": "é"}))
    assert read_lines(path)[0]["response"]["body"] == {"x": "é"}
    assert read_lines(path)[0]["response"]["status_code"] == 200
    writer.write(error_line("b", 2, RequestError("bad", code="c", param="p")))
    assert read_lines(path)[1]["error"] == {"code": "c", "message": "bad", "param": "p", "line": 2}
    assert [sorted(line) for line in read_lines(path)] == [
        ["custom_id", "error", "id", "response"]
    ] * 2
    assert writer.num_lines == 2
    writer.close()


def test_files_are_private_even_if_they_were_not(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old contents")
    path.chmod(0o644)
    writer = JsonlWriter(path)
    writer.open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == ""
    writer.close()


def test_no_file_without_a_line(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "errors.jsonl")
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_output_error() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    writer = JsonlWriter("/dev/full")
    with pytest.raises(OutputError, match="No space left"):
        writer.write({"a": 1})
    writer.close()


def test_a_path_that_cannot_be_created_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot create"):
        JsonlWriter(tmp_path / "none" / "out.jsonl").open()
