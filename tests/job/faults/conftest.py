"""Files of these tests lie in memory where the system has such a place.

A process that ends loses what it has not handed to the kernel, wherever the files lie; waiting for
a disk would only make the tests ten times slower. What a disk can lose test_truncation cuts off.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="batchwright-faults-", dir=place) as folder:
        yield Path(folder)
