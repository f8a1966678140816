"""Cost model: what a Step, or work that was counted, takes of a machine. No torch, no clock.

A `ModelShape` says what a model multiplies, reads and keeps; a `Hardware` how fast a machine does
that; `CostModel` puts the two together and is what `exec/sim.py` charges to a virtual clock.
Shapes (`shape.py`) are counted from a model's modules (`models/shape.py`) or known by name;
hardware is measured (`exec/calibrate.py`) or taken from a data sheet (`hardware.py`).

    step = fixed + max(c, m) + (1 - overlap) min(c, m)

where c is what computes (products, attention of prompts) and m what waits for keys and values
(attention of single tokens). An executor that runs one kernel after the other has overlap 0: times
are added. Source of the form: BlendServe (arXiv:2411.16102).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchwright.kv.groups import BLOCK_SIZE
from batchwright.plan.shape import AttentionShape, ModelShape
from batchwright.request import Int32Array
from batchwright.step import NO_WRITE, EqualSteps, Step

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RateCurve:
    """FLOP/s of matrix products by their number of rows.

    Time is straight between the points; a product of fewer rows takes as long as the first one, and
    one of more runs at the last one's rate.

    Attributes:
        rows: ascending.
        flops_per_s: at each.
    """

    rows: tuple[float, ...]
    flops_per_s: tuple[float, ...]

    def seconds(self, num_rows: float, flops_per_row: float) -> float:
        """Time of products with so many rows, and so many FLOPs for each of them."""
        if num_rows >= self.rows[-1]:
            return num_rows * flops_per_row / self.flops_per_s[-1]
        times = [rows / rate for rows, rate in zip(self.rows, self.flops_per_s, strict=True)]
        return float(np.interp(num_rows, self.rows, times)) * flops_per_row

    @property
    def best(self) -> float:
        """The highest rate."""
        return max(self.flops_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """How fast a machine does what a model needs.

    The curves and the last three hold for the model they were measured with.

    Attributes:
        num_threads: of a processor; of a GPU profile, the devices that share the model.
        layers, head: matrix products of the layers and of the output head.
        ceiling_flops_per_s: the best product of the layers at any number of rows.
        attention_flops_per_s: attention of many query tokens to the same keys.
        kv_bytes_per_s: keys and values read by attention of single tokens.
        memory_bytes_per_s: plain reading.
        host_bytes_per_s: copies between a device and its host; 0: there are none.
        token_s: norms, rotations, activations and the like, of one token in all layers.
        step_s: fixed time of a step.
        draw_s: drawing one token from its logits.
        logits_s: sending one line of logits, where several processes have parts of it
            (`exchange.py`).
        tile_rows: rows of a product are rounded up to a multiple of this.
        busy: seconds by the clock for one of the machine's own, as others used it when it was
            measured; no part of a step's time here.
        overlap: share of the shorter of compute and reading keys that the longer one hides, 0 to 1;
            while weights are read, keys are not.
    """

    name: str
    num_threads: int
    layers: RateCurve
    head: RateCurve
    ceiling_flops_per_s: float
    attention_flops_per_s: float
    kv_bytes_per_s: float
    memory_bytes_per_s: float
    host_bytes_per_s: float = 0.0
    token_s: float = 0.0
    step_s: float = 0.0
    draw_s: float = 0.0
    logits_s: float = 0.0
    tile_rows: int = 1
    overlap: float = 0.0
    busy: float = 1.0


class SharedReads(NamedTuple):
    """Keys in blocks that more than one row uses, in one KV group; see `plan/shared_keys.py`.

    Attributes:
        num_reads: keys, counted for each row that reads them.
        num_loads: keys, counted as often as attention loads them.
    """

    num_reads: int
    num_loads: int


class AttentionSeconds(NamedTuple):
    """Attention by what it waits for: its FLOPs, or its keys and values."""

    compute: float
    memory: float


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Where the time of a Step goes.

    Attributes:
        layers, head, attention, other: each for itself.
        hidden: what attention and the rest take at the same time.
    """

    layers: float
    head: float
    attention: float
    other: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.layers + self.head + self.attention + self.other - self.hidden


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a model costs on a machine.

    Attributes:
        weight_bytes, kv_bytes: of one element of the weights, and of keys and values.
        rows_per_load: tokens that use keys while these are loaded once, of rows that share them
            (Hydragen, arXiv:2402.05099); 1: attention loads every row's keys for itself.
        block_size: tokens of the blocks in which keys and values are copied to the host.
    """

    shape: ModelShape
    hardware: Hardware
    weight_bytes: float = 4
    kv_bytes: float = 4
    rows_per_load: int = 1
    block_size: int = BLOCK_SIZE

    def seconds(self, step: Step, shared: Sequence[SharedReads] = ()) -> float:
        """Time of a Step; what `SimExecutor` asks. For `shared` see `parts`."""
        return self.parts(step, shared).total

    def equal_seconds(self, steps: EqualSteps, shared: Sequence[SharedReads] = ()) -> float:
        """Time of equal Steps, all of them; `shared` as in `parts`, the same in each."""
        num_rows, hardware = len(steps.slots), self.hardware
        products_s = self._layers_s(num_rows) + self._head_s(num_rows)
        row_s = hardware.token_s + hardware.draw_s + hardware.logits_s
        other_s = hardware.step_s + num_rows * row_s
        compute_s = np.full(steps.num_steps, products_s)
        memory_s = np.zeros(steps.num_steps)
        for group, attention in enumerate(self.shape.attention):
            num_read = keys_by_step(steps, attention.window)
            flops_s, load_s = self._key_s(attention)
            if load_s <= flops_s:
                compute_s += flops_s * num_read
                continue
            memory_s += load_s * num_read
            if shared and shared[group].num_reads:
                num_reads = np.minimum(shared[group].num_reads, num_read)
                num_loads = shared[group].num_loads * num_reads / shared[group].num_reads
                memory_s -= load_s * num_reads
                computes = flops_s * num_reads > load_s * num_loads
                compute_s += np.where(computes, flops_s * num_reads, 0.0)
                memory_s += np.where(computes, 0.0, load_s * num_loads)
        hidden_s = self._hidden_s(compute_s, memory_s)
        return steps.num_steps * other_s + float((compute_s + memory_s - hidden_s).sum())

    def equal_bytes(self, steps: EqualSteps, shared: Sequence[SharedReads] = ()) -> float:
        """`num_bytes` of equal Steps, all of them."""
        num_rows, num_steps = len(steps.slots), steps.num_steps
        kv = 0
        for group, attention in enumerate(self.shape.attention):
            num_keys = int(keys_by_step(steps, attention.window).sum()) + num_rows * num_steps
            kv += attention.kv_elements * (num_keys - num_steps * _num_spared(shared, group))
        weights = self.shape.weight_elements_read(num_rows) + self.shape.head.num_elements
        return num_steps * weights * self.weight_bytes + kv * self.kv_bytes

    def _hidden_s(self, compute_s: Float64Array, memory_s: Float64Array) -> Float64Array:
        """What products and the reading of keys do at the same time.

        While weights are read, which products wait for when rows are few, keys are not.
        """
        weights_s = self._layers_s(1) + self._head_s(1)
        free_s = np.maximum(compute_s - weights_s, 0.0)
        return self.hardware.overlap * np.minimum(free_s, memory_s)

    def _key_s(self, attention: AttentionShape) -> tuple[float, float]:
        """Time of one token's attention to one key: its FLOPs, and its reading."""
        compute_s = attention.flops_per_key / self.hardware.attention_flops_per_s
        return compute_s, attention.kv_elements * self.kv_bytes / self.hardware.kv_bytes_per_s

    def parts(self, step: Step, shared: Sequence[SharedReads] = ()) -> StepSeconds:
        """Time of a Step by where it goes.

        Args:
            shared: what rows share, by KV group, which a Step does not say; `StepCosts` follows it.
        """
        hardware = self.hardware
        num_logits = _num_logits(step)
        layers, head = self._layers_s(step.num_tokens), self._head_s(num_logits)
        attention = self._attention_s(step, shared)
        return StepSeconds(
            layers=layers,
            head=head,
            attention=sum(attention),
            other=hardware.step_s
            + step.num_swapped * self.block_copy_s
            + hardware.token_s * step.num_tokens
            + hardware.logits_s * num_logits
            + hardware.draw_s * len(step.sample_tokens),
            hidden=0.0
            if not hardware.overlap
            else float(
                self._hidden_s(
                    np.array(layers + head + attention.compute), np.array(attention.memory)
                )
            ),
        )

    @property
    def block_copy_s(self) -> float:
        """Time of copying a block's keys and values to the host, or back; as if nothing were
        computed meanwhile."""
        if not self.hardware.host_bytes_per_s:
            return 0.0
        elements = sum(one.kv_elements for one in self.shape.attention)
        return self.block_size * elements * self.kv_bytes / self.hardware.host_bytes_per_s

    @property
    def swap_pays(self) -> bool:
        """Whether a block is sooner copied to the host and back than computed again.

        In large steps, and without its tokens' attention, which takes more the later they are: so
        recomputing is taken to be a little cheaper than it is.
        """
        again_s = self.work_s(self.block_size, [0] * len(self.shape.attention), 0, 0)
        return self.hardware.host_bytes_per_s > 0 and 2 * self.block_copy_s < again_s

    def work_s(
        self, num_tokens: int, num_keys: Sequence[int], num_logits: int, num_draws: int
    ) -> float:
        """Time of counted work if all of it ran in large steps; fixed times are left out.

        Args:
            num_tokens: through the layers.
            num_keys: (query token, key) pairs, per KV group.
        """
        hardware, shape = self.hardware, self.shape
        return (
            num_tokens * (shape.layer_flops_per_token / hardware.layers.best + hardware.token_s)
            + shape.attention_flops(num_keys) / hardware.attention_flops_per_s
            + num_logits * (shape.head_flops_per_token / hardware.head.best + hardware.logits_s)
            + num_draws * hardware.draw_s
        )

    def num_bytes(self, step: Step, shared: Sequence[SharedReads] = ()) -> float:
        """Memory traffic of a Step: weights, and keys and values read and written."""
        _, read = row_keys(step, self.shape.attention)
        kv = 0
        for group, attention in enumerate(self.shape.attention):
            num_written = int((step.kv_slots[group] != NO_WRITE).sum())
            num_read = max(int(read[group].sum()) - _num_spared(shared, group), 0)
            kv += attention.kv_elements * (num_read + num_written)
        head = self.shape.head.num_elements if _num_logits(step) else 0
        weights = self.shape.weight_elements_read(step.num_tokens) + head
        return weights * self.weight_bytes + kv * self.kv_bytes

    def _layers_s(self, num_tokens: int) -> float:
        total = 0.0
        for product in self.shape.products:
            num_used = product.num_used(num_tokens)
            num_rows = num_tokens * product.share * product.num_weights / num_used
            flops = 2 * product.in_features * product.out_features
            total += num_used * self.hardware.layers.seconds(self._tiled(num_rows), flops)
        return total

    def _head_s(self, num_logits: int) -> float:
        if not num_logits:
            return 0.0
        return self.hardware.head.seconds(self._tiled(num_logits), self.shape.head_flops_per_token)

    def _tiled(self, num_rows: float) -> float:
        tile = self.hardware.tile_rows
        return num_rows if tile == 1 else ceil(num_rows / tile) * tile

    def _attention_s(self, step: Step, shared: Sequence[SharedReads]) -> AttentionSeconds:
        """Each row takes as long as its FLOPs or as reading its keys, whichever is longer.

        Keys that several of the rows that wait for them share are loaded once for `rows_per_load`
        of them, and take as long as this or as the FLOPs of all.
        """
        pairs, read = row_keys(step, self.shape.attention)
        compute_s = memory_s = 0.0
        for group, attention in enumerate(self.shape.attention):
            flops_s, load_s = self._key_s(attention)
            compute, load = pairs[group] * flops_s, read[group] * load_s
            waits = load > compute
            compute_s += float(compute[~waits].sum())
            memory_s += float(load[waits].sum())
            if not shared or not shared[group].num_reads:
                continue
            num_reads = min(shared[group].num_reads, int(read[group][waits].sum()))
            num_loads = shared[group].num_loads * num_reads / shared[group].num_reads
            memory_s -= num_reads * load_s
            if num_reads * flops_s > num_loads * load_s:
                compute_s += num_reads * flops_s
            else:
                memory_s += num_loads * load_s
        return AttentionSeconds(compute_s, memory_s)


def num_keys(num_tokens: Int32Array | Int64Array, window: int | None) -> Int64Array:
    """Keys that the first `num_tokens` tokens of a sequence visit; each sees itself too.

    Args:
        num_tokens: [n].
        window: most keys a token sees; None: all up to itself.
    """
    count = num_tokens.astype(np.int64)
    if window is None:
        return count * (count + 1) // 2
    inside = np.minimum(count, window)
    return inside * (inside + 1) // 2 + (count - inside) * window


def keys_by_step(steps: EqualSteps, window: int | None) -> Int64Array:
    """[num_steps] keys that all rows of each of these Steps visit together."""
    positions, num_steps = steps.positions, steps.num_steps
    if window is None:
        first = int(positions.sum(dtype=np.int64)) + len(positions)
        return first + len(positions) * np.arange(num_steps, dtype=np.int64)
    # A row sees one key more in every Step until its window is full.
    missing = np.sort(np.clip(window - 1 - positions, 0, num_steps))  # Steps that see one more
    seen = np.minimum(positions + 1, window).sum(dtype=np.int64)
    growing = len(positions) - np.searchsorted(missing, np.arange(num_steps - 1), "right")
    return np.concatenate(([seen], seen + np.cumsum(growing))).astype(np.int64)


def _num_spared(shared: Sequence[SharedReads], group: int) -> int:
    """Keys that need not be loaded, since rows that share them use them together."""
    return shared[group].num_reads - shared[group].num_loads if shared else 0


def _num_logits(step: Step) -> int:
    """Lines of logits; forks share theirs."""
    return num_distinct(step.sample_tokens) + len(step.score_tokens)


def num_distinct(tokens: Int32Array) -> int:
    """Different query tokens; five times as fast as sorting them."""
    return int(np.count_nonzero(np.bincount(tokens)))


def row_keys(
    step: Step, attention: Sequence[AttentionShape]
) -> tuple[list[Int64Array], list[Int64Array]]:
    """([num_rows] (token, key) pairs, [num_rows] different keys read) for each KV group."""
    starts = step.positions[step.cu_seqlens_q[:-1]].astype(np.int64)
    ends = step.positions[step.cu_seqlens_q[1:] - 1].astype(np.int64) + 1
    pairs, read = [], []
    for one in attention:
        pairs.append(num_keys(ends, one.window) - num_keys(starts, one.window))
        first = 0 if one.window is None else np.maximum(starts - one.window + 1, 0)
        read.append(ends - first)
    return pairs, read
