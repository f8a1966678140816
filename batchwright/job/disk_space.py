"""What a job writes to the disk. Answers are written twice: in the job directory and OUT."""

from __future__ import annotations

import os
import shutil

from batchwright.job.formats.source import is_url

LINE_BYTES = 600
"""A line of results without its text (measured: 430 to 560), and its row in the journal."""

OUTPUT_TOKEN_BYTES = 5
"""A token of text, on average over languages that Latin letters write."""

COPIES = 2


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
