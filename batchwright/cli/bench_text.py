"""What `batchwright bench` measured, as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

import batchwright
from batchwright.bench.bounds import Bounds, Rates
from batchwright.bench.compare import NUM_FIRST, TIE, Agreement, Comparison, Measured, Workload
from batchwright.cli.printable import printable
from batchwright.config import ResolvedConfig
from batchwright.job.machine import this_machine
from batchwright.report.amounts import percent

FORMAT_VERSION = 1
PACKAGES = ("torch", "numpy", "numba")
HEADS = (
    "engine",
    "seconds",
    "spread",
    "times ours",
    "prompt/s",
    "output/s",
    "total/s",
    "of bound",
    "of rows-aware",
    "peak MiB",
    "start-up",
)


def comparison_as_text(found: Comparison, model: str, num_threads: int) -> str:
    """A table for each workload."""
    machine, rates = this_machine(), found.rates
    threads = "thread" if num_threads == 1 else "threads"
    lines = [
        f"Bench of {printable(model)} on {machine.processor}, {num_threads} {threads}",
        f"products reach {rates.layers.best / 1e9:,.0f} GFLOP/s in the layers, "
        f"{rates.head.best / 1e9:,.0f} at the output head",
    ]
    for workload in found.workloads:
        lines += ["", *_workload_lines(workload, found.bounds(workload))]
    return "\n".join(lines)


def _workload_lines(workload: Workload, least: Bounds) -> Iterator[str]:
    work = workload.work
    yield (
        f"{workload.name}: {len(workload.requests):,} rows, {work.num_prompt_tokens:,} prompt "
        f"tokens ({work.num_distinct_prompt_tokens:,} distinct), {work.num_generated_tokens:,} "
        "generated"
    )
    yield (
        f"bound {least.plain_s:,.2f} s; rows-aware {least.rows_aware_s:,.2f} s, for steps of "
        f"{least.layer_rows:,.0f} rows in the layers and {least.head_rows:,.0f} at the head"
    )
    yield from _table(
        [HEADS]
        + [
            _cells(label, one, workload, least)
            for label, one in workload.engines.items()
            if one.runs
        ]
    )
    parts = workload.own.mean_parts().items()
    yield "time: " + ", ".join(f"{name} {percent(share)}" for name, share in parts)
    compile_s = sum(run.more["compile_s"] for run in workload.own.runs)
    if compile_s > 0.05:
        yield f"{compile_s:,.1f} s of it to compile kernels, once on a machine: measure again"
    for label, one in workload.engines.items():
        if one.agreement is not None:
            yield f"{label}: {_agreement_words(one.agreement)}"
        if one.failure is not None:
            yield f"{label}: {printable(one.failure)}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for name, *cells in rows:
        yield "  ".join(
            [name.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        )


def _cells(label: str, one: Measured, workload: Workload, least: Bounds) -> Sequence[str]:
    seconds, work = one.seconds, workload.work
    return (
        label,
        f"{seconds:,.2f}",
        percent(one.spread) if len(one.runs) > 1 else "-",
        f"{seconds / workload.own.seconds:.2f}",
        f"{work.num_prompt_tokens / seconds:,.0f}",
        f"{work.num_generated_tokens / seconds:,.0f}",
        f"{(work.num_prompt_tokens + work.num_generated_tokens) / seconds:,.0f}",
        percent(least.plain_s / seconds),
        percent(least.rows_aware_s / seconds),
        f"{one.peak_bytes / 2**20:,.0f}",
        f"{one.ready_s:,.1f} s",
    )


def _agreement_words(found: Agreement) -> str:
    words = (
        f"of {found.num_rows:,} rows {found.num_equal_first:,} have our first token, "
        f"{found.num_equal_begin:,} our first {NUM_FIRST}, {found.num_equal:,} all"
    )
    num_parted = found.num_rows - found.num_equal
    if found.num_ties is None or not num_parted:
        return words
    return (
        f"{words}; {found.num_ties:,} of {num_parted:,} part at a tie below {TIE:g}, largest "
        f"margin of its two best logits {found.largest_margin:.1e}"
    )


def comparison_as_json(found: Comparison, about: dict[str, Any], config: ResolvedConfig) -> str:
    """One object; docs/bench.md lists its fields."""
    values = {
        "version": FORMAT_VERSION,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        "machine": msgspec.to_builtins(this_machine()),
        "load_average": os.getloadavg()[0],
        "versions": _versions(),
        "settings": dataclasses.asdict(config),
        "rates": _rates(found.rates),
        "workloads": [_workload(one, found.bounds(one)) for one in found.workloads],
    }
    return json.dumps(values, indent=1) + "\n"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "batchwright": batchwright.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _rates(rates: Rates) -> dict[str, Any]:
    return {
        name: {"rows": list(curve.rows), "flops_per_s": list(curve.flops_per_s)}
        for name, curve in rates._asdict().items()
    }


def _workload(workload: Workload, least: Bounds) -> dict[str, Any]:
    return {
        "name": workload.name,
        "rows": len(workload.requests),
        **dataclasses.asdict(workload.work),
        "bounds": least._asdict(),
        "engines": [
            _engine(label, one, workload, least) for label, one in workload.engines.items()
        ],
    }


def _engine(label: str, one: Measured, workload: Workload, least: Bounds) -> dict[str, Any]:
    values: dict[str, Any] = {"engine": label, "failure": one.failure}
    if one.runs:
        values |= {
            "version": one.runs[-1].version,
            "settings": one.runs[-1].settings,
            "seconds": one.seconds,
            "seconds_all": [run.seconds for run in one.runs],
            "times_ours": one.seconds / workload.own.seconds,
            "of_bound": least.plain_s / one.seconds,
            "of_rows_aware_bound": least.rows_aware_s / one.seconds,
            "startup_s_all": [run.ready_s for run in one.runs],
            "peak_bytes_all": [run.peak_bytes for run in one.runs],
            "more_all": [run.more for run in one.runs],
        }
    if one.agreement is not None:
        values["agreement"] = dataclasses.asdict(one.agreement)
    return values
