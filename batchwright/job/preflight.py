"""What a job is about, and what can be known to fail before a model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from batchwright.errors import ConfigError
from batchwright.job import select
from batchwright.job.directory import JobDirectory
from batchwright.job.formats.arranged_lines import Arrangement
from batchwright.job.formats.output import check_output
from batchwright.job.formats.read_input import input_size, read_input
from batchwright.job.formats.row_objects import read_objects
from batchwright.job.formats.source import COMPRESSED, explained, file_system, is_url
from batchwright.job.rows import InputRow, RowError

AnyRow = InputRow | RowError

STDIO = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobArguments:
    """What the command line, or a caller from Python, says about a job.

    Attributes:
        source: the input's path, or rows as dicts.
        output, errors: where results and failures go; by default errors lie beside the output.
        column, template, endpoint: how rows of tables become prompts; docs/formats.md.
        prompt_schema: files of schemas that rows name; docs/prompt_cache.md.
        force: start over: forget the job and replace its files.
        in_input_order: write the output in input order, when the job ends.
        keep_failed: do not run rows again that failed before.
        limit: only the first so many rows.
        sample: only so many rows, chosen by their ids.
        shard: (index, number of parts): only that part, counted from 0; rows are divided by ids.
        deadline_s: rows that are not done so long after the start expire.
        row_timeout_s: a row that has run for so long expires.
    """

    source: str | Iterable[Mapping[str, Any]]
    output: str
    errors: str | None = None
    column: list[str] | None = None
    template: str | None = None
    endpoint: str | None = None
    prompt_schema: list[str] | None = None
    force: bool = False
    in_input_order: bool = False
    keep_failed: bool = False
    limit: int | None = None
    sample: int | None = None
    shard: tuple[int, int] | None = None
    deadline_s: float = math.inf
    row_timeout_s: float = math.inf

    def check(self) -> None:
        """Look for impossible and contradicting values.

        Raises:
            ConfigError: what is wrong.
        """
        for name in ("limit", "sample"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self.limit is not None and self.sample is not None:
            raise ConfigError("limit and sample exclude each other")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise ConfigError(
                f"shard is {self.shard}; it must be (index, number of parts), counted from 0"
            )

    def row_settings(self) -> dict[str, Any]:
        """How rows become prompts, for the manifest."""
        return {"column": self.column, "template": self.template, "endpoint": self.endpoint}


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


def open_rows(
    arguments: JobArguments, arrangement: Arrangement | None = None
) -> tuple[Iterator[AnyRow], int | None]:
    """The rows a job is about, and the input's size in bytes if known.

    Args:
        arrangement: see `read_input`; of a limited number of rows the first ones are meant, so
            these come as they stand.
    Raises:
        InputError: the input is missing, unreadable, or has no rows.
        ConfigError: a sample of an input that can be read only once, such as standard input.
    """
    source = arguments.source
    rows = _shard_of(arguments, arrangement if arguments.limit is None else None)
    if arguments.sample is not None:
        if isinstance(source, Iterator) or source == STDIO or _is_pipe(source):
            raise ConfigError("a sample reads the input twice; give a file, or use limit")
        highest = select.sample_limit(_shard_of(arguments), arguments.sample)
        rows = select.sample(rows, highest)
    if arguments.limit is not None:
        rows = islice(rows, arguments.limit)
    whole = arguments.limit is None and arguments.sample is None and arguments.shard is None
    if not whole or not isinstance(source, str):
        return rows, None
    return rows, input_size(source)


def _is_pipe(source: object) -> bool:
    return isinstance(source, str) and os.path.exists(source) and Path(source).is_fifo()


def _shard_of(arguments: JobArguments, arrangement: Arrangement | None = None) -> Iterator[AnyRow]:
    source, settings = arguments.source, arguments.row_settings()
    if isinstance(source, str):
        rows = read_input(source, **settings, arrangement=arrangement)
    else:
        rows = read_objects(source, **settings)
    first = next(rows)  # raises InputError now rather than after the model is loaded
    rows = chain([first], rows)
    return rows if arguments.shard is None else select.shard(rows, *arguments.shard)


def check_existing(directory: JobDirectory, output: str, errors: str, *, force: bool) -> None:
    """A job that was begun goes on; files that no job of ours wrote are not replaced.

    Raises:
        ConfigError: the output or the error file exists and is not the job's.
    """
    if output == STDIO or force:
        return
    if directory.manifest_path.exists():
        ours = directory.error_file or error_path_for(output)
        if errors not in (STDIO, output) and not _is_same(errors, ours) and _has_content(errors):
            raise ConfigError(f"{errors} exists and is not this job's; name another --error-file")
    else:
        check_not_foreign(directory.manifest_path, output, errors)


def check_not_foreign(manifest_path: Path, output: str, errors: str) -> None:
    """The same without a job directory at hand; nothing is written."""
    if output == STDIO or manifest_path.exists():
        return
    for path in (output, errors):
        if _has_content(path):
            raise ConfigError(
                f"{path} exists; name another file, or replace output and error file with --force"
            )


def _is_same(path: str, other: str) -> bool:
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def _has_content(path: str) -> bool:
    if is_url(path):
        with explained(path, path):
            system, remote = file_system(path)
            return bool(system.isfile(remote) and system.size(remote))
    return os.path.isfile(path) and os.path.getsize(path) > 0


def check_outputs(source: str | Iterable[Any], output: str, errors: str) -> None:
    """Refuse paths that cannot be written, and an output that is the input.

    Raises:
        ConfigError: with the path and the remedy.
    """
    for path in {output, errors} - {STDIO}:
        if not path:
            raise ConfigError("a path of the output or the error file is empty; name a file")
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
        if isinstance(source, str) and os.path.exists(source) and os.path.samefile(path, source):
            raise ConfigError(f"{path} is the input; write the results to another file")
    if output != errors and os.path.realpath(output) == os.path.realpath(errors):
        raise ConfigError(f"{output} and {errors} are the same file; name it once")
