"""One batch file through the command, through Python and through HTTP: the same answers."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from batchwright import LLM, run_file
from batchwright.job.rows import ENDPOINTS
from tests.compat.mixed_rows import mixed_rows
from tests.job.fakes import read_lines, write_lines
from tests.server.running import RunningServer, begin, ended, lines_of
from tests.server.serving import COMMAND, ROOT, serving

pytestmark = pytest.mark.cpu
Answers = dict[str, dict[str, Any]]


def comparable(lines: list[dict[str, Any]]) -> Answers:
    """Lines by id, without what is not the row's own: time, place, what neighbours computed."""
    for line in lines:
        if line["response"] is None:
            del line["error"]["line"]
        else:
            body = line["response"]["body"]
            body.pop("created", None)
            body["usage"].pop("prompt_tokens_details", None)
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def from_files(output: Path) -> Answers:
    """The lines of a result file and of its error file."""
    errors = output.with_name(output.stem + ".errors.jsonl")
    return comparable([*read_lines(output), *read_lines(errors)])


def by_command(source: Path, folder: Path) -> Answers:
    output = folder / "command.jsonl"
    command = [*COMMAND, "run", str(source), "-o", str(output), "--model", "smollm2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr  # bad rows
    return from_files(output)


def by_python(model: LLM, source: Path, folder: Path) -> Answers:
    run_file(model, source, folder / "python.jsonl")
    return from_files(folder / "python.jsonl")


def by_http(client: openai.OpenAI, source: Path) -> Answers:
    """A batch for each endpoint, since a batch has one."""
    rows, lines = read_lines(source), []
    parts = [[row for row in rows if row["url"] == endpoint] for endpoint in ENDPOINTS]
    batches = [begin(client, part, endpoint=part[0]["url"]) for part in parts if part]
    for batch in batches:
        batch = ended(client, batch, 300)
        assert batch.status == "completed"
        lines += lines_of(client, batch.output_file_id)
        lines += lines_of(client, batch.error_file_id)
    return comparable(lines)


@pytest.mark.slow
def test_300_rows_by_command_python_and_http(tmp_path: Path) -> None:
    rows = mixed_rows(300)
    source = write_lines(tmp_path / "in.jsonl", rows)
    expected = by_command(source, tmp_path)
    assert set(expected) == {row["custom_id"] for row in rows}
    failed = Counter(line["error"]["code"] for line in expected.values() if line["error"])
    assert failed.total() == 30
    assert by_python(LLM("smollm2"), source, tmp_path) == expected
    with serving(tmp_path / "data") as (client, _):
        assert by_http(client, source) == expected
    print(json.dumps({"failed": failed, "endpoints": Counter(row["url"] for row in rows)}))


def test_a_dozen_rows_by_python_and_http(tmp_path: Path) -> None:
    """With one model in this process, which is quicker."""
    source = write_lines(tmp_path / "in.jsonl", mixed_rows(12))
    model = LLM("smollm2")
    expected = by_python(model, source, tmp_path)
    assert len(expected) == 12
    server = RunningServer(tmp_path / "data", model=model, model_name="smollm2")
    try:
        assert by_http(server.client(), source) == expected
    finally:
        server.close()
