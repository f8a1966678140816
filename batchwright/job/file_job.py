"""A job from an input to its files, as `batchwright run` and `batchwright.run_file` run it.

    with FileJob(JobArguments(source="in.jsonl", output="out.jsonl")) as job:
        summary = job.run(LLM("smollm2"))

What can fail without a model fails when the FileJob is made. No signal handler is installed and
nothing is printed here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from batchwright import __version__
from batchwright.errors import ConfigError
from batchwright.job.directory import JobDirectory, job_directory_for
from batchwright.job.events import JobEvent
from batchwright.job.formats.arranged_lines import Arrangement
from batchwright.job.manifest import check_known
from batchwright.job.model_names import ModelNames
from batchwright.job.preflight import (
    STDIO,
    JobArguments,
    check_existing,
    check_outputs,
    error_path_for,
    open_rows,
)
from batchwright.job.run_job import JobModel, JobPaths, run_job
from batchwright.job.runner import JobOptions
from batchwright.job.stop import StopControl
from batchwright.job.summary import JobSummary
from batchwright.plan.auto_order import AutoOrder
from batchwright.plan.order import OrderFunction
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.prompt_cache.schema import read_schemas, schema_settings

BYTES_PER_TOKEN = 64
"""Of an input file, for one token computed: more than most have, for names and shared prefixes."""


def run_file(
    model: JobModel,
    source: str | Path | Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    stop: StopControl | None = None,
    on_event: Callable[[JobEvent], None] = lambda event: None,
    **arguments: Any,
) -> JobSummary:
    """Run a file of requests, or rows given as dicts, as `batchwright run` does.

    The job's state is kept in `{output}.job`; the same call goes on where an earlier one, or the
    command, was broken off. Bad rows fail alone and go to the error file.

    Args:
        model: an LLM that runs nothing else meanwhile.
        source: a path in any form that the command takes, or rows, each a dict as a line of a
            JSONL file has it; rows may be read only once, and are counted as lines.
        output: the result file.
        stop: ask it from `on_event` or another thread, and the job drains and returns.
        on_event: called as things happen; it must be quick and must not raise.
        arguments: fields of `job.preflight.JobArguments`: errors, column, limit, ...
    Returns:
        What became of the rows.
    Raises:
        ConfigError, InputError: the job cannot run, or not in this way.
        OutputError, ResourceError: a file fails or memory does not suffice; the same call goes on.

    Example:
        >>> from batchwright import LLM, run_file
        >>> summary = run_file(LLM("smollm2"), "in.jsonl", "out.jsonl")  # doctest: +SKIP
        >>> print(summary.num_succeeded, summary.num_failed)  # doctest: +SKIP
    """
    known = [field.name for field in fields(JobArguments)]
    if unknown := sorted(arguments.keys() - known):
        raise ConfigError(f"unknown arguments: {', '.join(unknown)}; known: {', '.join(known)}")
    source = str(source) if isinstance(source, Path) else source
    with FileJob(JobArguments(source=source, output=str(output), **arguments)) as job:
        return job.run(model, stop=stop, on_event=on_event)


class FileJob:
    """A job whose files are checked and whose directory is locked, until `close`.

    Args:
        arguments: what it is about.
        known: settings that are known before the model is, by their names in the manifest.
    Raises:
        ConfigError, InputError: the job cannot run: nothing was written.
    """

    def __init__(
        self, arguments: JobArguments, known: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self.arguments = arguments
        self.errors = arguments.errors or error_path_for(arguments.output)
        arguments.check()
        self._schemas = read_schemas(arguments.prompt_schema or [])
        check_outputs(arguments.source, arguments.output, self.errors)
        with ExitStack() as stack:
            folder: str | Path = job_directory_for(arguments.output)
            if arguments.output == STDIO:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="batchwright-"))
            self.directory = stack.enter_context(JobDirectory(folder))
            check_existing(self.directory, arguments.output, self.errors, force=arguments.force)
            if not arguments.force:
                known = {"engine": __version__, **self._row_settings(), **known}
                check_known(self.directory.manifest_path, known)
            self._arrangement = Arrangement()
            self._rows, self._input_bytes = open_rows(arguments, self._arrangement)
            self._opened = stack.pop_all()

    def run(
        self,
        model: JobModel,
        *,
        stop: StopControl | None = None,
        on_event: Callable[[JobEvent], None] = lambda event: None,
        load_s: float = 0.0,
    ) -> JobSummary:
        """Run the job, once; see `run_file`. `load_s`: seconds that loading the model took."""
        if model.engine.num_unfinished:
            raise ConfigError("this model is still running other requests; let them finish first")
        arguments = self.arguments
        self._arrangement.order = self._order_of_lines(model.order)
        if arguments.force:  # only now: what fails before costs no finished row
            self.directory.clear()
        options = JobOptions(
            model_name=model.name,
            created=int(time.time()),
            input_bytes=self._input_bytes,
            deadline_s=arguments.deadline_s,
            row_timeout_s=arguments.row_timeout_s,
            keep_failed=arguments.keep_failed,
            load_s=load_s,
        )
        names = ModelNames(model.name)
        try:
            return run_job(
                names.watch(self._rows),
                JobPaths(arguments.output, self.errors, arguments.in_input_order),
                self.directory,
                model,
                options,
                check=names.check,
                settings=self._row_settings(),
                schemas=PromptSchemas(self._schemas, model.tokenizer) if self._schemas else None,
                stop=stop,
                on_event=on_event,
            )
        finally:
            model.engine.abandon()  # rows that a stop or an error left in it

    def _order_of_lines(self, order: OrderFunction) -> OrderFunction:
        """What the feed's thread orders a long file by, while the engine runs."""
        if not isinstance(order, AutoOrder):
            return order
        order.measure_for((self._input_bytes or 0) / BYTES_PER_TOKEN)
        return order.beside_engine()

    def _row_settings(self) -> dict[str, Any]:
        return {**self.arguments.row_settings(), **schema_settings(self._schemas)}

    def close(self) -> None:
        """Let go of the job directory."""
        self._opened.close()

    def __enter__(self) -> FileJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
