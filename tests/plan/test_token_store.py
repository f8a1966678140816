"""The token store: the same in memory and on disk, full disks, no file left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from batchwright.errors import ResourceError
from batchwright.plan import token_store
from batchwright.plan.token_store import TokenStore

ROWS = [np.arange(n, dtype=np.int32) for n in (3, 0, 5, 1, 200, 7)]


@pytest.mark.parametrize("spill_bytes", [10**9, 16, 0], ids=["memory", "after some", "at once"])
def test_rows_come_back(spill_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "WRITE_BYTES", 40)
    with TokenStore(spill_bytes, str(tmp_path)) as store:
        for row in ROWS:
            store.append(row)
        assert store.is_spilled == (spill_bytes < 10**9)
        assert len(store) == len(ROWS)
        assert store.num_tokens == sum(map(len, ROWS))
        assert store.offsets.tolist() == [0, 3, 3, 8, 9, 209, 216]
        assert (store.tokens() == np.concatenate(ROWS)).all()
        assert list(tmp_path.iterdir()) == []  # the file has no name
        store.append(ROWS[0])  # it goes on after it was read
        assert (store.tokens()[-3:] == ROWS[0]).all()


def test_it_stays_in_memory_up_to_the_threshold() -> None:
    with TokenStore(spill_bytes=32) as store:
        store.append(np.zeros(8, np.int32))
        assert not store.is_spilled
        store.append(np.zeros(1, np.int32))
        assert store.is_spilled


def test_the_file_is_given_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with TokenStore(0, str(tmp_path)) as store:
        store.append(ROWS[2])
        tokens = store.tokens()
        assert len(os.listdir("/proc/self/fd")) > before
    assert tokens.tolist() == [0, 1, 2, 3, 4]  # arrays handed out stay valid
    del tokens
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with TokenStore(0, str(tmp_path)) as store:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ResourceError, match=r"20 bytes of tokens.*No space.*TMPDIR"):
            store.append(ROWS[2])


def test_no_directory_for_the_file(tmp_path: Path) -> None:
    store = TokenStore(0, str(tmp_path / "missing"))
    with pytest.raises(ResourceError, match="missing"):
        store.append(ROWS[2])
