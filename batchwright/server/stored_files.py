"""Files: what clients uploaded, and the results of batches. Names on the disk are ours alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.requests import Request

from batchwright.job.durable import sync_directory
from batchwright.server.api_error import ApiError, busy
from batchwright.server.bodies import declared_bytes
from batchwright.server.records import Records, new_id
from batchwright.server.settings import MAX_UPLOADS, MIN_FREE_BYTES, UPLOAD_TIMEOUT_S
from batchwright.server.upload import FORM_BYTES, Upload

INPUT = "batch"
OUTPUT = "batch_output"
MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file's record.

    Attributes:
        num_bytes: its size.
        created_at: seconds since 1970.
        filename: what the client called it; shown, never used.
        purpose: INPUT or OUTPUT.
        batch_id: the batch whose results it holds.
    """

    id: str
    num_bytes: int
    created_at: int
    filename: str
    purpose: str
    batch_id: str | None = None

    def show(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "expires_at": None,
            "status_details": None,
        }


class FileStore:
    """Files in a directory: `ID.jsonl` and its record `ID.json`.

    Args:
        directory: made if it is not there.
        max_bytes: of an uploaded file.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.records: Records[StoredFile] = Records(directory, "file-", StoredFile)
        self._max_bytes = max_bytes
        self._num_uploads = 0
        for part in directory.glob("*.part"):
            part.unlink()

    def sweep(self, expected: set[str]) -> None:
        """Delete bytes without a record, which a crash left, unless results are expected there."""
        for path in self.records.directory.glob("*.jsonl"):
            if self.records.get(path.stem) is None and path.stem not in expected:
                path.unlink()

    def path(self, id: str) -> Path:
        """Where a file's bytes lie; the id is one of ours."""
        return self.records.directory / f"{id}.jsonl"

    async def receive(self, request: Request) -> StoredFile:
        """Take in an upload.

        Raises:
            ApiError: the form or the file is refused.
            OutputError: the disk fails.
        """
        if self._num_uploads >= MAX_UPLOADS:
            raise busy(f"{MAX_UPLOADS} uploads are under way; try again later")
        wanted = declared_bytes(request, self._max_bytes + FORM_BYTES) or 0
        if shutil.disk_usage(self.records.directory).free - wanted < MIN_FREE_BYTES:
            raise ApiError(507, "the server's disk is nearly full", code="insufficient_storage")
        id = new_id("file-")
        part = self.records.directory / f"{id}.part"
        self._num_uploads += 1
        upload = None
        try:
            upload = Upload(part, self._max_bytes)
            await upload.receive(request, timeout_s=UPLOAD_TIMEOUT_S)
            return self._keep(id, upload, part)
        except OSError as error:
            reason = error.strerror or "it failed"
            raise ApiError(507, f"the file cannot be stored: {reason}", code="storage") from error
        finally:
            self._num_uploads -= 1
            if upload is not None:
                upload.close()
            part.unlink(missing_ok=True)

    def _keep(self, id: str, upload: Upload, part: Path) -> StoredFile:
        fields = dict(upload.fields)
        if (purpose := fields.pop("purpose", None)) != INPUT:
            raise ApiError(
                400, f"purpose is {purpose!r:.60}; only 'batch' is known", param="purpose"
            )
        for name in fields:
            raise ApiError(
                400, f"unknown field {name!r:.60}", code="unknown_parameter", param=name[:60]
            )
        os.replace(part, self.path(id))
        sync_directory(self.records.directory)
        name = _shown_name(upload.filename or "")
        record = StoredFile(id, upload.num_bytes, int(time.time()), name, INPUT)
        self.records.add(record)
        return record

    def register(self, id: str, batch_id: str, filename: str) -> str | None:
        """Make the results of a batch a file that clients see; returns its id, None if empty."""
        path = self.path(id)
        if not path.exists() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            return None
        now = int(time.time())
        self.records.add(StoredFile(id, path.stat().st_size, now, filename, OUTPUT, batch_id))
        return id

    def delete(self, id: str, check: Callable[[StoredFile], None]) -> StoredFile | None:
        """Delete a file if `check` does not object; None: there is none."""
        record = self.records.get(id)
        if record is None:
            return None
        check(record)
        self.records.remove(id)  # first: bytes without a record are swept away, not the reverse
        self.path(id).unlink(missing_ok=True)
        return record


def _shown_name(name: str) -> str:
    """The last part of what the client calls a file, without what could steer a terminal."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(c for c in last if c.isprintable())[:MAX_NAME_CHARS] or "file.jsonl"
