"""Steps of the first layers of a model on the real executor, and what their times say.

Five kinds of steps, whose times beside their products are sums of the same five parts:

    few, many    4 or 64 rows of one token, each with few keys   step + rows x (token + draw)
    far          8 rows of one token, each with many keys        the same + bytes of keys and values
    first, last  a run of tokens, at the beginning or later      step + tokens + FLOPs of attention
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from batchwright import techniques
from batchwright.attention.backend import AttentionBackend
from batchwright.attention.backends.numba import Backend
from batchwright.clock import VirtualClock
from batchwright.engine import Engine
from batchwright.exec.layer_slice import NUM_LAYERS, LayerSlice, SliceSeconds
from batchwright.exec.local import LocalExecutor
from batchwright.exec.sim import SimExecutor
from batchwright.exec.step_programs import RECORD_AT, StepPrograms
from batchwright.kernels.ticks import ticks_per_second
from batchwright.kv.groups import BLOCK_SIZE, KVGroup, windows_of_layers
from batchwright.plan.cost import row_keys
from batchwright.plan.shape import ModelShape
from batchwright.request import Int32Array, Request, SamplingParams
from batchwright.sched.scheduler import Scheduler
from batchwright.step import NewSequence, Step, StepResult, TableUpdate

FEW, MANY, FAR_ROWS = 4, 64, 8
NEAR = BLOCK_SIZE
"""Keys of a row that has few."""

FAR = 2048
"""Keys of a row that has many, if memory allows."""

RUN = 256
"""Tokens of a run, if rows have as many."""

KV_BYTES = 96 * 2**20
"""Keys and values that the far rows read: more than caches hold."""

WEIGHTS = 128 * 10**6
"""Of the layers in which steps of single tokens run, at least NUM_LAYERS: in a small model what
stands around the products counts, and in few layers it would find itself in the caches."""

S_PER_STEP = 0.12
MIN_STEPS = 3
WARM_UP = RECORD_AT + 1
"""Steps after which one of few tokens is a program."""
NUM_DECODED = (16, 64)
"""Tokens of rows, in a short and in a long run of an engine without a model."""

GREEDY = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
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
    kv_itemsize = backend.element_bytes(dtype, shape.attention[0].head_dim)
    make = partial(_Slice, config, shape, backend, dtype, quantize, form)
    num_layers = max(NUM_LAYERS, int(WEIGHTS * shape.num_layers / _weights(shape)))
    num_layers = min(num_layers, shape.num_layers)
    runs = make(min(NUM_LAYERS, shape.num_layers))
    decoding = make(num_layers) if num_layers > NUM_LAYERS else runs
    run = min(RUN, runs.far // 2)
    kinds = (
        (decoding, [(NEAR - 1, NEAR)] * FEW),
        (decoding, [(NEAR - 1, NEAR)] * MANY),
        (decoding, [(decoding.far - 1, decoding.far)] * FAR_ROWS),
        (runs, [(0, run)]),
        (runs, [(runs.far - run, runs.far)]),
    )
    clock_s, own_s = time.perf_counter(), time.thread_time()
    equations, times_s, products = [], [], []
    for part, rows in kinds:
        steps = part.steps(rows)
        equations.append(_equation(steps[0], shape, kv_itemsize))
        seconds = part.usual_s(steps)
        products.append((steps[0].num_tokens, seconds.products))
        times_s.append(seconds.rest + engine_s(len(rows)))
    busy = (time.perf_counter() - clock_s) / (time.thread_time() - own_s)
    runs.close()
    decoding.close()
    scale = np.abs(equations).max(axis=0)
    parts = np.linalg.solve(np.array(equations) / scale, times_s) / scale
    rest = Rest(
        *np.maximum(parts[:3], 0.0).tolist(),
        *(1 / np.maximum(parts[3:], LEAST)).tolist(),
    )
    return Measured(rest, tuple(sorted(products)), max(busy, 1.0))


def _weights(shape: ModelShape) -> int:
    """Weights of all layers."""
    return sum(one.in_features * one.out_features * one.num_weights for one in shape.products)


def _equation(step: Step, shape: ModelShape, kv_itemsize: float) -> list[float]:
    """How many steps, tokens, draws, bytes and FLOPs of attention a step is."""
    pairs, read = row_keys(step, shape.attention)
    if step.num_rows < step.num_tokens:
        flops = shape.attention_flops([int(one.sum()) for one in pairs])
        return [1, step.num_tokens, len(step.sample_tokens), 0, flops]
    groups = zip(shape.attention, read, strict=True)
    num_bytes = sum(one.kv_elements * kv_itemsize * int(keys.sum()) for one, keys in groups)
    return [1, step.num_tokens, len(step.sample_tokens), num_bytes, 0]


class _Slice:
    """The first layers of a model on an executor, with as many keys as do not fit in caches.

    Attributes:
        far: keys of a row that has many.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        shape: ModelShape,
        backend: AttentionBackend,
        dtype: torch.dtype,
        quantize: str | None,
        form: str,
        num_layers: int,
    ) -> None:
        element_bytes = backend.element_bytes(dtype, shape.attention[0].head_dim)
        token_bytes = shape.kv_elements_per_token() * element_bytes
        layers_bytes = token_bytes * num_layers / shape.num_layers
        blocks = int(KV_BYTES / (layers_bytes * BLOCK_SIZE * FAR_ROWS))
        self._blocks_per_row = min(max(blocks, 2), FAR // BLOCK_SIZE)
        self.far = self._blocks_per_row * BLOCK_SIZE
        self._num_blocks = max(FAR_ROWS * self._blocks_per_row, 2 * MANY)
        self._part = LayerSlice(
            config,
            dtype=dtype,
            max_positions=self.far,
            max_tokens=max(min(RUN, self.far), MANY),
            num_layers=num_layers,
            quantize=quantize,
            form=form,
        )
        model = self._part.model
        windows, group_of_layer = windows_of_layers([spec.window for spec in model.attention_specs])
        self._num_groups = len(windows)
        self._executor = LocalExecutor(
            model,
            backend,
            [KVGroup(window, self._num_blocks) for window in windows],
            group_of_layer,
            block_size=BLOCK_SIZE,
            max_num_seqs=MANY,
            max_model_len=self.far,
            vocab_size=shape.vocab_size,
        )
        # A program keeps its weights, so as many as there are weights take turns. Where it cannot
        # tell what its kernels take, steps are timed call by call.
        self._programs: list[StepPrograms | None] = [None]
        if isinstance(backend, Backend) and ticks_per_second():
            kv_layers = self._executor._kv_layers
            self._programs = [
                StepPrograms(model, backend, kv_layers, group_of_layer)
                for _ in range(self._part.num_turns)
            ]
        for layer in self._executor._kv_layers:  # pages never written are not read from memory
            for values in (layer.keys, layer.values):  # type: ignore[attr-defined]
                values[:] = 0.01
        start = self._step([(NEAR - 1, NEAR)] * MANY, 0, new=True)
        self._executor.execute(start)

    def steps(self, rows: list[tuple[int, int]]) -> list[Step]:
        """Steps of these rows in blocks that take turns: what is written is in no cache."""
        num_used = len(rows) * self._width(len(rows))
        return [
            self._step(rows, first) for first in range(0, self._num_blocks - num_used + 1, num_used)
        ]

    def usual_s(self, steps: list[Step]) -> SliceSeconds:
        """The median of what such steps take."""
        turns = itertools.cycle(steps)

        def execute() -> None:
            self._executor.execute(next(turns))

        is_run = steps[0].num_tokens > MANY  # what it computes takes longer than reading weights
        all_programs = self._programs[:1] if is_run else self._programs
        for _ in range(WARM_UP):
            for programs in all_programs:
                self._executor.programs = programs
                self._part.seconds(execute)
        seconds: list[SliceSeconds] = []
        end = time.thread_time() + S_PER_STEP
        for programs in itertools.cycle(all_programs):
            self._executor.programs = programs
            seconds.append(self._part.seconds(execute, programs))
            if len(seconds) >= MIN_STEPS and time.thread_time() > end:
                break
        return SliceSeconds(*(sorted(one)[len(one) // 2] for one in zip(*seconds, strict=True)))

    def close(self) -> None:
        """Give the memory back."""
        self._executor.close()
        self._part.close()

    def _width(self, num_rows: int) -> int:
        """Blocks of a row."""
        return self._blocks_per_row if num_rows <= FAR_ROWS else 1

    def _step(self, rows: list[tuple[int, int]], first_block: int, *, new: bool = False) -> Step:
        return _step(rows, self._num_groups, self._width(len(rows)), first_block, new=new)


def _step(
    rows: list[tuple[int, int]], num_groups: int, width: int, first_block: int, *, new: bool
) -> Step:
    """Row i computes positions [start, end) in `width` blocks of its own; one token is drawn from.

    Args:
        first_block: of the first row; those of the others follow.
    """
    num_rows = len(rows)
    slots = np.arange(num_rows, dtype=np.int32)
    positions = np.concatenate([np.arange(*row, dtype=np.int32) for row in rows])
    lengths = [end - start for start, end in rows]
    block_ids = np.arange(first_block, first_block + num_rows * width, dtype=np.int32)
    update = TableUpdate(
        np.repeat(slots, width), np.tile(np.arange(width, dtype=np.int32), num_rows), block_ids
    )
    first_slots = (first_block + slots * width) * BLOCK_SIZE
    kv_slots = (np.repeat(first_slots, lengths) + positions).astype(np.int32)
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


def engine_s(num_rows: int) -> float:
    """Seconds the engine takes for a step in which so many rows go on by a token each.

    Scheduling, and taking the results in; the time that a longer run takes more.
    """
    short, long = (_engine_run_s(num_rows, num_tokens) for num_tokens in NUM_DECODED)
    return max(long - short, 0.0) / (NUM_DECODED[1] - NUM_DECODED[0])


def _engine_run_s(num_rows: int, num_decoded: int) -> float:
    """Of the thread, without what pretending a model takes."""
    scheduler = Scheduler(
        [KVGroup(None, num_rows * (2 + num_decoded // BLOCK_SIZE))],
        block_size=BLOCK_SIZE,
        max_num_seqs=num_rows,
        max_num_batched_tokens=max(num_rows * NEAR, 512),
        max_model_len=NEAR + num_decoded,
    )
    executor = _Pretended(VirtualClock())
    engine = Engine(
        scheduler,
        executor,
        _NoText(),  # type: ignore[arg-type]
        max_model_len=NEAR + num_decoded,
        vocab_size=num_rows + 1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=num_decoded, ignore_eos=True)
    for row in range(num_rows):
        prompt = np.full(NEAR, row, np.int32)
        engine.add(Request(id=str(row), prompt_token_ids=prompt, params=params))
    start_s = time.thread_time()
    while engine.num_unfinished:
        engine.step()
    seconds = time.thread_time() - start_s - executor.own_s
    engine.close()
    return seconds


class _Pretended(SimExecutor):
    """No model; tells its own time apart."""

    own_s = 0.0

    def execute(self, step: Step) -> StepResult:
        start_s = time.thread_time()
        result = super().execute(step)
        self.own_s += time.thread_time() - start_s
        return result


class _NoText:
    """Stands in for a tokenizer."""

    end_token_ids = ()

    def decode(self, ids: object, **options: object) -> str:
        return ""
