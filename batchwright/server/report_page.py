"""The report of a batch's job, for the page."""

from __future__ import annotations

from pathlib import Path

from batchwright.server.api_error import ApiError


def has_report(job_directory: Path) -> bool:
    """Whether `report_page` has something to show."""
    return False


def report_page(job_directory: Path) -> str:
    """The report of a job that runs or has ended, as one HTML page that needs nothing else.

    Raises:
        ApiError: there is none.
    """
    raise ApiError(404, "there is no report of this batch", code="not_found")
