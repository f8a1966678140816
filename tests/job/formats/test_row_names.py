"""Each name is given to one row, also across groups; groups are bounded in rows and bytes."""

from collections.abc import Iterator

import pytest

from batchwright.errors import InputError, RequestError
from batchwright.job import rows as job_rows
from batchwright.job.formats import row_names
from batchwright.job.formats.row_names import with_names
from batchwright.job.rows import COMPLETIONS, UNNAMED, AnyRow, InputRow, RowError, groups


def row(line: int, name: str = UNNAMED, memory_bytes: int = 0) -> InputRow:
    return InputRow(line, name, COMPLETIONS, {}, 1, {"column": line}, memory_bytes)


def named(*given: AnyRow) -> list[str | None]:
    out = list(with_names(iter(given)))
    assert [row.line for row in out] == [row.line for row in given]
    for row_out in out:
        assert row_out.extra == {"column": row_out.line}
        if isinstance(row_out, RowError) and row_out.error.code == "duplicate_custom_id":
            assert row_out.error.line == row_out.line
    return [f"!{row.custom_id}" if isinstance(row, RowError) else row.custom_id for row in out]


@pytest.fixture(params=[1, 2, 256], autouse=True)
def group_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_names, "GROUP_ROWS", request.param)


def test_rows_keep_their_names_and_get_those_they_lack() -> None:
    assert named(row(1, "a"), row(2), row(5), row(6, "b")) == ["a", "line-2", "line-5", "b"]


def test_a_name_goes_to_the_first_that_gives_it() -> None:
    assert named(row(1, "a"), row(2, "b"), row(3, "a"), row(4, "a"), row(5, "c")) == [
        *("a", "b", "!a", "!a", "c"),
    ]


def test_an_automatic_name_gives_way() -> None:
    assert named(row(1, "line-3"), row(2, "line-3-2"), row(3), row(4)) == [
        *("line-3", "line-3-2", "line-3-3", "line-4"),
    ]
    assert named(row(1), row(2, "line-1")) == ["line-1", "!line-1"]


def test_bad_rows_take_their_names_too() -> None:
    def bad(line: int, name: str | None) -> RowError:
        return RowError(line, name, RequestError("bad", line=line), 1, {"column": line})

    found = named(bad(1, "a"), row(2, "a"), bad(3, None), bad(4, None), bad(5, UNNAMED))
    assert found == ["!a", "!a", "!None", "!None", "!line-5"]


def test_groups_are_bounded_in_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_rows, "GROUP_BYTES", 10)
    sizes = [1, 1, 1, 9, 2, 100, 0, 10, 3]
    given = [row(line, memory_bytes=size) for line, size in enumerate(sizes)]
    found = [[r.line for r in group] for group in groups(iter(given), 3)]
    assert found == [[0, 1, 2], [3, 4], [5], [6, 7], [8]]


def test_rows_before_an_error_of_the_input_come_before_it() -> None:
    def broken() -> Iterator[AnyRow]:
        yield row(1, "a")
        yield row(2, "b")
        raise InputError("gone")

    rows = with_names(broken())
    assert [next(rows).custom_id, next(rows).custom_id] == ["a", "b"]
    with pytest.raises(InputError, match="gone"):
        next(rows)


def test_it_reads_no_further_than_a_group_ahead() -> None:
    num_read = 0

    def counted() -> Iterator[AnyRow]:
        nonlocal num_read
        for line in range(1, 1000):
            num_read += 1
            yield row(line)

    next(with_names(counted()))
    assert num_read == row_names.GROUP_ROWS
