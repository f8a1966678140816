"""The same rows through `batchwright serve` and through `batchwright run`, with the real model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from batchwright.job.rows import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, SCORE
from tests.server.running import begin, ended, lines_of, until

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
COMMAND = (sys.executable, "-m", "batchwright.cli.main")


def mixed_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows of every endpoint and of many kinds; every tenth is bad."""
    rows = []
    for i in range(num_rows):
        url = (CHAT, CHAT, CHAT, CHAT, COMPLETIONS, COMPLETIONS, EMBEDDINGS, SCORE)[i % 8]
        body: dict[str, Any]
        if url == CHAT:
            messages = [{"role": "user", "content": f"Say a word about {i % 90}."}]
            kinds: list[dict[str, Any]] = [
                {"temperature": 0},
                {"n": 2, "seed": i},
                {"logprobs": True, "top_logprobs": 2},
                {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
                {"stop": ["a"]},
            ]
            body = {"messages": messages, "max_tokens": 8, **kinds[i // 8 % 5]}
        elif url == COMPLETIONS:
            body = {"prompt": f"{i} and {i + 1}", "max_tokens": 6, "top_p": 0.9, "echo": i % 3 == 0}
        elif url == EMBEDDINGS:
            body = {"input": f"The number {i}."}
        else:
            body = {"context": f"{i} is", "continuation": " a number"}
        if i % 10 == 9:
            body["temperature"] = "hot"
        rows.append({"custom_id": f"row {i}", "method": "POST", "url": url, "body": body})
    return rows


@contextmanager
def serving(data: Path, *options: str) -> Iterator[tuple[openai.OpenAI, str]]:
    """`batchwright serve` with the real model, ended by a signal."""
    command = [*COMMAND, "serve", "--model", "smollm2", "--port", "0", "--data", str(data)]
    command += options
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            line = next(line for line in running.stderr if line.startswith("Serving"))
            url = line.partition("(API: ")[2].rstrip(")\n")
            with openai.OpenAI(base_url=url, api_key="none") as client:
                yield client, url.removesuffix("/v1")
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
        finally:
            running.kill()


def comparable(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what is not the row's own: the time, and what its neighbours computed."""
    if line["response"] is not None:
        body = line["response"]["body"]
        del body["created"]
        body["usage"].pop("prompt_tokens_details", None)
    else:
        del line["error"]["line"]
    return line


def test_300_mixed_rows_are_answered_alike(tmp_path: Path) -> None:
    rows = mixed_rows(300)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*COMMAND, "run", str(source), "-o", str(output), "--model", "smollm2"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1  # bad rows
    expected = {}
    for path in (output, tmp_path / "out.errors.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            expected[line["custom_id"]] = comparable(line)
    found = {}
    with serving(tmp_path / "data") as (client, _):
        for endpoint in ENDPOINTS[:4]:
            part = [row for row in rows if row["url"] == endpoint]
            batch = ended(client, begin(client, part, endpoint=endpoint), 300)
            assert batch.status == "completed"
            for file_id in (batch.output_file_id, batch.error_file_id):
                for line in lines_of(client, file_id):
                    found[line["custom_id"]] = comparable(line)
    assert len(expected) == 300 and sum(e["error"] is not None for e in expected.values()) == 30
    assert found == expected


def test_single_calls_answer_as_rows_do_also_beside_a_batch(tmp_path: Path) -> None:
    messages: list[Any] = [{"role": "user", "content": "Name three rivers in Europe."}]
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": CHAT, "body": {"messages": messages, **o}}
        for i, o in enumerate([{"temperature": 0, "max_tokens": 24}, {"seed": 7, "max_tokens": 24}])
    ]
    long = {"messages": messages, "max_tokens": 150, "ignore_eos": True}
    fill = [{"custom_id": f"f{i}", "method": "POST", "url": CHAT, "body": long} for i in range(100)]
    with serving(tmp_path / "data", "--max-num-seqs", "8") as (client, root):
        batch = ended(client, begin(client, rows), 120)
        answers = {line["custom_id"]: line for line in lines_of(client, batch.output_file_id)}
        busy = begin(client, fill)
        until(lambda: client.batches.retrieve(busy.id).status == "in_progress")
        alone = client.chat.completions.create(
            model="smollm2", messages=messages, temperature=0, max_tokens=24
        )
        seeded = client.chat.completions.create(
            model="smollm2", messages=messages, seed=7, max_tokens=24
        )
        assert client.batches.retrieve(busy.id).request_counts.completed < 100
        for answer, id in ((alone, "r0"), (seeded, "r1")):
            expected = answers[id]["response"]["body"]["choices"][0]["message"]["content"]
            assert answer.choices[0].message.content == expected
        vectors = client.embeddings.create(model="smollm2", input=["one", "two"]).data
        assert [v.index for v in vectors] == [0, 1] and len(vectors[0].embedding) == 576
        with urllib.request.urlopen(f"{root}/health") as response:
            assert json.load(response) == {"status": "ok"}
        client.batches.cancel(busy.id)
        ended(client, busy, 120)
