"""Section `sampling`: what drawing takes, against reading the logits once.

bf16 and fp32 logits of 128,256 tokens (Llama 3) that fall off as a model's do. Rows: greedy, a
temperature alone, top-p 0.95, top-k 50 with top-p, min-p 0.05, penalties with 1,000 tokens of
history, a grammar mask, log-probabilities with five rivals; torch's argmax, and its softmax with
exponential noise, for comparison. The limit is the bytes of the logits, once, at the copy
bandwidth. Sets of logits take turns, so that none is found in the cache.

`starting`: the host's time to send what 64 rows with penalties want that start in one step (1,000
tokens of history each) while the card has BUSY_CYCLES of work queued. It is the host's own work;
were it to wait for the card it would take as long as that work, `busy_ms`.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch

from batchwright.exec.device.layout import Layout
from batchwright.exec.device.sampler import DeviceSampler
from batchwright.exec.device.transfer import Upload
from batchwright.kernels.sample.layout import SLOT
from batchwright.kernels.sample.triton import make_scratch, sample_rows
from batchwright.kernels.token_logprobs.triton import logprob_rows
from batchwright.request import SamplingParams
from batchwright.step import NewSequence, Step
from benchmarks.gpu.card import Budget, Call, Timer, ceilings

ROWS = (1, 16, 64, 256, 512)
VOCAB_SIZE = 128256
CACHE_BYTES = 200 << 20
NUM_STARTING, NUM_HISTORY = 64, 1000
BUSY_CYCLES = 40_000_000

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
    starting = _starting(timer.device, vocab_size)
    return {"ceilings": limits, "lines": lines, "left_out": left_out, "starting": starting}


def _starting(device: str, vocab_size: int) -> dict[str, float]:
    """Medians of five, ms."""
    there = torch.device(device)
    sampler = DeviceSampler(NUM_STARTING, 4 * NUM_HISTORY, vocab_size, there)
    upload, none = Upload(4 << 20, there), np.empty(0, np.int32)
    params = SamplingParams(repetition_penalty=1.1)
    prompts = np.random.default_rng(0).integers(0, vocab_size, (NUM_STARTING, NUM_HISTORY))
    rows = tuple(
        NewSequence(slot, prompt.astype(np.int32), NUM_HISTORY, params, slot, 0, ())
        for slot, prompt in enumerate(prompts)
    )
    step = Step(
        step_id=0, finished_slots=none, new_sequences=rows, table_updates=(), block_copies=(),
        slots=none, cu_seqlens_q=none, token_ids=none, positions=none, kv_slots=(),
        sample_tokens=none, sample_slots=none, score_tokens=none, score_targets=none,
    )  # fmt: skip
    host_s, all_s = [], []
    for _ in range(6):
        if there.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(BUSY_CYCLES)
        start = time.perf_counter()
        for row in rows:
            sampler.add(row)
        arrays = sampler.inputs(step, none)
        layout = Layout.of(arrays)
        layout.write(arrays, upload.begin(layout.end))
        sampler.apply(layout.views(upload.send(layout.end)))
        host_s.append(time.perf_counter() - start)
        if there.type == "cuda":
            torch.cuda.synchronize()
        all_s.append(time.perf_counter() - start)
    # the first is of memory that nobody has touched
    return {"host_ms": 1e3 * median(host_s[1:]), "busy_ms": 1e3 * median(all_s[1:])}


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
    lines = "\n".join(
        f"{line['what']:28}{line['dtype']:9}{line['rows']:5} rows{line['us']:10.2f} us"
        f"{line['share_of_one_read']:8.1%} of one read"
        for line in found["lines"]
    )
    starting = found["starting"]
    return (
        f"{lines}\n{NUM_STARTING} rows with penalties start: {starting['host_ms']:.2f} ms of the "
        f"host, while the card is busy for {starting['busy_ms']:.2f} ms"
    )
