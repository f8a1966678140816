"""The four workloads (`batchwright/bench/workloads.py`) as files.

    python -m benchmarks.workloads OUT_DIR [--scale 0.5] [--seed 20260] [--model smollm2]

writes OUT_DIR/W1.jsonl to W4.jsonl for engines that are measured elsewhere, one request a line:
`{"id", "prompt", "prompt_ids", "max_new", "groups"}`. Lengths are exact in `prompt_ids`; `prompt`
is their text, which may encode to a few tokens more or less.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from batchwright.bench.workloads import (
    DEFAULT_SEED,
    build_workloads,
    num_prompt_tokens,
    plain_encoder,
)


def main() -> None:
    """Write the workloads as files."""
    parser = argparse.ArgumentParser(description="Write the workloads as JSONL files.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()

    from batchwright.text.tokenizer import load_tokenizer
    from batchwright.weights.locate import locate_model

    tokenizer = load_tokenizer(locate_model(args.model))
    workloads = build_workloads(plain_encoder(tokenizer.encode), scale=args.scale, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, requests in workloads.items():
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index, request in enumerate(requests):
                row = {
                    "id": index,
                    "prompt": tokenizer.decode(request.prompt_token_ids),
                    "prompt_ids": request.prompt_token_ids,
                    "max_new": request.num_output_tokens,
                    "groups": request.groups,
                }
                file.write(json.dumps(row) + "\n")
        print(f"{name}: {len(requests)} requests, {num_prompt_tokens(requests)} prompt tokens")


if __name__ == "__main__":
    main()
