"""What the runners of other engines share: the job they are given, and how they answer.

A runner is run by the interpreter of its engine's own environment, as `PYTHON run_NAME.py FOLDER`,
and imports nothing of batchwright. FOLDER holds `job.json` and `rows.jsonl`; the runner writes
`loaded.json` when the engine is ready and warm, and `result.json` when all rows are answered.
What it prints is kept for error messages and otherwise not looked at.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_SHARED = 32
"""Tokens that a common beginning has at least, beyond a shorter one, to be worth waiting for."""


@dataclass
class Row:
    """A prompt, and how many tokens to generate after it; end tokens do not end it."""

    index: int
    prompt_token_ids: list[int]
    num_output_tokens: int


@dataclass
class Job:
    """What to run. `dtype` is float32 or bfloat16."""

    folder: Path
    model: str
    dtype: str
    num_threads: int
    rows: list[Row]

    def our_token_ids(self) -> list[list[int]] | None:
        """What batchwright has generated for these rows, if the runner is asked to compare."""
        path = self.folder / "ours.json"
        if not path.exists():
            return None
        token_ids: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return token_ids

    @property
    def longest(self) -> int:
        """Most tokens of a row, prompt and output."""
        return max(len(row.prompt_token_ids) + row.num_output_tokens for row in self.rows)

    def loaded(self, version: str, settings: dict[str, Any]) -> None:
        """The engine is ready: what comes now is measured."""
        values = {"time": time.time(), "version": version, "settings": settings}
        _write(self.folder / "loaded.json", values)

    def finished(self, seconds: float, token_ids: list[list[int]], **more: Any) -> None:
        """All rows are answered; token ids in the order of the rows.

        Args:
            more: whatever else the engine tells.
        """
        for row, ids in zip(self.rows, token_ids, strict=True):
            if len(ids) != row.num_output_tokens:
                raise SystemExit(
                    f"row {row.index} has {len(ids)} tokens, asked for {row.num_output_tokens}"
                )
        _write(self.folder / "result.json", {"seconds": seconds, "token_ids": token_ids, **more})


def read_job() -> Job:
    """The job of the folder on the command line; also sets how many threads libraries start."""
    folder = Path(sys.argv[1])
    values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    os.environ.setdefault("OMP_NUM_THREADS", str(values["num_threads"]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with (folder / "rows.jsonl").open(encoding="utf-8") as lines:
        rows = [Row(index, *json.loads(line)) for index, line in enumerate(lines)]
    return Job(folder, values["model"], values["dtype"], values["num_threads"], rows)


def in_waves(rows: list[Row]) -> list[list[Row]]:
    """Rows such that whoever has a common beginning first has finished before the others start.

    For engines that look for cached prompts when a request is added. A row that is the first with
    some beginning goes one wave after the first row with the beginning's own beginning; all others
    go in the last wave.
    """
    wave_of: dict[int, int] = {}
    leads: set[int] = set()
    path: list[tuple[int, int]] = []  # (a beginning's length, the first row with it), ascending
    before: Row | None = None
    for row in sorted(rows, key=lambda row: row.prompt_token_ids):
        shared = 0 if before is None else num_shared(before.prompt_token_ids, row.prompt_token_ids)
        leader = -1 if before is None else before.index
        while path and path[-1][0] > shared:
            _, leader = path.pop()
        if shared < MIN_SHARED:
            wave_of[row.index] = 0
        else:
            if not path or path[-1][0] + MIN_SHARED <= shared:
                path.append((shared, leader))
            leader = path[-1][1]
            leads.add(leader)
            wave_of[row.index] = wave_of[leader] + 1
        before = row
    waves: dict[int, list[Row]] = {}
    final = max(wave_of.values())
    for row in rows:
        waves.setdefault(wave_of[row.index] if row.index in leads else final, []).append(row)
    return [waves[wave] for wave in sorted(waves)]


def num_shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next(
        (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    """Under another name first: who waits for the file must not read half of it."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(values), encoding="utf-8")
    draft.replace(path)
