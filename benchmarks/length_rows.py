"""Rows whose lengths vary: ten ways to ask about twelve texts, answered once by SmolLM2.

    python -m benchmarks.length_rows rows.jsonl              # the requests
    batchwright run rows.jsonl -o out.jsonl --model smollm2
    python -m benchmarks.length_rows --record out.jsonl      # keeps their lengths in results/

Only lengths are kept, not texts: benchmarks.lengths makes the same prompts again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from batchwright.bench.workloads import SNIPPETS
from benchmarks.machine import describe_commit, describe_machine, describe_versions

MAX_TOKENS = 256
NUM_TEXTS = 12
RECORD = Path(__file__).parent / "results" / "2026-11-26-length-rows.json"

FAMILIES = {
    "sentiment": "Answer with one word, positive, negative or neutral. What is the mood of: {}",
    "question": "Write one question that this text answers, and nothing else: {}",
    "title": "Give a title of at most five words for: {}",
    "translate": "Translate into French: {}",
    "rewrite": "Rewrite in simpler words, in one sentence: {}",
    "keywords": "List five keywords, separated by commas, for: {}",
    "why": "In two or three sentences, why might somebody write this? {}",
    "poem": "Write a poem of eight lines about: {}",
    "story": "Write a short story that begins with this sentence: {}",
    "lesson": "Explain step by step everything a student should learn from this text: {}",
}


def bodies() -> list[tuple[str, dict[str, Any]]]:
    """(custom_id, body) of every row: the id is FAMILY-NUMBER."""
    return [
        (
            f"{family}-{number:02}",
            {
                "messages": [{"role": "user", "content": text.format(snippet)}],
                "max_tokens": MAX_TOKENS,
                "temperature": 0.7,
                "top_p": 0.95,
            },
        )
        for family, text in FAMILIES.items()
        for number, snippet in enumerate(SNIPPETS[:NUM_TEXTS])
    ]


def lengths_of(path: Path) -> dict[str, int]:
    """Output tokens of every row of a results file, by custom_id."""
    lengths = {}
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            lengths[line["custom_id"]] = line["response"]["body"]["usage"]["completion_tokens"]
    return lengths


def main() -> None:
    """Write the requests, or keep the lengths of the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="where requests are written, or answers are read")
    parser.add_argument("--record", action="store_true", help="keep the lengths of the answers")
    arguments = parser.parse_args()
    if not arguments.record:
        with arguments.path.open("w", encoding="utf-8") as file:
            for custom_id, body in bodies():
                row = {
                    "custom_id": custom_id,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body,
                }
                file.write(json.dumps(row) + "\n")
        return
    lengths = lengths_of(arguments.path)
    record = {
        "model": "SmolLM2-135M-Instruct",
        "max_tokens": MAX_TOKENS,
        "lengths": [(*custom_id.rsplit("-", 1), lengths[custom_id]) for custom_id, _ in bodies()],
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "numba"),
        "commit": describe_commit(),
    }
    RECORD.write_text(json.dumps(record, indent=None) + "\n", encoding="utf-8")
    print(f"{len(lengths)} lengths in {RECORD}")


if __name__ == "__main__":
    main()
