"""Which reader a path gets, and bytes that are compressed, remote or damaged."""

import gzip
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from batchwright.errors import ConfigError, InputError, OutputError
from batchwright.job.formats.output import check_output, write_projection
from batchwright.job.formats.read_input import input_size, read_input
from batchwright.job.rows import InputRow, RowError

LINES = b"".join(b'{"id":"r%d","prompt":"text %d"}\n' % (n, n * n) for n in range(5000))
TABLE = b"id,prompt\n" + b"".join(b"r%d,text %d\n" % (n, n * n) for n in range(5000))


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def ids(rows: list[InputRow | RowError]) -> list[str | None]:
    return [row.custom_id for row in rows]


@pytest.mark.parametrize(
    ("name", "compress"),
    [(".gz", gzip.compress), (".ZST", zst), ("", bytes)],
    ids=["gz", "zst", "plain"],
)
@pytest.mark.parametrize(
    ("suffix", "data"),
    [(".jsonl", LINES), (".json", LINES), ("", LINES), (".csv", TABLE), (".tsv", TABLE)],
    ids=["jsonl", "json", "none", "csv", "tsv"],
)
def test_text_formats_compressed_or_not(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], suffix: str, data: bytes
) -> None:
    path = tmp_path / f"in{suffix}{name}"
    path.write_bytes(compress(data.replace(b",", b"\t") if suffix == ".tsv" else data))
    rows = list(read_input(str(path)))
    assert ids(rows) == [f"r{n}" for n in range(5000)]
    assert all(isinstance(row, InputRow) for row in rows)
    size = input_size(str(path))
    assert size == path.stat().st_size
    assert 0.99 * size <= sum(row.num_bytes for row in rows) <= size


@pytest.mark.parametrize("compress", [gzip.compress, zst], ids=["gz", "zst"])
def test_files_of_several_parts(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("in.jsonl.gz" if compress is gzip.compress else "in.jsonl.zst")
    cut = LINES.index(b"\n", len(LINES) // 2) + 1
    path.write_bytes(compress(LINES[:cut]) + compress(b"") + compress(LINES[cut:]))
    assert len(list(read_input(str(path)))) == 5000


@pytest.mark.parametrize("compress", [gzip.compress, zst], ids=["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_is_an_error(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("in.jsonl.gz" if compress is gzip.compress else "in.jsonl.zst")
    data = compress(LINES)
    for num_bytes in (1, 5, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:num_bytes])
        rows: list[InputRow | RowError] = []
        with pytest.raises(InputError, match=r"cannot read .*in\.jsonl"):
            rows.extend(read_input(str(path)))
        assert all(isinstance(row, InputRow) for row in rows)  # no line was cut in two
    path.write_bytes(b"this is not compressed at all, whatever its name says\n")
    with pytest.raises(InputError, match="cannot read"):
        list(read_input(str(path)))


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    data = bytearray(gzip.compress(LINES))
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot read"):
        list(read_input(str(path)))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    assert len(list(read_input("-"))) == 5000
    assert input_size("-") is None


def test_an_array_is_not_taken_for_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text('\n [{"prompt": "a"}]')
    with pytest.raises(InputError, match="jq"):
        list(read_input(str(path)))


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.parquet", "in.csv.gz", "in.jsonl.zst"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match=f"{name}: No such file"):
        next(read_input(str(tmp_path / name)))


def test_object_stores() -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/in.jsonl", LINES)
    store.pipe("/bucket/in.csv.zst", zst(TABLE))
    assert len(list(read_input("memory://bucket/in.jsonl"))) == 5000
    assert len(list(read_input("memory://bucket/in.csv.zst"))) == 5000
    assert input_size("memory://bucket/in.jsonl") is None
    with pytest.raises(InputError, match="cannot read memory://bucket/none"):
        next(read_input("memory://bucket/none.jsonl"))
    with pytest.raises(InputError, match="nonsense"):
        next(read_input("nonsense://bucket/in.jsonl"))


@pytest.mark.parametrize(
    ("module", "path", "command"),
    [
        ("fsspec", "s3://bucket/in.jsonl", "pip install fsspec s3fs"),
        ("s3fs", "s3://bucket/in.jsonl", "pip install fsspec s3fs"),
        ("pyarrow", "in.parquet", "pip install 'batchwright[parquet]'"),
        ("zstandard", "in.jsonl.zst", "pip install 'batchwright[zstd]'"),
    ],
)
def test_what_to_install_is_told(
    module: str, path: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    if "://" not in path:
        Path(path).touch()
    with pytest.raises(InputError, match=re.escape(command)):
        next(read_input(path))
    with pytest.raises(ConfigError, match=re.escape(command)):
        check_output(path)
    with pytest.raises(OutputError, match=re.escape(command)):
        write_projection(path, iter([]))
