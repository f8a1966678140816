"""transformers: `generate` on static batches, sorted by output then prompt length, left padded.

A batch runs to the longest output in it; only the tokens that were asked for count. It is also the
reference: where its greedy tokens part from ours it tells how close its two best tokens were.
"""

from __future__ import annotations

import time
from typing import Any

from peer_job import Job, Row, read_job

BATCH_SIZE = 16


def main() -> None:
    """Load, warm up, run, answer."""
    job = read_job()
    import torch
    import transformers

    torch.set_num_threads(job.num_threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run(rows: list[Row]) -> list[list[int]]:
        ordered = sorted(rows, key=lambda row: (row.num_output_tokens, len(row.prompt_token_ids)))
        token_ids: dict[int, list[int]] = {}
        for first in range(0, len(ordered), BATCH_SIZE):
            batch = ordered[first : first + BATCH_SIZE]
            for row, output in zip(batch, _generate(model, batch, torch), strict=True):
                token_ids[row.index] = output[: row.num_output_tokens]
        return [token_ids[row.index] for row in rows]

    run([Row(0, list(range(1, 33)), 2)])
    settings = {"batch_size": BATCH_SIZE, "dtype": job.dtype, "attention": "sdpa"}
    job.loaded(transformers.__version__, settings)
    start = time.perf_counter()
    token_ids = run(job.rows)
    seconds = time.perf_counter() - start
    job.finished(seconds, token_ids, margins=_margins(model, job, token_ids, torch))


def _generate(model: Any, batch: list[Row], torch: Any) -> list[list[int]]:
    """Output tokens of a batch, as many for each row as the longest output has."""
    width = max(len(row.prompt_token_ids) for row in batch)
    num_new = max(row.num_output_tokens for row in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for line, row in enumerate(batch):
        start = width - len(row.prompt_token_ids)
        token_ids[line, start:] = torch.tensor(row.prompt_token_ids)
        mask[line, start:] = 1
    with torch.inference_mode():
        outputs = model.generate(
            input_ids=token_ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new
        )
    rows: list[list[int]] = outputs[:, width:].tolist()
    return rows


def _margins(model: Any, job: Job, token_ids: list[list[int]], torch: Any) -> list[float]:
    """Of each row that parts from ours: difference of the two highest logits there, alone."""
    margins = []
    for row, theirs, ours in zip(
        job.rows, token_ids, job.our_token_ids() or token_ids, strict=True
    ):
        pairs = enumerate(zip(theirs, ours, strict=True))
        parted = next((index for index, (a, b) in pairs if a != b), None)
        if parted is not None:
            before = torch.tensor([row.prompt_token_ids + theirs[:parted]])
            with torch.inference_mode():
                logits = model(before, logits_to_keep=1).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            margins.append(first - second)
    return margins


if __name__ == "__main__":
    main()
