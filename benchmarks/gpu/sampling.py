"""Section `sampling`: what drawing takes, against reading the logits once.

bf16 and fp32 logits of 128,256 tokens (Llama 3) that fall off as a model's do. Rows: greedy, a
temperature alone, top-p 0.95, top-k 50 with top-p, min-p 0.05, penalties with 1,000 tokens of
history, a grammar mask, log-probabilities with five rivals; torch's argmax, and its softmax with
exponential noise, for comparison. The limit is the bytes of the logits, once, at the copy
bandwidth. Sets of logits take turns, so that none is found in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.triton import make_scratch, sample_rows
from batchwright.kernels.token_logprobs.triton import logprob_rows
from benchmarks.gpu.card import Budget, Call, Timer, ceilings

ROWS = (1, 16, 64, 256, 512)
VOCAB_SIZE = 128256
CACHE_BYTES = 200 << 20

SLOTS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top_p": {"top_p": 0.95},
    "top_k, top_p": {"top_k": 50, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "top_p, hot": {"top_p": 0.95, "temperature": 2},
    "penalties": {"repetition_penalty": 1.1, "num_prompt_tokens": 500, "num_tokens": 1000},
    "mask": {},
}


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """All lines; `left_out` counts those that the budget did not reach."""
    limits = ceilings(timer)
    small = timer.device == "cpu"
    vocab_size = 200 if small else VOCAB_SIZE
    lines, left_out = [], 0
    for dtype in (torch.float32,) if small else (torch.bfloat16, torch.float32):
        for rows in (2,) if small else ROWS:
            sets = _sets(rows, vocab_size, dtype, timer.device)
            makers = dict.fromkeys(SLOTS, _draw) | {
                "logprobs, 5 rivals": _logprobs,
                "torch argmax": _argmax,
                "torch softmax and noise": _softmax,
            }
            for name, make in makers.items():
                if budget.is_spent():
                    left_out += 1
                    continue
                seconds, spread = timer.seconds([make(name, logits) for logits in sets])
                lines.append(
                    {
                        "what": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "rows": rows,
                        "us": seconds * 1e6,
                        "spread": spread,
                        "share_of_one_read": sets[0].nbytes / limits["copy_bytes_per_s"] / seconds,
                    }
                )
    return {"ceilings": limits, "lines": lines, "left_out": left_out}


def _sets(rows: int, vocab_size: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Logits 0.3 normal - 1.2 log(rank + 5), shuffled: about 2,000 tokens hold 95 %."""
    count = 1 if device == "cpu" else max(1, min(32, CACHE_BYTES // (2 * rows * vocab_size)))
    falling = -1.2 * torch.log(torch.arange(vocab_size, device=device) + 5.0)
    sets = []
    for _ in range(count):
        noise = 0.3 * torch.randn(rows, vocab_size, device=device)
        order = torch.randperm(vocab_size, device=device)
        sets.append((3 * (noise + falling[order])).to(dtype))
    return sets


def _draw(name: str, logits: torch.Tensor) -> Call:
    rows, vocab_size, device = *logits.shape, logits.device
    slots = np.zeros(rows, SLOT)
    slots["temperature"] = slots["top_p"] = slots["repetition_penalty"] = 1
    slots["noise_key"] = np.arange(rows)
    for field, value in SLOTS[name].items():
        slots[field] = value
    there = torch.from_numpy(slots.view(np.uint8).reshape(rows, SLOT.itemsize)).to(device)
    index = torch.arange(rows, dtype=torch.int32, device=device)
    tables = {
        "bias_ids": index[:, None],
        "bias_values": index[:, None].float(),
        "suppressed_ids": index[:, None],
        "history": torch.randint(0, vocab_size, (rows, 1000), dtype=torch.int32, device=device),
    }
    if name == "mask":
        words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocab_size // 32)), device=device)
        tables |= {"allowed": words.int(), "mask_of_sample": index}
    special = name not in ("greedy", "temperature", "mask")
    scratch = make_scratch(rows, vocab_size, device) if special else None
    return lambda: sample_rows(logits, index, index, index, there, **tables, scratch=scratch)


def _logprobs(name: str, logits: torch.Tensor) -> Call:
    index = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    scratch = make_scratch(len(logits), logits.shape[1], logits.device)[2:]
    num_top = torch.full_like(index, 5)
    return lambda: logprob_rows(logits, index, index, num_top, max_top=5, scratch=scratch)


def _argmax(name: str, logits: torch.Tensor) -> Call:
    return lambda: logits.argmax(-1)


def _softmax(name: str, logits: torch.Tensor) -> Call:
    # exponential noise, since torch.multinomial waits for the device to check its input
    return lambda: (
        logits.softmax(-1, dtype=torch.float32)
        .div_(torch.empty(logits.shape, device=logits.device).exponential_())
        .argmax(-1)
    )


def table(found: dict[str, Any]) -> str:
    """One line per kind of row and number of rows."""
    return "\n".join(
        f"{line['what']:28}{line['dtype']:9}{line['rows']:5} rows{line['us']:10.2f} us"
        f"{line['share_of_one_read']:8.1%} of one read"
        for line in found["lines"]
    )
