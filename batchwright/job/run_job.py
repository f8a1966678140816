"""run_job: a whole job, from an input to its files, gone on with where it was left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from batchwright import __version__
from batchwright.job.answer import TokenBytes
from batchwright.job.collector import rare_collections
from batchwright.job.directory import JobDirectory
from batchwright.job.durable import write_private
from batchwright.job.events import JobEvent
from batchwright.job.feed import CHUNK_ROWS, Feed
from batchwright.job.history import finished_lengths
from batchwright.job.journal import FinishedRows, Journal, RowState
from batchwright.job.machine import this_machine
from batchwright.job.manifest import check_manifest, job_manifest
from batchwright.job.metrics import MetricsLog, RunStart, Sample
from batchwright.job.output_files import OutputFiles
from batchwright.job.prepare import Grammars, Tokenizer
from batchwright.job.rows import InputRow, RowError
from batchwright.job.runner import Job, JobEngine, JobOptions
from batchwright.job.stop import StopControl
from batchwright.job.summary import JobSummary
from batchwright.job.validate import ParsedRow
from batchwright.plan.order import OrderFunction
from batchwright.plan.shape import ModelShape
from batchwright.prompt_cache.compose import PromptSchemas


class JobModel(Protocol):
    """What a job needs of `llm.LLM`."""

    @property
    def name(self) -> str: ...
    @property
    def engine(self) -> JobEngine: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def token_bytes(self) -> TokenBytes: ...
    @property
    def grammars(self) -> Grammars | None: ...
    @property
    def shape(self) -> ModelShape | None: ...
    @property
    def order(self) -> OrderFunction:
        """In which order the engine starts rows."""

    def identity(self) -> Mapping[str, Any]:
        """What answers depend on, for the manifest."""

    def settings(self) -> Mapping[str, Any]:
        """The engine's settings, for the log."""

    def compile_s(self) -> float:
        """Seconds spent compiling kernels so far, for the log."""


@dataclass(frozen=True, slots=True)
class JobPaths:
    """Where a job writes.

    Attributes:
        output, errors: the files of rows that succeeded and failed; `-` is standard output.
        in_input_order: write the output in input order, when the job ends.
    """

    output: str
    errors: str
    in_input_order: bool = False


def run_job(
    rows: Iterator[InputRow | RowError],
    paths: JobPaths,
    directory: JobDirectory,
    model: JobModel,
    options: JobOptions,
    *,
    check: Callable[[ParsedRow], None] = lambda row: None,
    settings: Mapping[str, Any] | None = None,
    schemas: PromptSchemas | None = None,
    stop: StopControl | None = None,
    on_event: Callable[[JobEvent], None] = lambda event: None,
) -> JobSummary:
    """Run the rows that `directory` does not have an answer for, and write the files.

    Args:
        check: a further check of each row, in input order; raises RequestError.
        settings: how rows become prompts (columns, templates); part of the manifest.
        schemas: those that rows may name in prompt_cache.
    Returns:
        The summary of this run.
    Raises:
        ConfigError: the directory holds a job that was begun differently.
        InputError, OutputError: a file fails. Rows committed before are safe.
    """
    manifest = job_manifest(model.identity(), settings or {})
    resumed = check_manifest(directory.manifest_path, manifest)
    directory.note_error_file(paths.errors)
    journal = Journal(directory.path)
    metrics = MetricsLog(directory.metrics_path, now=time.perf_counter, wall=time.time)
    feed = None
    files = OutputFiles(paths.output, paths.errors, journal, in_input_order=paths.in_input_order)
    try:
        done = tuple(RowState) if options.keep_failed else (RowState.SUCCEEDED,)
        if resumed:
            journal.forget_unnamed()
        files.begin(resumed=resumed)
        feed = Feed(
            rows,
            model.tokenizer,
            grammars=model.grammars,
            schemas=schemas,
            check=check,
            finished=FinishedRows(directory.path, done),
            lengths=finished_lengths(journal.results_path) if resumed else {},
            chunk_rows=min(CHUNK_ROWS, options.horizon_rows),
        )
        metrics.start(_run_start(model, options))
        job = Job(
            feed,
            journal,
            files,
            model.engine,
            model.token_bytes,
            options,
            stop=stop or StopControl(),
            metrics=metrics,
            shape=model.shape,
            compile_s=model.compile_s,
            on_event=on_event,
        )
        event = "error"
        try:
            with rare_collections():
                summary = job.run()
            if options.keep_failed:
                counts = journal.counts()
                failures = counts[RowState.FAILED] + counts[RowState.EXPIRED]
                summary.num_failed_before = failures - summary.num_failed - summary.num_expired
            files.finish(resumed=resumed)
            event = "end"
        finally:
            last = job.log_metrics(event=event)
        write_private(directory.summary_path, _summary_json(last, summary, journal))
        return summary
    finally:
        if feed is not None:
            feed.close()
        files.close()
        metrics.close()
        journal.close()


def _run_start(model: JobModel, options: JobOptions) -> RunStart:
    return RunStart(
        engine=__version__,
        model=options.model_name,
        load_s=options.load_s,
        pid=os.getpid(),
        machine=this_machine(),
        settings=dict(model.settings()),
        shape=model.shape,
    )


def _summary_json(sample: Sample, summary: JobSummary, journal: Journal) -> bytes:
    values = {
        **msgspec.to_builtins(sample),
        "run_s": summary.run_s,
        "rows_of_all_runs": {state.value: count for state, count in journal.counts().items()},
    }
    return msgspec.json.format(msgspec.json.encode(values), indent=2)
