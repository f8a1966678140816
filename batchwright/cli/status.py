"""`batchwright status`: how a job stands, from its directory, without disturbing it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from batchwright.report.amounts import duration, moment

if TYPE_CHECKING:
    from batchwright.report.status import JobStatus

SOME_ROWS_FAILED = 1
RUNNING = 3
CAN_GO_ON = 75
STALE_S = 5.0  # a running job whose last line is older is told so


def status(
    job: Annotated[
        str,
        typer.Argument(metavar="OUT", help="The job's output, or its directory OUT.job."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show how a job stands, running or not.

    Exit status: 0 it is finished and all rows succeeded, 1 it is finished and some failed, 2 there
    is no such job, 3 it is running, 75 it was stopped or broke off and the same command goes on.
    """
    from batchwright.report.read import find_job, read_job
    from batchwright.report.status import job_status

    now = time.time()
    found = job_status(read_job(find_job(job)), now)
    if as_json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        print("\n".join(status_lines(found, now)))
    raise typer.Exit(exit_status(found))


def exit_status(found: JobStatus) -> int:
    """See `status`."""
    if found.state in ("running", "starting"):
        return RUNNING
    if found.state != "finished":
        return CAN_GO_ON
    return SOME_ROWS_FAILED if found.rows["failed"] or found.rows["expired"] else 0


def status_lines(found: JobStatus, now: float) -> list[str]:
    """The same for people."""
    lines = [_headline(found, now), f"  rows    {_rows(found)}"]
    if found.state == "running":
        rate = f"{found.tokens_per_s:,.0f} tokens/s, {found.rows_per_s:,.2f} rows/s"
        lines.append(f"  rate    {rate}")
        if found.eta_s is not None:
            lines.append(f"  left    about {duration(found.eta_s)}")
        if found.updated is not None and now - found.updated > STALE_S:
            lines.append(f"  note    these numbers are {duration(now - found.updated)} old")
    if found.error_codes:
        codes = (f"{code}: {count:,}" for code, count in found.error_codes.items())
        lines.append(f"  errors  {', '.join(codes)}")
    if (advice := _advice(found)) is not None:
        lines.append(f"  {advice}")
    return [line if line.isprintable() else ascii(line)[1:-1] for line in lines]


def _headline(found: JobStatus, now: float) -> str:
    process = "" if found.process is None else f" ({found.process})"
    run = f", run {found.runs}" if found.runs > 1 else ""
    since = ""
    if found.since is not None:
        since = f", since {moment(found.since)} ({duration(now - found.since)} ago)"
    return f"{found.name}: {found.state}{process}{run}{since}"


def _rows(found: JobStatus) -> str:
    done = sum(found.rows.values())
    of = ""
    if found.rows_total is not None:
        of = f" of {'' if found.rows_total_is_exact else 'about '}{found.rows_total:,}"
    states = ", ".join(f"{count:,} {state}" for state, count in found.rows.items() if count)
    text = f"{done:,}{of} done" + (f": {states}" if states else "")
    if found.state == "running":
        text += f"; {found.rows_running:,} running, {found.rows_waiting:,} waiting"
    return text


def _advice(found: JobStatus) -> str | None:
    if found.state == "starting":
        return "Its process is loading the model, or is about to end."
    if found.state == "stopped":
        return "It was stopped. The same `batchwright run` command goes on; finished rows stay."
    if found.state == "broken off":
        return (
            "It was killed or broke off. The same `batchwright run` command goes on; finished rows "
            "stay."
        )
    if found.state == "finished" and found.error_codes:
        return "The same `batchwright run` command tries the rows again that are not succeeded."
    return None
