"""A batch's record, its states, and how OpenAI's API shows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Where a batch stands. The last four are for good."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"  # it runs, or waits for its turn
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"  # it could not be run, or not to its end
    EXPIRED = "expired"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.EXPIRED, Status.CANCELLED})


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed, or one of the lines that made it fail."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of a batch's rows so far."""

    total: int = 0
    completed: int = 0
    failed: int = 0  # expired ones included


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch's record. `at` holds the moment (seconds since 1970) each status was reached."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    output_file_id: str
    error_file_id: str
    model: str
    metadata: dict[str, str] | None = None
    status: Status = Status.VALIDATING
    at: dict[str, int] = field(default_factory=dict)
    counts: Counts = Counts()
    error_codes: dict[str, int] = field(default_factory=dict)
    errors: tuple[BatchError, ...] = ()
    has_output: bool = False
    has_errors: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDED

    def reach(self, status: Status, now: int, **changes: Any) -> Batch:
        """The same batch in another status."""
        return replace(self, status=status, at={**self.at, status.value: now}, **changes)

    def show(self, live: Counts | None = None) -> dict[str, Any]:
        """In OpenAI's form.

        Args:
            live: counts that are newer than the record's.
        """
        counts = live or self.counts
        errors = [
            {"code": e.code, "line": e.line, "message": e.message, "param": e.param}
            for e in self.errors
        ]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file_id if self.has_output else None,
            "error_file_id": self.error_file_id if self.has_errors else None,
            "created_at": self.at[Status.VALIDATING.value],
            "in_progress_at": self.at.get(Status.IN_PROGRESS.value),
            "expires_at": self.expires_at,
            "finalizing_at": self.at.get(Status.FINALIZING.value),
            "completed_at": self.at.get(Status.COMPLETED.value),
            "failed_at": self.at.get(Status.FAILED.value),
            "expired_at": self.at.get(Status.EXPIRED.value),
            "cancelling_at": self.at.get(Status.CANCELLING.value),
            "cancelled_at": self.at.get(Status.CANCELLED.value),
            "request_counts": {
                "total": counts.total,
                "completed": counts.completed,
                "failed": counts.failed,
            },
            "metadata": self.metadata,
        }
