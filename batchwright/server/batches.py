"""Batches: their records, the order they run in, and what ends them without the engine.

Who may change what: HTTP threads create and cancel, the checking thread puts checked batches in
the queue, the engine's thread takes them out and ends them. `_lock` makes taking, cancelling and
ending exclude each other; records have their own lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchwright.errors import BatchwrightError, OutputError
from batchwright.job.directory import JobDirectory
from batchwright.job.journal import Journal, RowState, count_states, read_only
from batchwright.job.metrics import Sample
from batchwright.job.output_files import OutputFiles
from batchwright.job.stop import StopControl
from batchwright.server.api_error import ApiError, busy, not_found
from batchwright.server.batch_record import Batch, BatchError, Counts, Status
from batchwright.server.check_batch import RowChecks, check_file
from batchwright.server.records import Records, new_id
from batchwright.server.settings import MAX_UNFINISHED_BATCHES
from batchwright.server.stored_files import FileStore, StoredFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Live:
    """How the batch that runs stands."""

    counts: Counts
    error_codes: dict[str, int]
    eta_s: float | None = None


class Batches:
    """See the module docstring.

    Args:
        directory: of the records `ID.json` and the job directories `ID.job`.
        files: inputs and results.
        model_name: the model that runs all of them.
        wake: called when there may be a batch to run.
    """

    def __init__(
        self, directory: Path, files: FileStore, *, model_name: str, wake: Callable[[], None]
    ) -> None:
        self.records: Records[Batch] = Records(directory, "batch_", Batch)
        self._files = files
        self._model_name = model_name
        self._wake = wake
        self._checker = ThreadPoolExecutor(1, "batch-check")
        self._lock = threading.Lock()
        self._queue: deque[str] = deque()
        self._running: tuple[str, StopControl] | None = None
        self._is_stopping = False
        self.live: dict[str, Live] = {}
        self.measured: dict[str, Sample] = {}  # of the batch that runs, or ran last
        self.held: dict[str, str] = {}  # why batches that are not ended do not run
        self._retry_at_s = 0.0

    def start(self) -> None:
        """Go on with what an earlier process left."""
        unfinished = [batch for batch in self.records.all() if not batch.has_ended]
        self._files.sweep(
            {b.output_file_id for b in unfinished} | {b.error_file_id for b in unfinished}
        )
        for batch in unfinished:
            if batch.status is Status.VALIDATING:
                self._checker.submit(self._check, batch.id)
            elif batch.status is Status.CANCELLING:
                self._end_unrun(batch.id)
            else:
                self.live[batch.id] = Live(self._counts_on_disk(batch), batch.error_codes)
                self._queue.append(batch.id)

    @property
    def running_id(self) -> str | None:
        """The batch that runs."""
        running = self._running
        return None if running is None else running[0]

    def job_path(self, id: str) -> Path:
        """The job directory of a batch."""
        return self.records.directory / f"{id}.job"

    def has_report(self, id: str) -> bool:
        """Whether there is a batch with this id that has begun to run."""
        return self.records.get(id) is not None and (self.job_path(id) / "metrics.jsonl").exists()

    # From HTTP -----------------------------------------------------------------------------------

    def create(self, batch: Batch) -> Batch:
        """Keep a new batch and have it checked.

        Raises:
            ApiError: too many are unfinished.
            OutputError: the disk fails.
        """
        num_unfinished = sum(not other.has_ended for other in self.records.all())
        if num_unfinished >= MAX_UNFINISHED_BATCHES:
            raise busy(f"{num_unfinished} batches are unfinished; wait until some are done")
        self.records.add(batch)
        self._checker.submit(self._check, batch.id)
        return batch

    def new(
        self, endpoint: str, file: StoredFile, window: str, window_s: int, metadata: Any
    ) -> Batch:
        """The record of a batch that is made now."""
        now = int(time.time())
        return Batch(
            id=new_id("batch_"),
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=window,
            expires_at=now + window_s,
            output_file_id=new_id("file-"),
            error_file_id=new_id("file-"),
            model=self._model_name,
            metadata=metadata,
            at={Status.VALIDATING.value: now},
        )

    def cancel(self, id: str) -> Batch:
        """Stop a batch; what is finished is kept.

        Raises:
            ApiError: there is none (404), or it has ended (409).
        """
        with self._lock:
            batch = self.records.get(id)
            if batch is None:
                raise not_found("batch", id)
            if batch.has_ended:
                raise ApiError(
                    409,
                    f"the batch is {batch.status.value}; it cannot be cancelled",
                    code="conflict",
                )
            if batch.status is not Status.CANCELLING:
                batch = self._reach(id, Status.CANCELLING)
                if self._running is not None and self._running[0] == id:
                    _request(self._running[1])
                    return batch
            elif self._running is not None and self._running[0] == id:
                return batch
            with suppress(ValueError):
                self._queue.remove(id)
            return self._end_unrun(id)

    def uses(self, file: StoredFile) -> Batch | None:
        """A batch that needs a file and has not ended."""
        for batch in self.records.all():
            if batch.input_file_id == file.id and not batch.has_ended:
                return batch
        return None

    def forget_answers(self, file: StoredFile) -> None:
        """The results of a batch were deleted: its job directory does not keep them either."""
        if file.batch_id is not None and self.records.get(file.batch_id) is not None:
            (self.job_path(file.batch_id) / "results.jsonl").unlink(missing_ok=True)

    def show(self, batch: Batch) -> dict[str, Any]:
        """In OpenAI's form, with the newest counts, and with what holds it up as an error."""
        live = self.live.get(batch.id)
        if (reason := self.held.get(batch.id)) is not None:
            batch = replace(batch, errors=(*batch.errors, BatchError("held", reason)))
        return batch.show(live.counts if live else None)

    # Checking ------------------------------------------------------------------------------------

    def _check(self, id: str) -> None:
        """In the checking thread: look at the file, then let the batch run or fail it."""
        batch = self.records.get(id)
        if batch is None or batch.status is not Status.VALIDATING or self._is_stopping:
            return
        checks = RowChecks(batch.endpoint, self._model_name)
        try:
            found = check_file(self._files.path(batch.input_file_id), checks, self._goes_on(id))
            with self._lock:
                batch = self.records.get(id)
                if batch is None or batch.status is not Status.VALIDATING or self._is_stopping:
                    return
                counts = Counts(total=found.num_rows)
                if not found.num_sound:
                    errors = found.errors
                    self._reach(
                        id,
                        Status.FAILED,
                        counts=replace(counts, failed=found.num_rows),
                        errors=errors,
                    )
                    return
                self._reach(id, Status.IN_PROGRESS, counts=counts)
                self._queue.append(id)
        except OutputError as error:
            logger.warning("batch %s cannot be noted as checked: %s", id, error)
            self.held[id] = str(error)
            return
        except Exception as error:  # noqa: BLE001 - a batch that waits for ever would be worse
            logger.error("batch %s could not be checked (%s)", id, type(error).__name__)
            self.fail(id, BatchError("internal_error", "the file could not be checked"))
            return
        self._wake()

    def _goes_on(self, id: str) -> Callable[[], bool]:
        def goes_on() -> bool:
            batch = self.records.get(id)
            return not self._is_stopping and batch is not None and batch.status is Status.VALIDATING

        return goes_on

    # From the engine's thread --------------------------------------------------------------------

    def next(self) -> tuple[Batch, StopControl] | None:
        """Take the batch whose turn it is."""
        with self._lock:
            if self._is_stopping or not self._queue or time.monotonic() < self._retry_at_s:
                return None
            batch = self.records.get(self._queue.popleft())
            if batch is None:
                return None
            self.held.pop(batch.id, None)
            self._running = batch.id, StopControl()
            return batch, self._running[1]

    def put_back(self, id: str, reason: str, retry_s: float | None) -> None:
        """A batch cannot go on now. It is tried again first, after some time; or, with None, not
        by this process."""
        with self._lock:
            self._running = None
            self.held[id] = reason
            if retry_s is not None:
                self._queue.appendleft(id)
                self._retry_at_s = time.monotonic() + retry_s
        batch = self.records.get(id)
        if batch is not None and batch.status is Status.CANCELLING:
            self.cancel(id)

    def finish(self, id: str, *, stopped: bool, expired: bool, error_codes: dict[str, int]) -> None:
        """The job of a batch has returned.

        Args:
            stopped: before its end.
            expired: rows ran out of the batch's time.
        """
        with self._lock:
            batch = self.records.change(id, lambda b: replace(b, error_codes=error_codes))
            if batch.status is Status.CANCELLING:
                self._end(id, Status.CANCELLED)
            elif not stopped:
                self._reach(id, Status.FINALIZING)
                self._end(id, Status.EXPIRED if expired else Status.COMPLETED)
            self._running = None

    def fail(self, id: str, error: BatchError) -> None:
        """A batch cannot be run at all; what it has is kept."""
        with self._lock:
            self._running = None
        self.records.change(id, lambda b: replace(b, errors=(*b.errors, error)))
        self._end_unrun(id, Status.FAILED)

    # Ends ----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """The server stops: the batch that runs is stopped like a job, others are left. The second
        time it is stopped at once."""
        with self._lock:
            self._is_stopping = True
            if self._running is not None:
                _request(self._running[1])

    def close(self) -> None:
        """Wait for the checking thread."""
        self._checker.shutdown(cancel_futures=True)

    def _end_unrun(self, id: str, status: Status = Status.CANCELLED) -> Batch:
        """End a batch that does not run, with what earlier runs have finished of it."""
        path = self.job_path(id)
        batch = self.records.get(id)
        assert batch is not None
        if (path / "journal.sqlite").exists():
            with JobDirectory(path):
                journal = Journal(path)
                files = OutputFiles(
                    str(self._files.path(batch.output_file_id)),
                    str(self._files.path(batch.error_file_id)),
                    journal,
                )
                try:
                    files.begin(resumed=True)
                finally:
                    files.close()
                    journal.close()
        return self._end(id, status)

    def _end(self, id: str, status: Status) -> Batch:
        batch = self.records.get(id)
        assert batch is not None
        output = self._files.register(batch.output_file_id, id, f"{id}_output.jsonl")
        errors = self._files.register(batch.error_file_id, id, f"{id}_error.jsonl")
        counts = self._counts_on_disk(batch)
        ended = self._reach(
            id, status, counts=counts, has_output=output is not None, has_errors=errors is not None
        )
        self.live.pop(id, None)
        self.held.pop(id, None)
        return ended

    def _reach(self, id: str, status: Status, **changes: Any) -> Batch:
        now = int(time.time())
        return self.records.change(id, lambda batch: batch.reach(status, now, **changes))

    def _counts_on_disk(self, batch: Batch | None) -> Counts:
        """The record's total with what the journal tells."""
        assert batch is not None
        if not (self.job_path(batch.id) / "journal.sqlite").exists():
            return batch.counts
        try:
            sql = read_only(self.job_path(batch.id))
        except BatchwrightError:
            return batch.counts
        states = count_states(sql)
        sql.close()
        failed = states[RowState.FAILED] + states[RowState.EXPIRED]
        return replace(batch.counts, completed=states[RowState.SUCCEEDED], failed=failed)


def _request(stop: StopControl) -> None:
    """Ask a job in another thread to stop; the exception is for callers in its own."""
    with suppress(KeyboardInterrupt):
        stop.request()
