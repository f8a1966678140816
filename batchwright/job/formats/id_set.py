"""A set of ids in bounded memory, however many and however long they are.

Only 128-bit hashes are kept, so two different ids could be taken for the same: among n ids with
probability n^2 / 2^129, 1e-27 for a million and 1e-21 for a billion.

The hashes lie in a private SQLite table, which is in memory while it is small (about 50,000 ids)
and then goes to a temporary file without a name, about 60 bytes an id. Ids are added many at a
time: one statement does it, outside of the interpreter's lock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from batchwright.errors import ResourceError

_CACHE_KIB = 4096
_PREPARE = f"""
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -{_CACHE_KIB};
CREATE TABLE ids (hash TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
"""
_ADD = "INSERT OR IGNORE INTO ids SELECT value, ? + key FROM json_each(?)"
_NUMBERS = """
SELECT json_group_array(number) FROM ids WHERE hash IN (SELECT value FROM json_each(?))
"""


class IdSet:
    """Strings that were added; there is no way to list them. Threads may take turns with it."""

    def __init__(self) -> None:
        self._sql = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._sql.executescript(_PREPARE)
        self._num_given = 0  # each id that was given has a number

    def add(self, names: Sequence[str]) -> list[bool]:
        """Add strings; returns whether each is new (of equal ones, the first).

        Raises:
            ResourceError: there is no room for a temporary file.
        """
        hashes = msgspec.json.encode([_hash(name) for name in names]).decode()
        first = self._num_given
        self._num_given += len(names)
        try:
            if self._sql.execute(_ADD, (first, hashes)).rowcount == len(names):
                return [True] * len(names)
            (found,) = self._sql.execute(_NUMBERS, (hashes,)).fetchone()
        except sqlite3.Error as error:
            raise ResourceError(
                f"the ids of the rows need a temporary file, about 60 bytes a row: {error}; set "
                "TMPDIR to a directory with room for it"
            ) from error
        holders = set(msgspec.json.decode(found))  # numbers of those that came first
        return [number in holders for number in range(first, self._num_given)]

    def close(self) -> None:
        """Give the memory and the file back."""
        self._sql.close()


def _hash(name: str) -> str:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
