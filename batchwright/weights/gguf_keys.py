"""Typed, checked access to the metadata keys of one GGUF architecture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from batchwright.errors import ModelFormatError, UnsupportedModelError

MAX_COUNT = 1 << 31
"""No dimension of a model is larger; keeps nonsense out of allocations."""


class ArchitectureKeys:
    """The keys `ARCHITECTURE.name` of a file's metadata, asked for by `name`.

    Every method raises ModelFormatError for a value of the wrong kind or range, and
    UnsupportedModelError for one value per layer.
    """

    def __init__(self, path: Path, architecture: str, metadata: dict[str, Any]) -> None:
        self.path = path
        self.architecture = architecture
        self.metadata = metadata

    def _get(self, name: str) -> Any:
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key)
        if isinstance(value, (np.ndarray, list)):
            raise UnsupportedModelError(
                f"{self.path}: unsupported: {key!r} has one value per layer; "
                "supported: one value for all layers"
            )
        return value

    def _missing(self, name: str) -> NoReturn:
        raise ModelFormatError(
            f"{self.path}: metadata key '{self.architecture}.{name}' is missing or 0; "
            "convert the model again"
        )

    def _bad(self, name: str, value: Any, expected: str) -> ModelFormatError:
        return ModelFormatError(
            f"{self.path}: metadata key '{self.architecture}.{name}' is {str(value)[:60]}, "
            f"expected {expected}; the file is damaged, fetch it again"
        )

    def count(self, name: str, default: int | None = None) -> int:
        """Return an integer in [1, MAX_COUNT); without a default the key must be there."""
        value = self.optional_count(name) or default
        return value if value is not None else self._missing(name)

    def optional_count(self, name: str) -> int | None:
        """Return an integer in [1, MAX_COUNT), or None if the key is absent or 0."""
        value = self._get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_COUNT:
            raise self._bad(name, value, f"an integer from 1 to {MAX_COUNT - 1}")
        return value or None

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number; without a default the key must be there."""
        value = self.optional_number(name)
        if value is None:
            value = default
        return value if value is not None else self._missing(name)

    def optional_number(self, name: str) -> float | None:
        """Return a positive finite number, or None if the key is absent."""
        value = self._get(name)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self._bad(name, value, "a positive number")
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._bad(name, value, "text")
        return value
