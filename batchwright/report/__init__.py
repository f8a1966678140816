"""What a job's directory tells of it: `status`, the report as a page and as JSON, Prometheus.

For callers with a job directory:
    report_page(directory)  one self-contained HTML page
    report_json(directory)  the same numbers, as a mapping that json.dumps takes
Both may be called while the job runs, and neither measures anything: the machine's ceiling is in
them if `measure_ceiling` was called, or `batchwright report` was used, on the machine before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchwright.report.numbers import Report


def report_page(directory: Path) -> str:
    """The report of a job as one HTML page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from batchwright.report.page import render_page

    return render_page(_report(directory))


def report_json(directory: Path) -> dict[str, Any]:
    """The report of a job as JSON-able values; `numbers.Report` has the fields."""
    import msgspec

    values: dict[str, Any] = msgspec.to_builtins(_report(directory))
    return values


def measure_ceiling(directory: Path) -> bool:
    """Measure the ceiling of this machine for a job's reports; takes seconds of all processors.

    Returns:
        Whether it was measured: not while the job runs, nor for a job of another machine.
    """
    from batchwright.job.machine import this_machine
    from batchwright.report import ceiling
    from batchwright.report.read import read_job

    record = read_job(directory)
    if record.process is not None or not record.runs:
        return False
    start = record.runs[-1].start
    return start.machine == this_machine() and ceiling.measure_ceiling(start) is not None


def _report(directory: Path) -> Report:
    from batchwright.report.ceiling import known_ceiling
    from batchwright.report.make_report import make_report
    from batchwright.report.read import read_job

    record = read_job(directory)
    return make_report(record, known_ceiling(record.runs[-1].start) if record.runs else None)
