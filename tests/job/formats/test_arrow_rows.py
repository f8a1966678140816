"""Parquet and Hugging Face datasets on disk."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchwright.errors import InputError
from batchwright.job.formats.read_input import input_size, read_input
from batchwright.job.rows import InputRow, RowError
from batchwright.job.validate import parse_row

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, **columns: Any) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=100)
    return str(path)


def test_rows_in_order_over_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=[f"p{n}" for n in range(999)], n=list(range(999)))
    rows = list(read_input(path))
    assert [row.line for row in rows] == list(range(1, 1000))
    assert [row.custom_id for row in rows[:2]] == ["row-1", "row-2"]
    assert rows[500] == InputRow(
        501, "row-501", "/v1/completions", {"prompt": "p500"}, 1, {"n": 500}
    )
    assert input_size(path) == sum(row.num_bytes for row in rows) == 999


def test_a_batch_is_all_that_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "one_group.parquet"
    text = ["x" * 1000] * 50_000
    parquet.write_table(pa.table({"prompt": text}), path, use_dictionary=False, compression=None)
    assert path.stat().st_size > 50_000_000
    del text
    before = pa.total_allocated_bytes()
    for number, _ in enumerate(read_input(str(path))):
        if number % 1000 == 0:
            assert pa.total_allocated_bytes() - before < 20_000_000


def test_messages_are_lists_of_objects_without_the_nulls_of_arrow(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x", "name": "f"}]
    path = write(tmp_path / "in.parquet", messages=[messages], id=[5])
    (row,) = read_input(path)
    assert isinstance(row, InputRow)
    assert (row.custom_id, row.body["messages"]) == ("5", messages)
    parse_row(row)


def test_token_ids_and_null_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", ids=[[1, 2], None], k=["a", None], t=[0.5, None])
    good, bad = read_input(path, column=["prompt_token_ids=ids", "id=k", "temperature=t"])
    assert isinstance(good, InputRow)
    assert good.body == {"prompt_token_ids": [1, 2], "temperature": 0.5}
    assert isinstance(bad, RowError)
    assert bad.error.code == "missing_required_parameter"


def test_every_kind_of_column_passes_through_as_json(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    columns = {
        "ns": pa.array([1_767_323_045_678_901_234], pa.timestamp("ns")),
        "us": pa.array([moment], pa.timestamp("us")),
        "span": pa.array([1_500_000_001], pa.duration("ns")),
        "date": pa.array([moment.date()]),
        "money": pa.array([decimal.Decimal("1.50")]),
        "raw": pa.array([b"\xff"]),
        "word": pa.array(["a"]).dictionary_encode(),
        "nested": pa.array([{"a": [1, None]}]),
        "nan": pa.array([float("nan")]),
    }
    (row,) = read_input(write(tmp_path / "in.parquet", prompt=["x"], **columns))
    assert isinstance(row, InputRow)
    assert json.loads(msgspec.json.encode(row.extra)) == {
        "ns": "2026-01-02T03:04:05.678901",
        "us": "2026-01-02T03:04:05.678901",
        "span": "PT1.5S",
        "date": "2026-01-02",
        "money": "1.50",
        "raw": "/w==",
        "word": "a",
        "nested": {"a": [1, None]},
        "nan": None,
    }


def test_text_that_is_not_utf8_fails_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    rows = list(read_input(write(tmp_path / "in.parquet", prompt=text)))
    assert [type(row).__name__ for row in rows] == ["InputRow", "RowError", "InputRow"]
    assert rows[1].line == 2


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"{}\n"])
def test_a_file_that_is_not_parquet(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot read"):
        list(read_input(str(path)))
    with pytest.raises(InputError, match="cannot read"):
        input_size(str(path))


def test_other_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty_file"):
        list(read_input(write(tmp_path / "none.parquet", prompt=pa.array([], pa.string()))))
    with pytest.raises(InputError, match="no column 'x'; it has prompt"):
        list(read_input(write(tmp_path / "a.parquet", prompt=["a"]), template="{x}"))
    with pytest.raises(InputError, match="compressed inside"):
        list(read_input(str(tmp_path / "a.parquet.gz")))


def save_to_disk(folder: Path, *parts: dict[str, list[Any]], state: Any = None) -> str:
    """The layout that `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir()
    names = []
    for index, columns in enumerate(parts):
        names.append(f"data-{index:05d}-of-{len(parts):05d}.arrow")
        table = pa.table(columns)
        with pa.ipc.new_stream(str(folder / names[-1]), table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]} if state is None else state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    path = save_to_disk(
        tmp_path / "data", {"text": ["a"] * 600, "label": [1] * 600}, {"text": ["b"], "label": [2]}
    )
    rows = list(read_input(path, template="Say {text}"))
    assert len(rows) == 601
    assert rows[-1] == InputRow(
        601, "row-601", "/v1/completions", {"prompt": "Say b"}, 1, {"label": 2}
    )
    assert input_size(path) is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "state.json cannot be read"),
        ([], "state.json cannot be read"),
        ({"_data_files": []}, "lacks data files"),
        ({"_data_files": [{"filename": "../gone.arrow"}]}, "lacks gone.arrow"),
        ({"_data_files": [], "_indices_data_files": [{}]}, "flatten_indices"),
    ],
)
def test_a_dataset_that_is_not_whole(tmp_path: Path, state: Any, words: str) -> None:
    path = save_to_disk(tmp_path / "data", {"prompt": ["a"]}, state=state)
    with pytest.raises(InputError, match=words):
        list(read_input(path))


def test_other_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without state\.json"):
        list(read_input(str(tmp_path)))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    save_to_disk(tmp_path / "train", {"prompt": ["a"]})
    with pytest.raises(InputError, match="name one of them: train"):
        list(read_input(str(tmp_path)))
    damaged = tmp_path / "train" / "data-00000-of-00001.arrow"
    whole = damaged.read_bytes()
    for num_bytes in (len(whole) - 8, len(whole) - 60, 100, 0):
        damaged.write_bytes(whole[:num_bytes])
        with pytest.raises(InputError, match=r"cannot read|cut off"):
            list(read_input(str(tmp_path / "train")))
