"""The set of ids: exact on what is added, however it comes."""

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchwright.errors import ResourceError
from batchwright.job.formats.id_set import IdSet

any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=3)


@given(st.lists(st.lists(any_text, max_size=8)))
def test_it_behaves_as_a_set(groups: list[list[str]]) -> None:
    ids, seen = IdSet(), set()
    for names in groups:
        expected = []
        for name in names:
            expected.append(name not in seen)
            seen.add(name)
        assert ids.add(names) == expected
    ids.close()


def test_nothing_is_forgotten_or_made_up_while_it_grows() -> None:
    ids = IdSet()
    groups = [
        [f"request-{i}" for i in range(start, start + 250)] for start in range(0, 50_000, 250)
    ]
    assert all(all(ids.add(names)) for names in groups)
    assert not any(any(ids.add(names)) for names in groups)
    assert ids.add(["request-7", "new", "new", "request-49999"]) == [False, True, False, False]
    ids.close()


def test_no_room_for_its_file_is_a_clear_error() -> None:
    ids = IdSet()
    ids._sql.execute("PRAGMA max_page_count = 8")  # what a full disk comes to
    with pytest.raises(ResourceError, match="TMPDIR") as caught:
        ids.add([str(number) for number in range(10_000)])
    assert isinstance(caught.value.__cause__, sqlite3.Error)
    ids.close()
