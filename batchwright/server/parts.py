"""All parts of a server, made in order and ended in order."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path

from batchwright.errors import ConfigError, OutputError
from batchwright.job.run_job import JobModel
from batchwright.prompt_cache.compose import PromptSchemas
from batchwright.prompt_cache.schema import Schema, schema_settings
from batchwright.server.batches import Batches
from batchwright.server.bodies import Bodies
from batchwright.server.calls import Calls
from batchwright.server.engine_thread import EngineThread, SharedModel
from batchwright.server.settings import (
    BODY_TIMEOUT_S,
    MAX_BODIES_BYTES,
    MAX_CALLS,
    ServerSettings,
)
from batchwright.server.shared_engine import SharedEngine
from batchwright.server.stored_files import FileStore


class Parts:
    """See the attributes; `start` begins the work, `stop` ends it, `close` lets go.

    Args:
        model: whose engine nobody else uses.
        settings: checked.
        schemas: that rows and calls may name in prompt_cache.
        lock: of the data directory, see `lock_data`; closed at the end.
    """

    def __init__(
        self,
        model: JobModel,
        settings: ServerSettings,
        lock: int,
        *,
        schemas: Sequence[Schema] = (),
    ) -> None:
        self.settings = settings
        self.started_at = int(time.time())
        self._lock = lock
        name = settings.model_name
        self.shared_engine = SharedEngine(model.engine, max_calls=MAX_CALLS)
        self.files = FileStore(settings.data / "files", settings.max_upload_bytes)
        self.batches = Batches(
            settings.data / "batches",
            self.files,
            model_name=name,
            wake=self.shared_engine.arrived.set,
        )
        shared = SharedModel(model, self.shared_engine)
        placed = PromptSchemas(schemas, model.tokenizer) if schemas else None
        self.calls = Calls(
            shared, self.shared_engine, model_name=name, max_preparing=MAX_CALLS, schemas=placed
        )
        self.bodies = Bodies(max_bytes=MAX_BODIES_BYTES, timeout_s=BODY_TIMEOUT_S)
        self.engine_thread = EngineThread(
            shared,
            self.batches,
            self.files,
            model_name=name,
            schemas=placed,
            row_settings=schema_settings(schemas),
        )
        self.is_stopping = False

    def start(self) -> None:
        """Go on with unfinished batches, and take calls."""
        self.batches.start()
        self.engine_thread.start()

    def stop(self) -> None:
        """Stop the work; a second time: at once."""
        self.is_stopping = True
        self.engine_thread.stop()

    def close(self) -> None:
        """Let go of the data directory. The engine's thread has ended, or the process ends."""
        self.batches.close()
        self.calls.close()
        os.close(self._lock)

    @property
    def has_unfinished(self) -> bool:
        """Whether there are batches to go on with."""
        return any(not batch.has_ended for batch in self.batches.records.all())

    @property
    def health(self) -> str:
        """ "ok", or why not: health is progress, not a process that is there."""
        if self.is_stopping:
            return "stopping"
        if not self.engine_thread.is_alive:
            return "dead"
        return "stuck" if self.shared_engine.is_stuck else "ok"


def lock_data(data: Path) -> int:
    """Make a directory for us alone, and hold its lock; done before a model is loaded.

    Raises:
        ConfigError: another server uses it.
        OutputError: it cannot be used.
    """
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        data.chmod(0o700)
        lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"{data} is no directory; name another with --data") from None
    except OSError as error:
        raise OutputError(f"cannot use {data}: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"another server uses {data}; stop it, or name another directory with --data"
        ) from None
    return lock
