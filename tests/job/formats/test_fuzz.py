"""Arbitrary input: a reader yields rows and row errors or raises InputError, and nothing else.

Everyday runs try 1,100 inputs, `-m slow` 22,000; each is a file of up to seven rows.
"""

import contextlib
import csv
import gzip
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchwright.errors import ConfigError, InputError, RequestError
from batchwright.job.formats import csv_rows, source
from batchwright.job.formats.column_map import ColumnMap, parse_columns
from batchwright.job.formats.csv_rows import read_csv
from batchwright.job.formats.openai_batch import read_json_lines
from batchwright.job.formats.output import write_projection
from batchwright.job.formats.prompt_template import parse_template
from batchwright.job.formats.read_input import read_input
from batchwright.job.formats.result_line import error_line, success_line
from batchwright.job.formats.row_names import with_names
from batchwright.job.formats.source import Source
from batchwright.job.rows import ENDPOINTS, InputRow, RowError
from batchwright.job.validate import parse_row

Rows = Iterator[InputRow | RowError]

NO_COLUMNS = ColumnMap()
MAPS = [
    NO_COLUMNS,
    parse_columns(["prompt=a", "max_tokens=b"]),
    parse_columns(["messages=a", "id=b"]),
    parse_columns(template="{a} and {b}"),
    parse_columns(["id="], "{a}", ENDPOINTS[0]),
]


def fuzz(examples: int) -> settings:
    """How a test below is run; the profile in conftest.py makes the examples the same each time."""
    return settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


EFFORT = [
    pytest.param(1, id="everyday"),
    pytest.param(20, id="thorough", marks=pytest.mark.slow),
]


def check(rows: Rows) -> int:
    """Read to the end; returns the number of rows."""
    ids: set[str] = set()
    lines: list[bytes] = []
    last = num_rows = 0
    try:
        for row in rows:
            num_rows += 1
            assert row.line > last
            last = row.line
            if isinstance(row, RowError):
                assert row.error.line == row.line
                output = error_line(row.custom_id, row.line, row.error, row.extra)
            else:
                assert row.custom_id not in ids
                ids.add(row.custom_id)
                output = success_line(row.custom_id, {}, row.extra)
                msgspec.json.encode(row.body)  # what a resumed job compares
                parse(row)
            lines.append(msgspec.json.encode(output) + b"\n")
    except InputError:
        pass
    write_projection("/dev/null", lines, kind="csv")
    return num_rows


def parse(row: InputRow) -> None:
    problem = None
    try:
        parse_row(row)
    except RequestError as error:
        problem = error
    assert problem is None or problem.line == row.line


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*ENDPOINTS, "POST", "user", "[1,2]", '{"a":1}', ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    "custom_id id method url body prompt messages input a b n max_tokens stop seed tools "
    "logit_bias prompt_token_ids context continuation role content model logprobs".split()
)
RECORDS = st.dictionaries(KEYS | st.text(max_size=2), JSON, max_size=5)
BATCH_LINES = st.fixed_dictionaries(
    {"custom_id": st.text(max_size=2), "url": st.sampled_from(ENDPOINTS), "body": RECORDS}
)
NOISE = st.binary(max_size=60) | st.sampled_from([b"", b"\xef\xbb\xbf", b"\r", b'"', b"\x00", b"{"])


def run_json(lines: list[Any], columns: ColumnMap) -> None:
    data = b"\n".join(line if isinstance(line, bytes) else dumped(line) for line in lines)
    check(with_names(read_json_lines(Source(io.BytesIO(data), "in"), columns)))


def dumped(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (ValueError, OverflowError):
        return b"{}"


@pytest.mark.parametrize("effort", EFFORT)
def test_json_lines(effort: int) -> None:
    @fuzz(400 * effort)
    @given(st.lists(RECORDS | BATCH_LINES | NOISE, max_size=6), st.sampled_from(MAPS))
    def run(lines: list[Any], columns: ColumnMap) -> None:
        run_json(lines, columns)

    run()


CELLS = st.text(max_size=6) | st.sampled_from(['"', '""', "[1,", "null", "1e999", "a\nb", "\r"])


def table(rows: list[list[str]], delimiter: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


@pytest.mark.parametrize("effort", EFFORT)
def test_csv(effort: int) -> None:
    records = st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=5)
    headers = st.sampled_from(
        [["a", "b"], ["a", "b", "prompt"], ["id", "prompt", "n"], ["messages"]]
    )

    @fuzz(400 * effort)
    @given(
        headers, records, NOISE, st.integers(0, 200), st.sampled_from(MAPS), st.sampled_from(",\t")
    )
    def run(
        header: list[str],
        rows: list[list[str]],
        noise: bytes,
        at: int,
        columns: ColumnMap,
        delimiter: str,
    ) -> None:
        data = table([header, *rows], delimiter)
        data = data[:at] + noise + data[at:]
        check(with_names(read_csv(Source(io.BytesIO(data), "in"), columns, delimiter=delimiter)))

    run()


@pytest.mark.parametrize("effort", EFFORT)
def test_damaged_compressed_files(effort: int, tmp_path: Path) -> None:
    plain = b"".join(b'{"id":"r%d","prompt":"%d"}\n' % (n, n * n) for n in range(200))
    whole = {".gz": gzip.compress(plain), ".zst": zstandard.ZstdCompressor().compress(plain)}

    @fuzz(100 * effort)
    @given(st.sampled_from([".gz", ".zst"]), st.integers(0, 10_000), NOISE, st.booleans())
    def run(suffix: str, at: int, noise: bytes, cut: bool) -> None:
        data = whole[suffix]
        at %= len(data)
        path = tmp_path / f"in.jsonl{suffix}"
        path.write_bytes(data[:at] + noise + (b"" if cut else data[at + len(noise) :]))
        check(read_input(str(path)))

    run()


@pytest.mark.parametrize("effort", EFFORT)
def test_damaged_parquet(effort: int, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.table({"a": ["x", None] * 50, "b": list(range(100))}), path)
    whole = path.read_bytes()

    @fuzz(100 * effort)
    @given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4), st.sampled_from(MAPS))
    def run(at: int, noise: bytes, columns: ColumnMap) -> None:
        at %= len(whole)
        path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
        given_columns = [f"{param}={name}" for param, name in columns.columns.items()]
        check(read_input(str(path), column=given_columns or ["prompt=a"]))

    run()


@pytest.mark.parametrize("effort", EFFORT)
def test_templates(effort: int) -> None:
    @fuzz(100 * effort)
    @given(st.text(st.sampled_from("{}ab !."), max_size=12), st.dictionaries(st.text("ab"), JSON))
    def run(text: str, cells: dict[str, Any]) -> None:
        with contextlib.suppress(ConfigError, RequestError):
            parse_template(text).fill(cells)

    run()


class Endless(io.RawIOBase):
    """Bytes without a line end, up to a size; none of them are kept."""

    def __init__(self, start: bytes, num_bytes: int, fill: bytes) -> None:
        self._start, self._left, self._fill = start, num_bytes, fill

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._left, 1000)
        data = (self._start + self._fill * size)[:size]
        self._start = self._start[size:]
        buffer[:size] = data
        self._left -= size
        return size


@pytest.mark.parametrize(
    ("start", "fill", "as_csv"),
    [
        (b'{"prompt": "', b"x", False),
        (b"", b"[", False),
        (b"prompt\n", b"x", True),
        (b'prompt\n"', b"x" * 999 + b"\n", True),
        (b'prompt\n"', b'x","y' + b"z" * 994 + b"\n", True),
        (b"prompt\n", b",", True),
    ],
)
def test_memory_is_bounded_by_the_limit_of_a_line(
    monkeypatch: pytest.MonkeyPatch, start: bytes, fill: bytes, as_csv: bool
) -> None:
    limit = 50_000
    monkeypatch.setattr(source, "MAX_LINE_BYTES", limit)
    monkeypatch.setattr(csv_rows, "MAX_LINE_BYTES", limit)
    stream = Source(io.BufferedReader(Endless(start, 3_000_000, fill)), "in")
    rows = read_csv(stream, NO_COLUMNS) if as_csv else read_json_lines(stream, NO_COLUMNS)
    tracemalloc.start()
    try:
        num_errors = sum(isinstance(row, RowError) for row in rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_errors >= 1
    assert peak < 60 * limit


def test_a_bomb_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 1_000_000)
    size = 100_000_000
    bomb = b'{"prompt":"a"}\n' + b"\0" * size
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(bomb, 1))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(bomb))
    del bomb
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 0.01 * size
        tracemalloc.start()
        try:
            rows = list(read_input(str(path)))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [type(row) for row in rows] == [InputRow, RowError]
        assert peak < 0.5 * size, path.suffix
