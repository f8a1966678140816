"""What can be known to fail before a model is loaded: files that cannot be read or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from batchwright.errors import ConfigError
from batchwright.job import select
from batchwright.job.formats.output import check_output
from batchwright.job.formats.read_input import input_size, read_input
from batchwright.job.formats.source import COMPRESSED, is_url
from batchwright.job.rows import InputRow, RowError

if TYPE_CHECKING:
    from batchwright.cli.run import RunArguments
    from batchwright.job.directory import JobDirectory

AnyRow = InputRow | RowError

STDIO = "-"


def error_path_for(output: str) -> str:
    """Where failures go by default: results.jsonl has results.errors.jsonl beside it, and
    results.csv.gz has results.errors.csv.gz."""
    if output == STDIO:
        return STDIO
    head, slash, name = output.rpartition("/")
    path = Path(name)
    packed = path.suffix if path.suffix.lower() in COMPRESSED else ""
    stem = Path(name.removesuffix(packed))
    return f"{head}{slash}{stem.stem}.errors{stem.suffix or '.jsonl'}{packed}"


def open_rows(arguments: RunArguments) -> tuple[Iterator[AnyRow], int | None]:
    """The rows a job is about, and the input's size in bytes if known.

    Raises:
        InputError: the input is missing, unreadable, or has no rows.
        ConfigError: a sample of standard input, which can be read only once.
    """
    rows = _shard_of(arguments)
    if arguments.sample is not None:
        if arguments.source == STDIO:
            raise ConfigError("--sample reads the input twice; give a file, or use --limit")
        highest = select.sample_limit(_shard_of(arguments), arguments.sample)
        rows = select.sample(rows, highest)
    if arguments.limit is not None:
        rows = islice(rows, arguments.limit)
    whole = arguments.limit is None and arguments.sample is None and arguments.shard is None
    return rows, input_size(arguments.source) if whole else None


def _shard_of(arguments: RunArguments) -> Iterator[AnyRow]:
    rows = read_input(
        arguments.source,
        column=arguments.column,
        template=arguments.template,
        endpoint=arguments.endpoint,
    )
    first = next(rows)  # raises InputError now rather than after the model is loaded
    rows = chain([first], rows)
    return rows if arguments.shard is None else select.shard(rows, *arguments.shard)


def check_existing(directory: JobDirectory, output: str, *, force: bool) -> None:
    """A job that was begun goes on; a file that no job of ours wrote is not replaced.

    Raises:
        ConfigError: the output exists and its job does not.
    """
    if force:
        directory.clear()
    else:
        check_not_foreign(directory.manifest_path, output)


def check_not_foreign(manifest_path: Path, output: str) -> None:
    """Refuse an output that exists although no job was begun that writes it.

    Raises:
        ConfigError: with the remedies.
    """
    if output == STDIO or manifest_path.exists():
        return
    if os.path.isfile(output) and os.path.getsize(output):
        raise ConfigError(
            f"{output} exists; name another file, or replace it and its error file with --force"
        )


def check_outputs(input_path: str, output: str, errors: str) -> None:
    """Refuse paths that cannot be written, and an output that is the input.

    Raises:
        ConfigError: with the path and the remedy.
    """
    for path in {output, errors} - {STDIO}:
        check_output(path)
        if is_url(path):
            continue
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
    if output != errors and os.path.realpath(output) == os.path.realpath(errors):
        raise ConfigError(f"{output} and {errors} are the same file; name it once")
