"""transformers' `generate` on the same weights and requests, in a process of its own.

Static batches of 16, sorted by output then prompt length, left padded, end tokens ignored. A batch
runs to the longest output in it; only the tokens that were asked for count. The process of its own
keeps the two engines' memory and threads apart; it waits while the other one runs.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.workloads import WorkRequest

BATCH_SIZE = 16


class BaselineRun(NamedTuple):
    """Outcome of one workload: greedy token ids per request, in input order."""

    seconds: float
    token_ids: list[list[int]]
    peak_bytes: int


class TransformersBaseline:
    """A worker process that holds transformers' model, made of the weights we read.

    Args:
        path: a Llama-family model that `batchwright` can open.
        num_threads: torch's threads.
        spin_count: GOMP_SPINCOUNT as the user has it. Importing batchwright changes it for
            this process and its children; the baseline gets what its own users get.
    """

    def __init__(self, path: Path, num_threads: int, spin_count: str | None) -> None:
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=get_context("spawn"),
            initializer=_load,
            initargs=(path, num_threads, spin_count),
        )

    def __enter__(self) -> TransformersBaseline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def run(self, requests: list[WorkRequest]) -> BaselineRun:
        """Generate for all requests. Waits for the model to be loaded and warm, untimed."""
        self._pool.submit(_warm_up).result()
        return self._pool.submit(_run, requests).result()

    def top2_margin(self, token_ids: list[int]) -> float:
        """Difference of the two highest logits after these tokens, computed alone."""
        return self._pool.submit(_top2_margin, token_ids).result()


_worker: dict[str, Any] = {}
"""The worker process's model; the parent's stays empty."""


def _load(path: Path, num_threads: int, spin_count: str | None) -> None:
    os.environ.pop("GOMP_SPINCOUNT", None)
    if spin_count is not None:
        os.environ["GOMP_SPINCOUNT"] = spin_count
    import torch  # which reads it once, here
    from transformers import LlamaConfig, LlamaForCausalLM

    from batchwright.weights.checkpoint import open_checkpoint

    torch.set_num_threads(num_threads)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert config["model_type"] == "llama", "the baseline builds Llama models only"
    model = LlamaForCausalLM(LlamaConfig(**config))
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # outputs have forced lengths
    model.generation_config.pad_token_id = 0
    _worker["model"] = model.eval()


def _warm_up() -> None:
    _generate_batch([WorkRequest(list(range(1, 33)), 2)])


def _run(requests: list[WorkRequest]) -> BaselineRun:
    from benchmarks.machine import PeakMemory

    def lengths(index: int) -> tuple[int, int]:
        request = requests[index]
        return request.num_output_tokens, len(request.prompt_token_ids)

    order = sorted(range(len(requests)), key=lengths)
    token_ids: list[list[int]] = [[] for _ in requests]
    with PeakMemory() as memory:
        start = time.perf_counter()
        for first in range(0, len(order), BATCH_SIZE):
            batch = order[first : first + BATCH_SIZE]
            outputs = _generate_batch([requests[index] for index in batch])
            for index, output in zip(batch, outputs, strict=True):
                token_ids[index] = output
        seconds = time.perf_counter() - start
    return BaselineRun(seconds, token_ids, memory.peak_bytes)


def _generate_batch(batch: list[WorkRequest]) -> list[list[int]]:
    import torch

    width = max(len(request.prompt_token_ids) for request in batch)
    num_new = max(request.num_output_tokens for request in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, request in enumerate(batch):
        token_ids[row, width - len(request.prompt_token_ids) :] = torch.tensor(
            request.prompt_token_ids
        )
        mask[row, width - len(request.prompt_token_ids) :] = 1
    with torch.inference_mode():
        outputs = _worker["model"].generate(
            input_ids=token_ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new
        )
    assert outputs.shape[1] == width + num_new
    rows = outputs[:, width:].tolist()
    return [row[: request.num_output_tokens] for row, request in zip(rows, batch, strict=True)]


def _top2_margin(token_ids: list[int]) -> float:
    import torch

    with torch.inference_mode():
        logits = _worker["model"](torch.tensor([token_ids]), logits_to_keep=1).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second
