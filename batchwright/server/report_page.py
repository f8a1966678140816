"""The report of a batch's job, for the page."""

from __future__ import annotations

from pathlib import Path

from batchwright import report
from batchwright.errors import BatchwrightError
from batchwright.server.api_error import ApiError


def has_report(job_directory: Path) -> bool:
    """Whether `report_page` has something to show."""
    return (job_directory / "metrics.jsonl").exists()


def report_page(job_directory: Path) -> str:
    """The report of a job that runs or has ended, as one HTML page that needs nothing else.

    Raises:
        ApiError: there is none, or it cannot be drawn.
    """
    if not has_report(job_directory):
        raise ApiError(404, "there is no report of this batch", code="not_found")
    try:
        return report.report_page(job_directory)
    except BatchwrightError as error:
        raise ApiError(501, str(error), code="report_unavailable") from error
