"""Section `swap`: keys and values that go to the host and come back, alone and in a job.

Alone: blocks in the shape of Llama-3-8B's are saved and loaded; what comes back is compared, and
gigabytes a second are those of the bus. In a job: rows of 8 prefixes of 2,048 tokens in turns, in
memory for three, on random weights in that shape; with all memory, and with little with and without
room on the host. A line has seconds, prompt tokens computed and blocks copied.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch

from batchwright.exec.device.host_blocks import HostBlocks
from batchwright.request import Request, SamplingParams
from benchmarks.gpu.card import Budget, Timer
from benchmarks.gpu.engine import LLAMA_8B, TINY
from benchmarks.gpu.under_test import make_engine, random_model

NUM_PREFIXES, PREFIX, NUM_ROWS, OUTPUT = 8, 2048, 64, 64
DRY = {"prefix": 96, "rows": 16, "output": 3}


def run(timer: Timer, budget: Budget) -> dict[str, Any]:
    """Both parts; `failed` counts what came back wrong."""
    dry = timer.device == "cpu"
    found: dict[str, Any] = {"bus": _bus(timer.device, num_blocks=4 if dry else 128)}
    found["failed"] = int(not found["bus"]["equal"])
    config = LLAMA_8B | TINY if dry else dict(LLAMA_8B)
    dtype = torch.float32 if dry else torch.bfloat16
    # with 3 slots, no more is kept than 3 sequences of full length: all prefixes must fit in that
    length = 512 if dry else 8704
    model = random_model(config, dtype, timer.device, length)
    prefix = DRY["prefix"] if dry else PREFIX
    little = 3 * (prefix + prefix // 8)
    found["lines"] = []
    if not dry:  # compiles, takes the memory
        _job(model, config, timer.device, length, None, has_host=False, num_rows=3)
    for name, kv_tokens, has_host in (
        ("all memory", None, False),
        ("little memory", little, False),
        ("little memory and the host", little, True),
    ):
        if budget.is_spent():
            found.setdefault("left_out", []).append(name)
            continue
        line = _job(model, config, timer.device, length, kv_tokens, has_host=has_host)
        found["lines"].append({"what": name} | line)
    return found


def _bus(device: str, num_blocks: int) -> dict[str, Any]:
    """Seconds of saving and of loading blocks of 32 tokens, and whether they are the same after."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    kv = torch.randn(32, 2, 2 * num_blocks, 8, 32, 128, device=device).to(dtype)
    host = HostBlocks(kv, num_blocks)
    blocks = torch.randperm(2 * num_blocks, device=device)[:num_blocks]
    before = kv.index_select(2, blocks)
    ids = list(range(num_blocks))
    host.save(kv, blocks, ids)  # pins the host's memory
    seconds = {}
    for what in ("save", "load"):
        if what == "load":
            kv.zero_()
        _wait(device)
        start = time.perf_counter()
        if what == "save":
            host.save(kv, blocks, ids)
        else:
            host.save(kv, blocks[:0], [])
            host.load(kv, ids, blocks)
        _wait(device)
        seconds[what] = time.perf_counter() - start
    num_bytes = before.numel() * before.element_size()
    return {
        "equal": bool(torch.equal(kv.index_select(2, blocks), before)),
        "bytes": num_bytes,
        **{f"{what}_bytes_per_s": num_bytes / one for what, one in seconds.items()},
    }


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _job(
    model: Any,
    config: dict[str, Any],
    device: str,
    length: int,
    kv_tokens: int | None,
    *,
    has_host: bool,
    num_rows: int | None = None,
) -> dict[str, Any]:
    dry = device == "cpu"
    settings: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 2048}
    if dry:
        settings["max_num_batched_tokens"] = 64
    if has_host and not dry:  # a CPU has no host beside it: then the same with nothing to copy to
        settings["swap_space_bytes"] = 16 << 30
    engine, _, about = make_engine(
        model, device, max_model_len=length, kv_tokens=kv_tokens, **settings
    )
    rng = np.random.default_rng(0)
    prefix, all_rows, num_output = (PREFIX, NUM_ROWS, OUTPUT) if not dry else DRY.values()
    prefixes = rng.integers(3, config["vocab_size"], (NUM_PREFIXES, prefix))
    requests = [
        Request(
            id=str(index),
            prompt_token_ids=np.append(prefixes[index % NUM_PREFIXES], [7, 9 + index]).astype(
                np.int32
            ),
            params=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
        )
        for index in range(num_rows or all_rows)
    ]
    start = time.perf_counter()
    failed = [result.error for result in engine.run(requests) if result.error is not None]
    seconds = time.perf_counter() - start
    stats = dataclasses.replace(engine.stats)
    engine.close()
    return {
        "seconds": seconds,
        "failed_rows": len(failed),
        "computed_tokens": stats.num_computed_tokens,
        "swapped_blocks": stats.num_swapped_blocks,
        "kv_tokens": about["kv_tokens"],
    }


def table(found: dict[str, Any]) -> str:
    """A line for the bus, and one for each job."""
    bus = found["bus"]
    lines = [
        f"bus: saves {bus['save_bytes_per_s'] / 1e9:.1f} GB/s, loads "
        f"{bus['load_bytes_per_s'] / 1e9:.1f} GB/s, "
        + ("the same after" if bus["equal"] else "NOT the same after")
    ]
    lines += [
        f"{line['what']:28} {line['seconds']:6.2f} s, {line['computed_tokens']} tokens computed, "
        f"{line['swapped_blocks']} blocks copied"
        for line in found["lines"]
    ]
    return "\n".join(lines)
