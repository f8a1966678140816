"""Single calls of the real server with the real model; tests/compat compares batches with files."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from batchwright.job.rows import CHAT
from tests.server.running import begin, ended, lines_of, until
from tests.server.serving import serving

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


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
