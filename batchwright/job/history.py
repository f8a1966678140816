"""What earlier runs of a job tell about its rows, read from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from batchwright.job.summary import used_share


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


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {}
    return values if isinstance(values, dict) else {}
