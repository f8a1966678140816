"""Projections: every form says the same, whole or not at all."""

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from batchwright.errors import ConfigError, OutputError, RequestError
from batchwright.job.formats import result_table
from batchwright.job.formats.output import check_output, output_kind, write_projection
from batchwright.job.formats.result_line import error_line, success_line


def chat_body(*texts: str | None) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [
            {"index": index, "message": {"content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
    }


def encoded(*lines: dict[str, Any]) -> list[bytes]:
    return [msgspec.json.encode(line) + b"\n" for line in lines]


LINES = encoded(
    success_line("a", chat_body('one,\n"two"\r', "three"), {"stars": 5, "text": "in"}),
    success_line(
        "b",
        {"choices": [{"text": "é", "finish_reason": "length"}], "usage": {"prompt_tokens": 1}},
        {"stars": 0.5},
    ),
    error_line(
        None, 3, RequestError("bad", code="invalid_json_line"), {"stars": None, "tags": [1]}
    ),
    success_line("c", chat_body(None)),
)


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), ""), delimiter=delimiter))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("-", "jsonl"),
        ("out", "jsonl"),
        ("out.json", "jsonl"),
        ("out.JSONL", "jsonl"),
        ("out.jsonl.gz", "jsonl.gz"),
        ("a.csv/out.zst", "jsonl.zst"),
        ("out.tsv", "tsv"),
        ("out.csv.gz", "csv.gz"),
        ("out.Parquet", "parquet"),
        ("s3://bucket/out.jsonl", "jsonl.url"),
        ("s3://bucket/out.csv", "csv"),
    ],
)
def test_kinds(path: str, kind: str) -> None:
    assert output_kind(path) == kind


def test_lines_compressed_or_not(tmp_path: Path) -> None:
    opened = {
        "out.jsonl": lambda data: data,
        "out.jsonl.gz": gzip.decompress,
        "out.jsonl.zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    }
    for name, read in opened.items():
        write_projection(str(tmp_path / name), iter(LINES))
        assert read((tmp_path / name).read_bytes()) == b"".join(LINES)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(opened)


def test_the_same_lines_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_projection(str(tmp_path / name), LINES)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_projection(str(path), iter(LINES))
    first, second, failed, silent = read_csv(path)
    assert list(first) == [
        *result_table.FIXED, "stars", "input_text", "tags", "response"
    ]  # fmt: skip
    assert first["text"] == 'one,\n"two"\r'
    assert json.loads(first["texts"]) == ['one,\n"two"\r', "three"]
    assert (first["stars"], second["stars"], first["input_text"]) == ("5", "0.5", "in")
    assert (first["prompt_tokens"], first["completion_tokens"]) == ("3", "5")
    assert json.loads(first["response"]) == chat_body('one,\n"two"\r', "three")
    assert (second["text"], second["finish_reason"]) == ("é", "length")
    assert (failed["custom_id"], failed["error_code"], failed["error_message"], failed["tags"]) == (
        "", "invalid_json_line", "bad", "[1]"
    )  # fmt: skip
    assert (failed["error_line"], first["error_line"]) == ("3", "")
    assert (silent["custom_id"], silent["text"], silent["texts"]) == ("c", "", "[null]")
    write_projection(str(tmp_path / "out.tsv"), LINES)
    assert read_csv(tmp_path / "out.tsv", "\t") == [first, second, failed, silent]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "out.parquet"
    write_projection(str(path), iter(LINES))
    table = parquet.read_table(path)
    types = {field.name: str(field.type) for field in table.schema}
    assert types["texts"].startswith("list<")
    assert (types["stars"], types["tags"], types["prompt_tokens"]) == ("double", "string", "int64")
    first, second, failed, silent = table.to_pylist()
    assert (failed["error_line"], first["error_line"]) == (3, None)
    assert first["texts"] == ['one,\n"two"\r', "three"]
    assert (first["stars"], second["stars"], failed["stars"]) == (5.0, 0.5, None)
    assert (first["error_code"], failed["error_code"]) == (None, "invalid_json_line")
    assert json.loads(failed["tags"]) == [1]
    assert failed["response"] is None
    assert (silent["text"], silent["texts"]) == (None, [None])


def test_parquet_of_many_rows_and_of_none(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "out.parquet")
    lines = (
        line
        for n in range(10_000)
        for line in encoded(success_line(str(n), chat_body("x"), {"n": n}))
    )
    write_projection(path, lines)
    assert parquet.ParquetFile(path).metadata.num_row_groups == 3
    assert parquet.read_table(path)["n"].to_pylist() == list(range(10_000))
    write_projection(path, iter([]))
    assert parquet.read_table(path).num_rows == 0


def test_embeddings_and_scores_have_columns_of_their_own(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "out.parquet"
    embedding = {"object": "list", "data": [{"embedding": [0.5, 0.25]}], "usage": {}}
    score = {"object": "score", "data": [{"logprob": -1.5}], "usage": {}}
    write_projection(str(path), encoded(success_line("a", embedding), success_line("b", score)))
    first, second = parquet.read_table(path).to_pylist()
    assert (first["embedding"], first["logprob"]) == ([0.5, 0.25], None)
    assert (second["embedding"], second["logprob"]) == (None, -1.5)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], None),
        ([None, True], "bool"),
        ([1, None, 2], "int"),
        ([1, 0.5], "float"),
        (["a", 1], "json"),
        ([True, 1], "json"),
        ([0.5, "a", 1], "json"),
        ([2**70], "json"),
        ([{}], "json"),
    ],
)
def test_what_a_column_holds(tmp_path: Path, values: list[Any], kind: str | None) -> None:
    pytest.importorskip("pyarrow")
    lines = encoded(*(success_line("a", {}, {"c": value}) for value in values))
    shape = result_table.TableShape()
    for line in lines:
        shape.note(line)
    assert shape.kinds == {"c": kind}
    write_projection(str(tmp_path / "out.parquet"), lines)


def test_columns_of_our_names_are_renamed_and_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    columns = {"text": 1, "input_text": 2, "input_input_text": 3, "response": 4}
    write_projection(str(path), encoded(success_line("a", chat_body("x"), columns)))
    (row,) = read_csv(path)
    assert row["text"] == "x"
    assert [row[name] for name in ("input_text", "input_input_text", "input_response")] == [
        "2", "3", "4"
    ]  # fmt: skip
    assert row["input_input_input_text"] == "1"


def test_too_many_columns_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_table, "MAX_COLUMNS", 3)
    lines = encoded(*(success_line(str(n), {}, {f"c{n}": n}) for n in range(4)))
    with pytest.raises(OutputError, match=r"\.jsonl"):
        write_projection(str(tmp_path / "out.csv"), lines)


def breaking() -> Iterator[bytes]:
    yield LINES[0]
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.csv"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(OutputError, match="No space left"):
        write_projection(str(tmp_path / name), breaking())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_a_full_disk(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.jsonl.gz"):
        link = tmp_path / name
        link.symlink_to("/dev/full")
        with pytest.raises(OutputError, match="No space left"):
            write_projection(str(link), LINES * 100)


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "real" / "out.jsonl")
    write_projection(str(tmp_path / "out.jsonl"), LINES)
    assert (tmp_path / "out.jsonl").is_symlink()
    assert (tmp_path / "real" / "out.jsonl").read_bytes() == b"".join(LINES)


def test_standard_output_and_devices(capfd: pytest.CaptureFixture[str]) -> None:
    write_projection("-", iter(LINES))
    write_projection(os.devnull, iter(LINES))
    assert capfd.readouterr().out == b"".join(LINES).decode()


def test_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "out.csv"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_projection(str(pipe), iter(LINES))
    assert os.read(reader, 9) == b"custom_id"
    os.close(reader)


def test_object_stores(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    write_projection("memory://bucket/out.csv", iter(LINES))
    write_projection(str(tmp_path / "out.csv"), LINES)
    written = fsspec.filesystem("memory").cat("/bucket/out.csv")
    assert written == (tmp_path / "out.csv").read_bytes()
    with pytest.raises(OutputError, match="nonsense"):
        write_projection("nonsense://bucket/out.csv", iter(LINES))


def test_what_cannot_be_written_is_told_before_the_job() -> None:
    check_output("out.csv.gz")
    check_output("-")
    with pytest.raises(ConfigError, match="compressed inside"):
        check_output("out.parquet.gz")
    with pytest.raises(ConfigError, match="pip install"):
        check_output("s3://bucket/out.jsonl")
