"""Cost model: what a Step, or work that was counted, takes of a machine. No torch, no clock.

A `ModelShape` says what a model multiplies, reads and keeps; a `Hardware` how fast a machine does
that; `CostModel` puts the two together and is what `exec/sim.py` charges to a virtual clock.
Shapes are counted from a model's modules (`models/shape.py`) or known by name (`model_shapes.py`);
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

from batchwright.request import Int32Array
from batchwright.step import NO_WRITE, Step

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Product:
    """Products x W^T with weights of one shape.

    Attributes:
        in_features, out_features: of x and of the result.
        num_weights: matrices of this shape in the model: its layers, times experts.
        share: of the tokens, that pass through each; below 1 for the experts of a mixture.
    """

    in_features: int
    out_features: int
    num_weights: int = 1
    share: float = 1.0

    @property
    def num_elements(self) -> int:
        """Elements of all these weights."""
        return self.in_features * self.out_features * self.num_weights

    @property
    def flops_per_token(self) -> int:
        """Two a weight that the token passes."""
        return round(2 * self.num_elements * self.share)

    def num_used(self, num_tokens: int) -> float:
        """Weights that a step of so many tokens reads; of experts, the expected number."""
        return self.num_weights * (1 - (1 - self.share) ** num_tokens)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of the layers that share a window: those of one KV group."""

    window: int | None
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def flops_per_key(self) -> int:
        """Scores and weighted values for one query token and one key, in all these layers."""
        return 4 * self.num_q_heads * self.head_dim * self.num_layers

    @property
    def kv_elements(self) -> int:
        """Elements of the keys and values of one token, in all these layers."""
        return 2 * self.num_kv_heads * self.head_dim * self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that cost follows from.

    Attributes:
        products: all products of the layers, and those that lead into and out of them.
        head: the output head.
        attention: one entry per KV group, in the order of the scheduler's groups.
        num_params: elements of all parameters; a head tied to the embeddings counts once.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    products: tuple[Product, ...]
    head: Product
    attention: tuple[AttentionShape, ...]
    num_params: int

    @property
    def layer_flops_per_token(self) -> int:
        """Matrix products of all layers for one token."""
        return sum(product.flops_per_token for product in self.products)

    @property
    def attention_flops_per_key(self) -> int:
        """Scores and weighted values of all layers for one query token and one key."""
        return sum(attention.flops_per_key for attention in self.attention)

    @property
    def head_flops_per_token(self) -> int:
        """Logits of one token."""
        return self.head.flops_per_token

    def attention_flops(self, num_keys: Sequence[int]) -> int:
        """FLOPs of (query token, key) pairs, counted per KV group."""
        pairs = zip(self.attention, num_keys, strict=True)
        return sum(attention.flops_per_key * num for attention, num in pairs)

    def kv_elements_per_token(self) -> int:
        """Elements of the keys and values of one token in all layers."""
        return sum(attention.kv_elements for attention in self.attention)

    def weight_elements_read(self, num_tokens: int) -> float:
        """Elements of the layers' weights that a step of so many tokens reads."""
        return sum(
            product.in_features * product.out_features * product.num_used(num_tokens)
            for product in self.products
        )


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
        token_s: norms, rotations, activations and the like, of one token in all layers.
        step_s: fixed time of a step.
        draw_s: drawing one token from its logits.
        tile_rows: rows of a product are rounded up to a multiple of this.
        overlap: share of the shorter of compute and reading keys that the longer one hides, 0 to 1.
    """

    name: str
    num_threads: int
    layers: RateCurve
    head: RateCurve
    ceiling_flops_per_s: float
    attention_flops_per_s: float
    kv_bytes_per_s: float
    memory_bytes_per_s: float
    token_s: float = 0.0
    step_s: float = 0.0
    draw_s: float = 0.0
    tile_rows: int = 1
    overlap: float = 0.0


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
    """

    shape: ModelShape
    hardware: Hardware
    weight_bytes: int = 4
    kv_bytes: int = 4

    def seconds(self, step: Step) -> float:
        """Time of a Step; what `SimExecutor` asks."""
        return self.parts(step).total

    def equal_seconds(self, positions: Int32Array, num_steps: int) -> float:
        """Time of Steps of one token a row, at `positions` [num_rows] in the first of them."""
        num_rows, hardware = len(positions), self.hardware
        products_s = self._layers_s(num_rows) + self._head_s(num_rows)
        other_s = hardware.step_s + num_rows * (hardware.token_s + hardware.draw_s)
        compute_s, memory_s = np.full(num_steps, products_s), np.zeros(num_steps)
        for attention in self.shape.attention:
            keys = keys_by_step(positions, num_steps, attention.window)
            compute, load = self._key_s(attention)
            if load > compute:
                memory_s += load * keys
            else:
                compute_s += compute * keys
        hidden_s = hardware.overlap * np.minimum(compute_s, memory_s)
        return num_steps * other_s + float((compute_s + memory_s - hidden_s).sum())

    def equal_bytes(self, positions: Int32Array, num_steps: int) -> float:
        """`num_bytes` of the Steps of `equal_seconds`."""
        num_rows = len(positions)
        kv = 0
        for attention in self.shape.attention:
            keys = int(keys_by_step(positions, num_steps, attention.window).sum())
            kv += attention.kv_elements * (keys + num_rows * num_steps)
        weights = self.shape.weight_elements_read(num_rows) + self.shape.head.num_elements
        return num_steps * weights * self.weight_bytes + kv * self.kv_bytes

    def _key_s(self, attention: AttentionShape) -> tuple[float, float]:
        """Time of one token's attention to one key: its FLOPs, and its reading."""
        compute_s = attention.flops_per_key / self.hardware.attention_flops_per_s
        return compute_s, attention.kv_elements * self.kv_bytes / self.hardware.kv_bytes_per_s

    def parts(self, step: Step) -> StepSeconds:
        """Time of a Step by where it goes."""
        hardware = self.hardware
        layers, head = self._layers_s(step.num_tokens), self._head_s(_num_logits(step))
        attention = self._attention_s(step)
        return StepSeconds(
            layers=layers,
            head=head,
            attention=sum(attention),
            other=hardware.step_s
            + hardware.token_s * step.num_tokens
            + hardware.draw_s * len(step.sample_tokens),
            hidden=hardware.overlap * min(layers + head + attention.compute, attention.memory),
        )

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
            + num_logits * shape.head_flops_per_token / hardware.head.best
            + num_draws * hardware.draw_s
        )

    def num_bytes(self, step: Step) -> float:
        """Memory traffic of a Step: weights, and keys and values read and written."""
        _, read = row_keys(step, self.shape.attention)
        kv = sum(
            attention.kv_elements * (int(keys.sum()) + int((slots != NO_WRITE).sum()))
            for attention, keys, slots in zip(
                self.shape.attention, read, step.kv_slots, strict=True
            )
        )
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

    def _attention_s(self, step: Step) -> AttentionSeconds:
        """Each row takes as long as its FLOPs or as reading its keys, whichever is longer."""
        pairs, read = row_keys(step, self.shape.attention)
        compute_s = memory_s = 0.0
        for attention, num_pairs, num_read in zip(self.shape.attention, pairs, read, strict=True):
            compute_key_s, load_key_s = self._key_s(attention)
            compute, load = num_pairs * compute_key_s, num_read * load_key_s
            waits = load > compute
            compute_s += float(compute[~waits].sum())
            memory_s += float(load[waits].sum())
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


def keys_by_step(positions: Int32Array, num_steps: int, window: int | None) -> Int64Array:
    """[num_steps] keys seen by rows of one token, at `positions` [num_rows] in the first Step."""
    if window is None:
        first = int(positions.sum(dtype=np.int64)) + len(positions)
        return first + len(positions) * np.arange(num_steps, dtype=np.int64)
    # A row sees one key more in every Step until its window is full.
    missing = np.sort(np.clip(window - 1 - positions, 0, num_steps))  # Steps that see one more
    seen = np.minimum(positions + 1, window).sum(dtype=np.int64)
    growing = len(positions) - np.searchsorted(missing, np.arange(num_steps - 1), "right")
    return np.concatenate(([seen], seen + np.cumsum(growing))).astype(np.int64)


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
