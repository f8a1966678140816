"""Small GGUF files and the embedded model, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from batchwright.weights.locate import locate_model
from tests.weights.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return locate_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> gguf.GGUFReader:
    """The embedded model through the `gguf` package's reader, which takes seconds to open it."""
    return gguf.GGUFReader(smollm2)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A whole llama GGUF of one block, under 8 KB, with every kind of metadata value."""
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def make_tiny_gguf(tmp_path: Path) -> Callable[..., Path]:
    def make(change: Callable[[gguf.GGUFWriter], None]) -> Path:
        return write_tiny_gguf(tmp_path / "changed.gguf", change)

    return make
