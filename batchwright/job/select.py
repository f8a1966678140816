"""Parts of an input: the first rows, a sample, one shard of many.

Rows are chosen by a hash of their custom_id, so the choice does not depend on their order, and a
row is in the same shard whoever asks.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

from batchwright.job.rows import InputRow, RowError

AnyRow = InputRow | RowError


def shard(rows: Iterator[AnyRow], index: int, num_shards: int) -> Iterator[AnyRow]:
    """Rows of shard `index` of `num_shards`, counted from 0; together the shards have each once."""
    return (row for row in rows if _hash(row) % num_shards == index)


def sample_limit(rows: Iterator[AnyRow], num_rows: int) -> int:
    """Reads all rows to find the hash below or at which `num_rows` of them lie."""
    largest_first: list[int] = []
    for row in rows:
        value = -_hash(row)
        if len(largest_first) < num_rows:
            heapq.heappush(largest_first, value)
        else:
            heapq.heappushpop(largest_first, value)
    return -largest_first[0] if largest_first else -1


def sample(rows: Iterator[AnyRow], limit: int) -> Iterator[AnyRow]:
    """The rows that `sample_limit` counted, in input order."""
    return (row for row in rows if _hash(row) <= limit)


def _hash(row: AnyRow) -> int:
    name = row.custom_id if isinstance(row, InputRow) else f"\0{row.line}"
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
