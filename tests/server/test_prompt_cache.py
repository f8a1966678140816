"""Schemas of a server: rows of batches and single calls import modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from batchwright.job.rows import COMPLETIONS
from batchwright.prompt_cache.schema import read_schemas
from tests.job.fakes import BOS
from tests.job.test_prompt_cache import SCHEMA, row, write_schema
from tests.server.running import MODEL, PacedEngine, RunningServer, begin, ended, lines_of, until

Start = Callable[..., RunningServer]
PAID = {"prompt_cache": {"modules": ["order"], "parameters": {"number": "n7"}}}
TOKENS = [BOS, *b"Rules.Order , paid.n7Why?"]


class KeepingEngine(PacedEngine):
    """Keeps the prompts that it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []
        self.urgent: list[bool] = []

    def add(self, request: Any) -> None:
        self.asked.append(request.prompt_token_ids.tolist())
        self.urgent.append(request.urgent and request.layout is not None)
        super().add(request)


def test_calls_and_batches_import_modules(start: Start, tmp_path: Path) -> None:
    engine = KeepingEngine()
    server = start(engine, schemas=read_schemas([write_schema(tmp_path)]))
    client = server.client()
    answer = client.completions.create(model=MODEL, prompt="Why?", max_tokens=1, extra_body=PAID)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(TOKENS)
    assert engine.asked == [TOKENS] and engine.urgent == [True]
    unknown = {"prompt_cache": {"modules": ["returns"]}}
    with pytest.raises(openai.BadRequestError, match="names 'returns'; schema shop has"):
        client.completions.create(model=MODEL, prompt="Why?", extra_body=unknown)
    rows = [row("a", **PAID["prompt_cache"]), row("bad", modules=["en", "de"])]
    batch = ended(client, begin(client, rows, endpoint=COMPLETIONS))
    assert [line["custom_id"] for line in lines_of(client, batch.output_file_id)] == ["a"]
    (failed,) = lines_of(client, batch.error_file_id)
    assert "members of one union" in str(failed)
    assert engine.asked[1:] == [TOKENS]


def test_a_server_without_schemas_says_so(start: Start) -> None:
    with pytest.raises(openai.BadRequestError, match="give its file with --prompt-schema"):
        start().client().completions.create(model=MODEL, prompt="Why?", extra_body=PAID)


def test_a_batch_goes_on_only_with_the_same_schemas(start: Start, tmp_path: Path) -> None:
    schemas = read_schemas([write_schema(tmp_path)])
    engine = PacedEngine()
    engine.pace_s = 0.02
    server = start(engine, schemas=schemas)
    client = server.client()
    rows = [row(f"r{i}", **PAID["prompt_cache"]) for i in range(40)]
    batch = begin(client, rows, endpoint=COMPLETIONS)
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 2)
    server.close()
    changed = {**SCHEMA, "content": ["Other rules.", *SCHEMA["content"][1:]]}
    server = start(schemas=read_schemas([write_schema(tmp_path, changed, "changed.json")]))
    client = server.client()
    until(lambda: "prompt_schemas" in server.parts.batches.held.get(batch.id, ""))
    assert client.batches.retrieve(batch.id).status == "in_progress"
    server.close()
    client = start(schemas=schemas).client()
    assert ended(client, batch).request_counts.completed == 40
