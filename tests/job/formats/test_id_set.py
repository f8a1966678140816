"""The set of ids: exact on what is added, and small."""

from hypothesis import given
from hypothesis import strategies as st

from batchwright.job.formats import id_set
from batchwright.job.formats.id_set import IdSet


@given(st.lists(st.text(st.characters(codec=None, exclude_categories=()), max_size=3)))
def test_it_behaves_as_a_set(names: list[str]) -> None:
    ids, seen = IdSet(), set()
    for name in names:
        assert ids.add(name) == (name not in seen)
        seen.add(name)
    assert len(ids) == len(seen)


def test_nothing_is_forgotten_or_made_up_while_it_grows() -> None:
    ids = IdSet()
    num_ids = 50_000
    assert all(ids.add(f"request-{number}") for number in range(num_ids))
    assert not any(ids.add(f"request-{number}") for number in range(num_ids))
    assert len(ids) == num_ids
    assert ids.num_bytes < 36 * num_ids


def test_growing_keeps_hashes_that_run_over_the_end() -> None:
    table = id_set._empty(8)
    last = len(id_set._empty(12)) - 1  # all want the last slot of the table after it has grown
    hashes = [(last + 24 * number, number) for number in range(6)]
    assert all(id_set._insert(table, low | 1, high) for low, high in hashes)
    grown = id_set._grown(table)
    assert len(grown) == 24
    assert not any(id_set._insert(grown, low | 1, high) for low, high in hashes)
    assert id_set._insert(grown, hashes[0][0] | 1, 99)
