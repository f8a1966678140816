"""The journal: what was committed stays, what was not is gone, whatever happens between."""

from pathlib import Path

import pytest

from batchwright.job import journal as journal_module
from batchwright.job.journal import (
    ANY_CONTENT,
    MAX_PENDING_ROWS,
    MAX_PENDING_S,
    FinishedRows,
    Journal,
    RowState,
    file_system,
    named_row,
    unnamed_row,
)

DONE = (RowState.SUCCEEDED,)


def add(journal: Journal, *ids: str, state: RowState = RowState.SUCCEEDED) -> None:
    for id in ids:
        journal.append(id, int(id), state, id.encode(), f"line {id}\n".encode())


def stored(journal: Journal, *, in_input_order: bool = False) -> list[bytes]:
    lines = journal.lines(tuple(RowState), in_input_order=in_input_order)
    return [data for _, data in lines]


def test_committed_rows_are_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "3", "1")
    add(journal, "2", state=RowState.FAILED)
    assert stored(journal) == []
    assert [entry.id for entry, _ in journal.commit()] == ["3", "1", "2"]
    journal.close()
    journal = Journal(tmp_path)
    assert stored(journal) == [b"line 3\n", b"line 1\n", b"line 2\n"]
    assert stored(journal, in_input_order=True) == [b"line 1\n", b"line 2\n", b"line 3\n"]
    assert journal.counts() == {
        RowState.SUCCEEDED: 2,
        RowState.FAILED: 1,
        RowState.EXPIRED: 0,
    }
    finished = FinishedRows(tmp_path)
    assert finished.among(["1", "2", "4"]) == {"1": b"1"}
    finished.close()
    journal.close()


def test_what_was_not_committed_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "1")
    journal.commit()
    add(journal, "2")
    journal.close()
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b"line 2\nline ")  # written, the transaction was not
    journal = Journal(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == b"line 1\n"
    add(journal, "3")
    journal.commit()
    assert stored(journal) == [b"line 1\n", b"line 3\n"]
    journal.close()


def test_a_row_that_runs_again_has_one_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "1", state=RowState.FAILED)
    add(journal, "2")
    journal.commit()
    journal.append("1", 1, RowState.SUCCEEDED, b"", b"better\n")
    journal.commit()
    assert stored(journal) == [b"line 2\n", b"better\n"]
    journal.close()


def test_a_commit_is_due_by_rows_or_by_time(tmp_path: Path) -> None:
    now_s = 100.0
    journal = Journal(tmp_path, now=lambda: now_s)
    assert not journal.is_due
    add(journal, *map(str, range(MAX_PENDING_ROWS - 1)))
    assert not journal.is_due
    add(journal, "9999")
    assert journal.is_due
    journal.commit()
    assert not journal.is_due
    add(journal, "10000")
    now_s += MAX_PENDING_S
    assert journal.is_due
    journal.close()


def test_odd_ids_do_not_collide(tmp_path: Path) -> None:
    names = ["\0line-1", "\1\0line-1", "\1", "", "line-1", "é" * 1000]
    ids = [named_row(name) for name in names] + [unnamed_row(1)]
    assert len(set(ids)) == len(ids)
    journal = Journal(tmp_path)
    for line, id in enumerate(ids):
        journal.append(id, line, RowState.FAILED, b"", b"x\n")
    journal.commit()
    journal.forget_unnamed()
    kept = [entry.id for entry, _ in journal.lines(tuple(RowState))]
    assert sorted(kept) == sorted(named_row(name) for name in names)
    journal.close()


@pytest.mark.parametrize("num_bytes", range(1, 8))
def test_a_results_file_that_lost_its_end_costs_its_last_row(
    tmp_path: Path, num_bytes: int
) -> None:
    journal = Journal(tmp_path)
    add(journal, "1", "2")
    journal.commit()
    journal.close()
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-num_bytes])
    journal = Journal(tmp_path)
    assert stored(journal) == [b"line 1\n"]
    add(journal, "3")
    journal.commit()
    assert stored(journal) == [b"line 1\n", b"line 3\n"]
    journal.close()


@pytest.mark.parametrize("damage", [b"", b"not a database, not at all " * 100])
def test_a_damaged_database_is_made_again_from_the_lines(tmp_path: Path, damage: bytes) -> None:
    journal = Journal(tmp_path)
    lines = [b'{"custom_id":"%s","error":null}\n' % name for name in (b"a", b"b", b"a")]
    failed = b'{"custom_id":"c","error":{}}\n'
    for line in (*lines, failed):
        journal.append("x", 1, RowState.SUCCEEDED, b"12345678", line)
    journal.commit()
    journal.close()
    for path in tmp_path.glob("journal.sqlite*"):
        path.write_bytes(damage)
    journal = Journal(tmp_path)
    assert stored(journal) == lines[1:]
    finished = FinishedRows(tmp_path)
    assert finished.among(["a", "b", "c"]) == {"a": ANY_CONTENT, "b": ANY_CONTENT}
    finished.close()
    journal.close()


def test_files_are_private(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "1")
    journal.commit()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    journal.close()
    assert modes.keys() >= {"results.jsonl", "journal.sqlite"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("kind", "mode"), [("ext4", "wal"), ("nfs4", "truncate"), ("", "truncate")]
)
def test_network_file_systems_get_no_write_ahead_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    monkeypatch.setattr(journal_module, "file_system", lambda path: kind)
    sql = journal_module.connect(tmp_path)
    assert sql.execute("PRAGMA journal_mode").fetchone() == (mode,)
    assert sql.execute("PRAGMA synchronous").fetchone() == (2,)
    sql.close()


def test_the_file_system_is_told_by_the_longest_mount_point() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) not in ("", "proc")
