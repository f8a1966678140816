"""The engine's thread: runs one batch after the other, and single calls beside or between them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchwright.errors import ConfigError, GoneError, InputError, OutputError, ResourceError
from batchwright.job.answer import TokenBytes
from batchwright.job.directory import JobDirectory
from batchwright.job.events import JobEvent, Measured, Progressed
from batchwright.job.prepare import Grammars, Tokenizer
from batchwright.job.run_job import JobModel, JobPaths, run_job
from batchwright.job.runner import DRAIN_S, JobOptions
from batchwright.job.stop import StopControl
from batchwright.job.summary import JobSummary
from batchwright.plan.order import OrderFunction
from batchwright.plan.shape import ModelShape
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.server.batch_record import Batch, BatchError, Counts, Status
from batchwright.server.batches import Batches, Live
from batchwright.server.check_batch import RowChecks, batch_rows
from batchwright.server.shared_engine import STOPPING, SharedEngine
from batchwright.server.stored_files import FileStore

logger = logging.getLogger(__name__)

IDLE_S = 0.5
RETRY_S = 30.0  # after a full disk or want of memory
SHOW_S = 0.2  # between two looks at a running batch


@dataclass(frozen=True, slots=True)
class SharedModel:
    """A model whose engine is shared; satisfies `job.run_job.JobModel`."""

    model: JobModel
    engine: SharedEngine

    @property
    def name(self) -> str:
        """See JobModel."""
        return self.model.name

    @property
    def tokenizer(self) -> Tokenizer:
        """See JobModel."""
        return self.model.tokenizer

    @property
    def token_bytes(self) -> TokenBytes:
        """See JobModel."""
        return self.model.token_bytes

    @property
    def grammars(self) -> Grammars | None:
        """See JobModel."""
        return self.model.grammars

    @property
    def shape(self) -> ModelShape | None:
        """See JobModel."""
        return self.model.shape

    @property
    def order(self) -> OrderFunction:
        """See JobModel."""
        return self.model.order

    def settings(self) -> Mapping[str, Any]:
        """See JobModel."""
        return self.model.settings()

    def compile_s(self) -> float:
        """See JobModel."""
        return self.model.compile_s()

    def identity(self) -> Mapping[str, Any]:
        """See JobModel."""
        return self.model.identity()


class EngineThread:
    """Owns the engine from `start` on.

    Args:
        model: what answers; its engine is used by this thread alone.
        batches: what is to be run.
        files: where their rows are and their results go.
        model_name: written into each body.
        schemas: that rows may name in prompt_cache; `row_settings` says which, for the manifests.

    Attributes:
        gone: why it ended by itself: processes that computed are gone. Batches go on when the
            server is started again.
    """

    def __init__(
        self,
        model: SharedModel,
        batches: Batches,
        files: FileStore,
        *,
        model_name: str,
        schemas: PromptSchemas | None = None,
        row_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.gone: str | None = None
        self._model = model
        self._engine = model.engine
        self._batches = batches
        self._files = files
        self._model_name = model_name
        self._schemas, self._row_settings = schemas, row_settings
        self._num_stops = 0
        self._give_up_s = math.inf
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop: what runs is finished first, for DRAIN_S; the second time: at once."""
        if not self._num_stops:
            self._give_up_s = time.monotonic() + DRAIN_S
        self._num_stops += 1
        self._engine.refuse_calls()
        self._batches.stop()
        self._engine.arrived.set()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            while not self._num_stops and self.gone is None:
                self._engine.alive()
                if (ready := self._batches.next()) is not None:
                    self._run(*ready)
                elif self._engine.num_unfinished:
                    self._step()
                elif self._engine.arrived.wait(IDLE_S):
                    self._engine.arrived.clear()
            while self._engine.num_unfinished and self._may_drain and self.gone is None:
                self._step()
        finally:
            self._engine.close(self.gone or STOPPING)

    @property
    def _may_drain(self) -> bool:
        return self._num_stops < 2 and time.monotonic() < self._give_up_s

    def _step(self) -> None:
        """A step of single calls alone."""
        try:
            self._engine.step()
        except GoneError as error:
            self.gone = str(error)
        except Exception as error:
            logger.error("a step failed: %s", type(error).__name__)
            logger.debug("the failed step", exc_info=error)

    def _run(self, batch: Batch, stop: StopControl) -> None:
        """Run a batch as far as it goes; nothing that happens to it ends the server."""
        try:
            if (error := self._run_to_its_end(batch, stop)) is not None:
                self._batches.fail(batch.id, error)
        except Exception as error:
            logger.error("batch %s could not be ended: %s", batch.id, type(error).__name__)
            logger.debug("why it could not", exc_info=error)

    def _run_to_its_end(self, batch: Batch, stop: StopControl) -> BatchError | None:
        """Note what became of a batch; returns why it has failed, if it has."""
        id = batch.id
        try:
            summary = self._run_job(batch, stop)
            codes = dict(summary.error_codes)
            expired = "batch_expired" in codes
            self._batches.finish(id, stopped=summary.stopped, expired=expired, error_codes=codes)
        except GoneError as error:
            self.gone = str(error)
            self._batches.put_back(id, self.gone, None)
        except (OutputError, ResourceError) as error:
            logger.warning("batch %s waits %.0f s: %s", id, RETRY_S, error)
            self._batches.put_back(id, str(error), RETRY_S)
        except ConfigError as error:
            logger.warning("batch %s is not run: %s", id, error)
            self._batches.put_back(id, _held_reason(error), None)
        except InputError as error:
            logger.warning("batch %s has failed: %s", id, error)
            return BatchError("invalid_file", "the input file cannot be read any more")
        except Exception as error:
            logger.error("batch %s has failed: %s", id, type(error).__name__)
            logger.debug("the batch that failed", exc_info=error)
            return BatchError("internal_error", "the server failed to run the batch")
        return None

    def _run_job(self, batch: Batch, stop: StopControl) -> JobSummary:
        source = self._files.path(batch.input_file_id)
        if not source.exists():
            raise InputError("the file is gone")
        options = JobOptions(
            model_name=self._model_name,
            created=batch.at[Status.VALIDATING.value],
            input_bytes=source.stat().st_size,
            deadline_s=batch.expires_at - time.time(),
        )
        paths = JobPaths(
            str(self._files.path(batch.output_file_id)), str(self._files.path(batch.error_file_id))
        )
        checks = RowChecks(batch.endpoint, self._model_name)
        try:
            with JobDirectory(self._batches.job_path(batch.id)) as directory:
                return run_job(
                    checks.watch(batch_rows(source)),
                    paths,
                    directory,
                    self._model,
                    options,
                    check=checks.check,
                    settings=self._row_settings,
                    schemas=self._schemas,
                    stop=stop,
                    on_event=self._watch(batch),
                )
        finally:
            self._engine.abandon()

    def _watch(self, batch: Batch) -> Any:
        next_s = 0.0

        def on_event(event: JobEvent) -> None:
            nonlocal next_s
            if isinstance(event, Measured):
                self._batches.measured = {batch.id: event.sample}
            if not isinstance(event, Progressed):
                return
            self._engine.alive()
            now_s = time.monotonic()
            if now_s >= next_s:
                next_s = now_s + SHOW_S
                self._batches.live[batch.id] = _live(event.summary, batch.counts.total)

        return on_event


def _live(summary: JobSummary, total: int) -> Live:
    counts = Counts(
        total=total,
        completed=summary.num_skipped + summary.num_succeeded,
        failed=summary.num_failed + summary.num_expired,
    )
    return Live(counts, dict(summary.error_codes), summary.eta_s)


def _held_reason(error: ConfigError) -> str:
    return (
        f"{error}. Start the server with what the batch was begun with, or cancel the batch: "
        "finished rows are kept"
    )
