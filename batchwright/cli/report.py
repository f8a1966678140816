"""`batchwright report`: why a job was as fast as it was, as a page or as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

STDIO = "-"


def report(
    job: Annotated[
        str,
        typer.Argument(metavar="OUT", help="The job's output, or its directory OUT.job."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="By default OUT with .report.html for its suffix; JSON goes to stdout.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Write a page that explains a job's speed: time, tokens saved, the machine's ceiling.

    It may be used while the job runs. After the job, on the machine that ran it, the machine's
    fastest matrix products are measured first, which takes a few seconds.

    Exit status: 0 it was written, 2 there is no such job or the file cannot be written.
    """
    from batchwright import report as reports
    from batchwright.report.read import find_job

    directory = find_job(job)
    if output not in (None, STDIO):
        _refuse_files_of(directory, output)
    reports.measure_ceiling(directory)
    if as_json:
        text, path = _as_json(reports.report_json(directory)), output or STDIO
    else:
        text, path = reports.report_page(directory), output or page_path_for(directory)
    if path == STDIO:
        sys.stdout.write(text)
        return
    write_page(path, text)
    print(f"Report: {path}")


def page_path_for(directory: Path) -> str:
    """results.jsonl.job has results.report.html beside it."""
    from batchwright.job.directory import SUFFIX

    name = directory.name.removesuffix(SUFFIX).removesuffix(".gz").removesuffix(".zst")
    return str(directory.with_name(f"{Path(name).stem}.report.html"))


def _refuse_files_of(directory: Path, output: str) -> None:
    """A report takes the place of a file that is there, but never of the job's own.

    Raises:
        ConfigError: the report would replace OUT, the error file or one of the job directory.
    """
    from batchwright.errors import ConfigError
    from batchwright.job.directory import SUFFIX, error_file_of

    path = Path(output).resolve()
    result = directory.with_name(directory.name.removesuffix(SUFFIX))
    errors = error_file_of(directory)
    kept = [result.resolve(), *([Path(errors).resolve()] if errors else [])]
    if path in kept or path.is_relative_to(directory.resolve()):
        raise ConfigError(f"{output} belongs to the job itself; name another file for its report")


def _as_json(values: dict[str, Any]) -> str:
    import json

    return json.dumps(values, indent=2) + "\n"


def write_page(path: str, text: str) -> None:
    """Write a file that only its owner may read.

    Raises:
        OutputError: it cannot be written.
    """
    from batchwright.errors import OutputError

    def private(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    try:
        with open(path, "w", encoding="utf-8", opener=private) as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
