"""Lines in an order over the whole file: the same rows as without, in the order asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.errors import InputError
from batchwright.job.formats import arranged_lines
from batchwright.job.formats.arranged_lines import Arrangement
from batchwright.job.formats.outline import PIECE_BYTES, outline
from batchwright.job.formats.read_input import read_input
from batchwright.job.rows import InputRow, RowError
from batchwright.plan.order import OrderFunction
from batchwright.plan.orders.density import density
from batchwright.plan.orders.fcfs import fcfs
from batchwright.plan.orders.longest_first import longest_first
from batchwright.plan.orders.prefix_dfs import prefix_dfs
from batchwright.request import DEFAULT_MAX_TOKENS

FIRST = 4
TOPICS = [letter * (3 * PIECE_BYTES) for letter in "abc"]


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arranged_lines, "FIRST_ROWS", FIRST)
    monkeypatch.setattr(arranged_lines, "SECTION_ROWS", 25)


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(path: str, order: OrderFunction = fcfs) -> list[InputRow | RowError]:
    return list(read_input(path, arrangement=Arrangement(order)))


def by_line(rows: list[InputRow | RowError]) -> list[tuple[Any, ...]]:
    return sorted(
        (
            row.line,
            row.custom_id,
            row.num_bytes,
            getattr(row, "body", str(getattr(row, "error", ""))),
        )
        for row in rows
    )


def topics(count: int) -> list[Any]:
    return [{"id": f"r{n}", "prompt": TOPICS[n % 3] + f"question {n}"} for n in range(count)]


def test_rows_that_share_a_beginning_come_together(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", topics(25 + FIRST))
    rows = read(path, prefix_dfs)
    names = [row.custom_id for row in rows]
    assert names[:FIRST] == ["r0", "r1", "r2", "r3"]
    topic = [int(str(name)[1:]) % 3 for name in names[FIRST:]]
    assert topic == sorted(topic, key=[1, 2, 0].index)  # r4 comes first
    assert by_line(rows) == by_line(read(path))


def test_long_rows_of_the_whole_file_come_first(tmp_path: Path) -> None:
    limits = [10, 10, 10, 10, 5, 70, 8, 300, 1]
    rows = [{"prompt": "x", "max_tokens": limit} for limit in limits]
    path = write(tmp_path / "in.jsonl", rows)
    found = [row.body["max_tokens"] for row in read(path, longest_first)]
    assert found == [10, 10, 10, 10, 300, 70, 8, 5, 1]


def test_an_order_from_both_ends_brings_both_kinds_near(tmp_path: Path) -> None:
    long_prompts = [{"prompt": f"{n} " * 3000, "max_tokens": 1} for n in range(12)]
    long_outputs = [{"prompt": f"{n}", "max_tokens": 900} for n in range(12)]
    path = write(tmp_path / "in.jsonl", [{"prompt": "x"}] * FIRST + long_prompts + long_outputs)
    kinds = [row.body["max_tokens"] for row in read(path, density)[FIRST:]]
    assert {kinds[0], kinds[1]} == {1, 900}
    assert all(4 <= kinds[start : start + 12].count(1) <= 8 for start in range(0, 12))


def test_an_input_that_cannot_be_read_anywhere_stays_as_it_is(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in topics(40))))
    assert [row.custom_id for row in read(str(path), prefix_dfs)] == [f"r{n}" for n in range(40)]


NAMES = st.sampled_from([None, "a", "b", "line-3", "line-9", "line-9-2", "c", 7, ""])
ROWS = st.one_of(
    st.builds(
        lambda name, topic, model: {
            **({} if name is None else {"id": name}),
            **({} if model is None else {"model": model}),
            "prompt": TOPICS[topic],
        },
        NAMES,
        st.integers(0, 2),
        st.sampled_from([None, None, "m", "n"]),
    ),
    st.sampled_from(["", "   ", "{", "[]", '"x"', '{"id": 1, "custom_id": 2}', '{"body": 3}']),
)


@given(st.lists(ROWS, min_size=1, max_size=70))
def test_no_row_is_another_than_in_the_order_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = write(tmp_path_factory.mktemp("in") / "in.jsonl", [{"prompt": "first"}, *rows])
    assert by_line(read(path, prefix_dfs)) == by_line(read(path))


def test_lines_that_are_too_long_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("source", "arranged_lines"):
        monkeypatch.setattr(f"batchwright.job.formats.{module}.MAX_LINE_BYTES", 4 * PIECE_BYTES)
    rows = topics(20)
    rows[11]["prompt"] *= 5
    path = write(tmp_path / "in.jsonl", rows)
    found = read(path, prefix_dfs)
    assert by_line(found) == by_line(read(path))
    assert isinstance(found[-1], RowError) and found[-1].line == 12


@pytest.mark.parametrize("num_lost", [0, 40])
def test_a_file_that_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_lost: int
) -> None:
    monkeypatch.setattr(arranged_lines, "SECTION_ROWS", 1000)
    path = tmp_path / "in.jsonl"
    rows = read_input(write(path, topics(900)), arrangement=Arrangement(prefix_dfs))
    for _ in range(FIRST + 1):
        next(rows)
    with path.open("r+b") as file:  # in place, as few editors write
        data = file.read()
        file.seek(0)
        file.write(data if num_lost else data.replace(b"question", b"QUESTION"))
        file.truncate(len(data) - num_lost)
    with pytest.raises(InputError, match=r"in\.jsonl changed in line \d+ while it was read"):
        list(rows)


def test_a_file_that_grows_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    rows = read_input(write(path, topics(20)), arrangement=Arrangement(prefix_dfs))
    first = [next(rows) for _ in range(FIRST + 1)]
    with path.open("ab") as file:
        file.write(b'{"prompt": "late"}\n')
    assert sorted(row.line for row in (*first, *rows)) == list(range(1, 21))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "s" * 500}, {"role": "user", "content": "q"}]},
        {"input": "s" * 500},
        {"prompt_token_ids": list(range(300))},
        {"context": "s" * 500, "continuation": "x"},
    ],
)
def test_outlines_agree_where_prompts_do(body: dict[str, Any]) -> None:
    def of(body: dict[str, Any]) -> list[int]:
        return outline(InputRow(1, "a", "/v1/completions", body)).pieces

    key = next(iter(body))
    other = {**body, "seed": 5, "continuation": "y"}
    longer = body[key] + [body[key][-1]] if isinstance(body[key], list) else body[key] + "more"
    assert len(of(body)) >= 3
    assert of(other) == of(body)
    assert of({**body, key: longer})[: len(of(body)) - 1] == of(body)[:-1]
    different = ["x"] + body[key] if isinstance(body[key], list) else "x" + body[key]
    assert of({**body, key: different})[0] != of(body)[0]


@pytest.mark.parametrize("n", ["many", -1, 10**30, None, 2.5])
def test_outlines_of_rows_that_are_not_sound(n: Any) -> None:
    row = InputRow(1, "a", "/v1/completions", {"prompt": "x", "n": n, "max_tokens": n})
    assert outline(row).num_output_tokens == DEFAULT_MAX_TOKENS
