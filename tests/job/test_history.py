"""What earlier runs tell about lengths: read from the lines of the results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from batchwright.job.feed import EndedRow
from batchwright.job.history import MOST_ROWS, finished_lengths
from batchwright.job.plan_lengths import expected_shares
from batchwright.limits import ModelLimits
from batchwright.plan.job_rows import JobRows
from batchwright.plan.length_predictor import find_predictor
from batchwright.request import Request, SamplingParams


def line(custom_id: str, num_output: int, num_choices: int = 1, **changes) -> bytes:
    body = {
        "usage": {"prompt_tokens": 3, "completion_tokens": num_output},
        "choices": [{"index": index} for index in range(num_choices)],
    }
    whole = {"custom_id": custom_id, "response": {"body": body}, "error": None}
    return json.dumps(whole | changes).encode() + b"\n"


def test_lengths_of_rows_that_generated(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(
        line("a", 12)
        + line("three", 30, 3)
        + line("failed", 0, response=None)
        + line("embedded", 0)
        + b"null\n[1]\n{}\n"
        + line("a", 14)
        + line("torn", 9)[:40]
    )
    assert finished_lengths(path) == {"a": 14, "three": 10}
    assert finished_lengths(tmp_path / "missing.jsonl") == {}


def test_only_the_latest_rows_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(line(f"r{i}", i + 1) for i in range(2 * MOST_ROWS)))
    found = finished_lengths(path)
    assert len(found) == MOST_ROWS and f"r{MOST_ROWS - 1}" not in found


def request(id: str, prompt: list[int]) -> Request:
    params = SamplingParams(max_tokens=100)
    return Request(id=id, prompt_token_ids=np.array(prompt, np.int32), params=params)


def test_rows_are_expected_to_be_like_finished_ones_of_their_family() -> None:
    rows, limits = JobRows(), ModelLimits(500, 100)
    with rows.store:
        for number in range(6):
            prompt = [1 + number % 2] * 10 + [20 + number]
            rows.add(request(str(number), prompt), len(prompt) + 100, number)
        ended = [
            EndedRow(request(f"e{i}", [1 + i % 2] * 10 + [40 + i]), 10 if i % 2 else 80)
            for i in range(20)
        ]
        columns = rows.columns()
        found = expected_shares(rows, columns, ended, limits, find_predictor("subtree"))
        assert found is not None and found.tolist() == [0.8, 0.1] * 3
        assert expected_shares(rows, columns, [], limits, find_predictor("subtree")) is None
        assert expected_shares(rows, columns, ended, limits, find_predictor("declared")) is None
        too_long = [EndedRow(request("e", [1] * 600), 5)]
        assert expected_shares(rows, columns, too_long, limits, find_predictor("subtree")) is None
