"""What can be known to fail before a model is loaded: files that cannot be read or written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from batchwright.errors import ConfigError, InputError
from batchwright.job.formats.openai_batch import read_rows, read_stream
from batchwright.job.rows import InputRow, RowError

STDIO = "-"


def error_path_for(output: str) -> str:
    """Where failures go by default: results.jsonl has results.errors.jsonl beside it."""
    if output == STDIO:
        return STDIO
    path = Path(output)
    return str(path.with_name(f"{path.stem}.errors{path.suffix or '.jsonl'}"))


def open_input(path: str) -> tuple[Iterator[InputRow | RowError], int | None]:
    """The rows of a file or of standard input, and the input's size in bytes if known.

    Raises:
        InputError: it is missing, unreadable, or has no rows.
    """
    if path == STDIO:
        rows, num_bytes = read_stream(sys.stdin.buffer, "standard input"), None
    else:
        if os.path.isdir(path):
            raise InputError(f"{path} is a directory; give a JSONL file")
        rows = read_rows(path)
        num_bytes = os.path.getsize(path) if os.path.isfile(path) else None
    first = next(rows)  # raises InputError now rather than after the model is loaded
    return chain([first], rows), num_bytes


def check_outputs(input_path: str, output: str, errors: str, *, force: bool) -> None:
    """Refuse paths that cannot be written, and files that would be lost.

    Raises:
        ConfigError: with the path and the remedy.
    """
    for path in {output, errors} - {STDIO}:
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path):
            raise ConfigError(f"{path} is a directory; name a file in it")
        if not os.path.isdir(folder):
            raise ConfigError(f"there is no directory {folder}; create it first: mkdir -p {folder}")
        if not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise ConfigError(f"{path} cannot be written; check the permissions")
        if not os.path.exists(path):
            continue
        if input_path != STDIO and os.path.samefile(path, input_path):
            raise ConfigError(f"{path} is the input; write the results to another file")
        if os.path.isfile(path) and os.path.getsize(path) and not force:
            raise ConfigError(
                f"{path} exists; name another file, or replace it and its error file with --force"
            )
    if output != errors and os.path.realpath(output) == os.path.realpath(errors):
        raise ConfigError(f"{output} and {errors} are the same file; name it once")
