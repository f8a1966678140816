"""Steps of a few layers of a model on the real executor, and what their times say.

Five kinds of steps, whose times beside their products are sums of the same five parts:

    few, many    4 or 64 rows of one token, each with few keys   step + rows x (token + draw)
    far          8 rows of one token, each with many keys        the same + bytes of keys and values
    first, last  a run of tokens, at the beginning or later      step + tokens + FLOPs of attention
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from batchwright import techniques
from batchwright.attention.backend import AttentionBackend
from batchwright.clock import VirtualClock
from batchwright.exec.layer_slice import NUM_LAYERS, LayerSlice, SliceSeconds
from batchwright.exec.local import LocalExecutor
from batchwright.exec.sim import SimExecutor
from batchwright.kv.groups import BLOCK_SIZE, KVGroup, windows_of_layers
from batchwright.models.causal_lm import CausalLM
from batchwright.plan.cost import row_keys
from batchwright.plan.shape import ModelShape
from batchwright.request import Int32Array, Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.sequence import Sequence
from batchwright.step import NewSequence, Step, TableUpdate

FEW, MANY, FAR_ROWS = 4, 64, 8
NEAR = BLOCK_SIZE
"""Keys of a row that has few."""

FAR = 2048
"""Keys of a row that has many, if memory allows."""

RUN = 256
"""Tokens of a run, if rows have as many."""

KV_BYTES = 96 * 2**20
"""Keys and values that the far rows read: more than caches hold."""

S_PER_STEP = 0.12
MIN_STEPS = 3
NUM_DECODED = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_DECODED, ignore_eos=True)
NOTHING: Int32Array = np.empty(0, np.int32)
LEAST = 1e-15
"""Where noise makes a part come out negative, it is this many seconds a byte or a FLOP."""


class Rest(NamedTuple):
    """What steps take beside their products; see `plan.cost.Hardware`."""

    step_s: float
    token_s: float
    draw_s: float
    kv_bytes_per_s: float
    attention_flops_per_s: float


class Measured(NamedTuple):
    """What was measured in steps.

    Attributes:
        products: (tokens of a step, seconds of the products of all layers), tokens ascending.
        busy: time by the clock, for one second of the thread's own.
    """

    rest: Rest
    products: tuple[tuple[int, float], ...]
    busy: float


def measure_steps(
    config: Mapping[str, Any],
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    attention: str,
    quantize: str | None = None,
    form: str = "fp32",
) -> Measured:
    """Time the five kinds of steps and solve for the parts.

    Args:
        config, shape: a model's config.json, and its shape.
        attention: name of the attention backend.
        quantize: as in EngineConfig.
        form: how fp32 weights of the layers are stored.
    """
    backend: AttentionBackend = techniques.find("attention.backends", attention).Backend()
    kv_itemsize = backend.kv_dtype(dtype).itemsize
    num_layers = min(NUM_LAYERS, shape.num_layers)
    token_bytes = shape.kv_elements_per_token() * kv_itemsize * num_layers / shape.num_layers
    blocks_per_row = int(KV_BYTES / (token_bytes * BLOCK_SIZE * FAR_ROWS))
    blocks_per_row = min(max(blocks_per_row, 2), FAR // BLOCK_SIZE)
    far = blocks_per_row * BLOCK_SIZE
    run = min(RUN, far // 2)
    kinds = {
        "few": [(NEAR - 1, NEAR)] * FEW,
        "many": [(NEAR - 1, NEAR)] * MANY,
        "far": [(far - 1, far)] * FAR_ROWS,
        "first": [(0, run)],
        "last": [(far - run, far)],
    }
    part = LayerSlice(
        config,
        dtype=dtype,
        max_positions=far,
        max_tokens=max(run, MANY),
        quantize=quantize,
        form=form,
    )
    executor, num_groups = _executor(part.model, shape, backend, dtype, far)
    executor.execute(_step(kinds["many"], num_groups, blocks_per_row, new=True))
    clock_s, own_s = time.perf_counter(), time.thread_time()
    equations, times_s, products = [], [], []
    for name, rows in kinds.items():
        step = _step(rows, num_groups, blocks_per_row)
        equations.append(_equation(step, shape, kv_itemsize))
        seconds = _usual(part, partial(executor.execute, step))
        products.append((step.num_tokens, seconds.products))
        times_s.append(seconds.rest + scheduling_s(MANY if name == "many" else FEW))
    busy = (time.perf_counter() - clock_s) / (time.thread_time() - own_s)
    executor.close()
    scale = np.abs(equations).max(axis=0)
    parts = np.linalg.solve(np.array(equations) / scale, times_s) / scale
    rest = Rest(
        *np.maximum(parts[:3], 0.0).tolist(),
        *(1 / np.maximum(parts[3:], LEAST)).tolist(),
    )
    return Measured(rest, tuple(sorted(products)), max(busy, 1.0))


def _usual(part: LayerSlice, execute: Callable[[], object]) -> SliceSeconds:
    """The median of what a step takes."""
    part.seconds(execute)
    seconds: list[SliceSeconds] = []
    end = time.thread_time() + S_PER_STEP
    while len(seconds) < MIN_STEPS or time.thread_time() < end:
        seconds.append(part.seconds(execute))
    return SliceSeconds(*(sorted(one)[len(one) // 2] for one in zip(*seconds, strict=True)))


def _equation(step: Step, shape: ModelShape, kv_itemsize: int) -> list[float]:
    """How many steps, tokens, draws, bytes and FLOPs of attention a step is."""
    pairs, read = row_keys(step, shape.attention)
    if step.num_rows < step.num_tokens:
        flops = shape.attention_flops([int(one.sum()) for one in pairs])
        return [1, step.num_tokens, len(step.sample_tokens), 0, flops]
    groups = zip(shape.attention, read, strict=True)
    num_bytes = sum(one.kv_elements * kv_itemsize * int(keys.sum()) for one, keys in groups)
    return [1, step.num_tokens, len(step.sample_tokens), num_bytes, 0]


def _executor(
    model: CausalLM,
    shape: ModelShape,
    backend: AttentionBackend,
    dtype: torch.dtype,
    far: int,
) -> tuple[LocalExecutor, int]:
    """(an executor for the model, its number of KV groups)."""
    windows, group_of_layer = windows_of_layers([spec.window for spec in model.attention_specs])
    num_blocks = max(FAR_ROWS * far // BLOCK_SIZE, MANY)
    executor = LocalExecutor(
        model,
        backend,
        [KVGroup(window, num_blocks) for window in windows],
        group_of_layer,
        block_size=BLOCK_SIZE,
        max_num_seqs=MANY,
        max_model_len=far,
        vocab_size=shape.vocab_size,
        kv_dtype=backend.kv_dtype(dtype),
    )
    for layer in executor._kv_layers:  # pages that were never written are not read from memory
        for values in (layer.keys, layer.values):  # type: ignore[attr-defined]
            values[:] = 0.01
    return executor, len(windows)


def _step(
    rows: list[tuple[int, int]], num_groups: int, blocks_per_row: int, *, new: bool = False
) -> Step:
    """Row i computes positions [start, end) in blocks of its own, and draws if it is one token."""
    num_rows = len(rows)
    slots = np.arange(num_rows, dtype=np.int32)
    positions = np.concatenate([np.arange(*row, dtype=np.int32) for row in rows])
    lengths = [end - start for start, end in rows]
    width = blocks_per_row if num_rows <= FAR_ROWS else 1
    block_ids = np.arange(num_rows * width, dtype=np.int32)
    update = TableUpdate(
        np.repeat(slots, width), np.tile(np.arange(width, dtype=np.int32), num_rows), block_ids
    )
    kv_slots = np.repeat(slots, lengths) * np.int32(width * BLOCK_SIZE) + positions
    draws = slots if num_rows == len(positions) else NOTHING
    return Step(
        step_id=0,
        finished_slots=NOTHING,
        new_sequences=tuple(_new_sequence(slot) for slot in range(num_rows)) if new else (),
        table_updates=(update,) * num_groups,
        block_copies=(np.empty((0, 2), np.int32),) * num_groups,
        slots=slots,
        cu_seqlens_q=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        token_ids=np.zeros_like(positions),
        positions=positions,
        kv_slots=(kv_slots,) * num_groups,
        sample_tokens=draws,
        sample_slots=draws,
        score_tokens=NOTHING,
        score_targets=NOTHING,
    )


def _new_sequence(slot: int) -> NewSequence:
    return NewSequence(slot, np.zeros(NEAR - 1, np.int32), NEAR - 1, GREEDY, slot, 0, ())


def scheduling_s(num_rows: int) -> float:
    """Seconds of deciding on one step in which so many rows go on by a token each."""
    scheduler = Scheduler(
        [KVGroup(None, 2 * num_rows)],
        block_size=BLOCK_SIZE,
        max_num_seqs=num_rows,
        max_num_batched_tokens=max(num_rows * NEAR, 512),
        max_model_len=NEAR + NUM_DECODED,
    )
    for row in range(num_rows):
        prompt = np.full(NEAR, row, np.int32)
        request = Request(id=str(row), prompt_token_ids=prompt, params=GREEDY)
        scheduler.add(
            Sequence(
                request=request,
                order=row,
                sample_index=0,
                end_token_ids=(),
                noise_key=row,
                max_len=NEAR + NUM_DECODED,
                token_ids=prompt,
            )
        )
    executor = SimExecutor(VirtualClock())
    times_s = []
    while scheduler.num_unfinished:
        start_s = time.thread_time()
        step = scheduler.schedule()
        assert step is not None
        scheduled_s = time.thread_time()
        result = executor.execute(step)
        executed_s = time.thread_time()
        scheduler.update(result)
        times_s.append(time.thread_time() - executed_s + scheduled_s - start_s)
    return sorted(times_s)[len(times_s) // 4]
