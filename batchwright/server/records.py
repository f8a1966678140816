"""Records: what the server keeps of files and batches, one JSON file each, written whole.

Records are frozen; a change makes a new one, which is on the disk before anybody sees it. So they
are read without a lock, and a crash finds either the old one or the new.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from batchwright.job.durable import sync_directory, write_private
from batchwright.server.api_error import ApiError

logger = logging.getLogger(__name__)

MAX_PAGE = 10_000


class Record(Protocol):
    """Anything with an id that begins with the time it was made at."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=Record)


def new_id(kind: str) -> str:
    """An id such as file-18f2...; later ones sort after earlier ones."""
    return f"{kind}{time.time_ns():016x}{secrets.token_hex(6)}"


class Records(Generic[R]):
    """Records of one kind.

    Args:
        directory: where they lie; made if it is not there.
        kind: what ids begin with.
        form: the class of the records.
    """

    def __init__(self, directory: Path, kind: str, form: type[R]) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.directory = directory
        self._id = re.compile(re.escape(kind) + r"[0-9a-f]{28}")
        self._lock = threading.Lock()  # of writers
        self._records: dict[str, R] = {}
        for path in directory.glob("*.json"):
            if (record := _load(path, form)) is not None:
                self._records[record.id] = record

    def get(self, id: str) -> R | None:
        """The record with an id. Ids that we did not make are nobody's, whatever they spell."""
        return self._records.get(id) if self._id.fullmatch(id) else None

    def all(self) -> list[R]:
        """All records, by id: the oldest first."""
        return sorted(self._records.values(), key=lambda record: record.id)

    def add(self, record: R) -> None:
        """Keep a new record.

        Raises:
            OutputError: the disk fails.
        """
        with self._lock:
            self._save(record)

    def change(self, id: str, make: Callable[[R], R]) -> R:
        """Replace a record by what `make` makes of it; whoever comes second sees the first's.

        Raises:
            OutputError: the disk fails; the old record stays.
        """
        with self._lock:
            old = self._records[id]
            new = make(old)
            if new is not old:
                self._save(new)
            return new

    def remove(self, id: str) -> None:
        """Forget a record."""
        with self._lock:
            self._path(id).unlink(missing_ok=True)
            sync_directory(self.directory)
            self._records.pop(id, None)

    def _save(self, record: R) -> None:
        write_private(self._path(record.id), msgspec.json.encode(record))
        self._records[record.id] = record

    def _path(self, id: str) -> Path:
        assert self._id.fullmatch(id)
        return self.directory / f"{id}.json"


def _load(path: Path, form: type[R]) -> R | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("%s is no record (%s); it is left alone", path, error)
        return None


def page(
    records: Iterable[R], params: Any, *, default_limit: int, show: Callable[[R], dict[str, Any]]
) -> dict[str, Any]:
    """A page of a list, in OpenAI's form.

    Args:
        records: the oldest first.
        params: the query: limit, after (an id), order (desc or asc).
    Raises:
        ApiError: a parameter makes no sense.
    """
    ordered = list(records)
    if (order := params.get("order", "desc")) not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", code="invalid_value", param="order")
    if order == "desc":
        ordered.reverse()
    limit = _limit(params.get("limit"), default_limit)
    if (after := params.get("after")) is not None:
        places = [place for place, record in enumerate(ordered) if record.id == after]
        if not places:
            raise ApiError(400, f"after is {after!r:.100}: no such id", param="after")
        ordered = ordered[places[0] + 1 :]
    shown = [show(record) for record in ordered[:limit]]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(ordered) > limit,
    }


def _limit(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_PAGE:
        raise ApiError(
            400,
            f"limit must be 1 to {MAX_PAGE}, not {text!r:.20}",
            code="invalid_value",
            param="limit",
        )
    return int(text)
