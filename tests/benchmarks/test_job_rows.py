"""The measurement of rows a second still runs, here with few rows."""

from pathlib import Path

import pytest

from benchmarks import job_rows

pytestmark = pytest.mark.cpu


def test_every_row_is_there_once(tmp_path: Path) -> None:
    job_rows.write_rows(tmp_path / "in.jsonl", 300, random_ids=True)
    result = job_rows.run_apart(tmp_path, "prefix_dfs")
    assert (result["rows"], result["output_tokens"]) == (300, 300 * job_rows.OUTPUT_TOKENS)
    assert 50 < result["prompt_tokens"] / 300 < 80
    job_rows.count_ids(tmp_path, 300, random_ids=True)
    with pytest.raises(AssertionError, match="1 rows are missing"):
        job_rows.count_ids(tmp_path, 301, random_ids=True)
