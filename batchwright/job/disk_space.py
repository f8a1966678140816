"""Is there room for what a job writes? Answers are written twice: in the job directory and OUT."""

from __future__ import annotations

import os
import shutil

from batchwright.errors import ConfigError
from batchwright.job.formats.source import is_url

LINE_BYTES = 600
"""A line of results without its text (measured: 430 to 560), and its row in the journal."""

OUTPUT_TOKEN_BYTES = 5
"""A token of text, on average over languages that Latin letters write."""

COPIES = 2
MIN_BYTES = 1_000_000


def bytes_written(num_rows: int, num_output_tokens: int) -> int:
    """About what the answers of a job take on the disk."""
    return COPIES * (num_rows * LINE_BYTES + num_output_tokens * OUTPUT_TOKEN_BYTES)


def free_bytes(output: str) -> int | None:
    """Room where an output file lies; None if that is no disk of this machine."""
    if output == "-" or is_url(output):
        return None
    try:
        return shutil.disk_usage(os.path.dirname(output) or ".").free
    except OSError:
        return None


def check_space(output: str, need_bytes: int, why: str) -> None:
    """Refuse a job that cannot have room for its answers.

    Args:
        need_bytes: what it writes at least.
        why: where that number comes from.
    Raises:
        ConfigError: with both numbers and the remedy.
    """
    free = free_bytes(output)
    if free is not None and free < max(need_bytes, MIN_BYTES):
        raise ConfigError(
            f"{os.path.dirname(output) or '.'} has {free:,} bytes free, the job writes at least "
            f"{max(need_bytes, MIN_BYTES):,} ({why}); free some space or name an output elsewhere"
        )


def check_input_has_space(output: str, source: str) -> None:
    """Refuse a job whose answers, if they are as long as its rows, would not fit.

    Raises:
        ConfigError: see `check_space`.
    """
    size = os.path.getsize(source) if os.path.isfile(source) else 0
    check_space(output, COPIES * size, "twice the size of its input, whatever the answers are")
