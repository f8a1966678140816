"""What earlier runs of a job tell about its rows, read from metrics.jsonl and results.jsonl."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from batchwright.job.journal import named_row
from batchwright.job.summary import used_share

MOST_ROWS = 1024
"""Finished rows whose lengths are looked at, the latest."""

MOST_BYTES = 16 << 20
"""Of results.jsonl, its end."""


def finished_share(metrics_path: Path) -> float | None:
    """Share of their allowed output tokens that finished rows used; None if there are none.

    A line that was cut off, or has no counts, is passed over.
    """
    try:
        lines = metrics_path.read_bytes().splitlines()
    except OSError:
        return None
    num_output = num_allowed = 0
    run = (0, 0)  # counts of the run so far: each line has those since the start of its run
    for line in lines:
        values = _decoded(line)
        if values.get("event") == "start":
            num_output, num_allowed, run = num_output + run[0], num_allowed + run[1], (0, 0)
        elif "allowed_tokens_done" in values:
            run = int(values.get("output_tokens", 0)), int(values["allowed_tokens_done"])
    return used_share(num_output + run[0], num_allowed + run[1])


def finished_lengths(results_path: Path) -> dict[str, int]:
    """Output tokens of one sequence of rows that succeeded, by their id in the journal.

    A line that was cut off, or tells of no generated text, is passed over.
    """
    try:
        with results_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MOST_BYTES))
            lines = file.read(MOST_BYTES).splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines[-MOST_ROWS:]:
        match _decoded(line):
            case {
                "custom_id": str(custom_id),
                "response": {
                    "body": {"usage": {"completion_tokens": int(num)}, "choices": [*choices]}
                },
            } if choices and num > 0:
                found[named_row(custom_id)] = round(num / len(choices))
    return found


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {}
    return values if isinstance(values, dict) else {}
