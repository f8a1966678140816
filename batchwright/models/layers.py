"""The pieces all architectures share: Linear, norms, embedding.

`Linear` is the only place where a weight meets an activation, so row padding, merged projections,
quantisation, division over ranks and later adapters touch this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from batchwright.errors import ConfigError
from batchwright.kernels.fp8_linear import naive as fp8_naive
from batchwright.kernels.int8_linear import numba as int8_kernel
from batchwright.kernels.int8_linear import packing as int8_packing
from batchwright.kernels.linear import numba as linear_kernel
from batchwright.kernels.linear.packing import NO_SCALES, PackedWeight, pack, packed_rows
from batchwright.kernels.parallel import scratch
from batchwright.models.functional import add_rms_norm, fp8_linear, rms_norm
from batchwright.tensor_parallel.ranks import Ranks

_NOTHING = torch.empty(0)

PACKED_NDIM, INT8_NDIM = 3, 4
"""Dimensions of a weight that is held for our own kernels."""
Combine = Callable[[torch.Tensor], torch.Tensor]
"""Makes of what one rank computed what all have: a sum, or columns side by side."""


class Parallel(Enum):
    """How a projection is divided over ranks, if there are several (Megatron-LM, arXiv:1909.08053).

    A COLUMN product is followed by a ROW product, which takes what its rank computed: of the two
    only the sum is sent. Biases of ROW products are rank 0's, so that they are added once.
    """

    COLUMN = "outputs: a rank has a part of every merged projection"
    ROW = "inputs: the ranks' results are summed"
    SUMMAND = "inputs, as ROW, but whoever calls sums"
    VOCABULARY = "outputs, gathered on rank 0"


class Linear(nn.Module):
    """y = x W^T + b, for one projection or several merged ones that read the same input.

    Args:
        in_features: width of x.
        outputs: width of y, or the checkpoint's projection names and widths, merged in this
            order: `Linear(576, {"q_proj": 576, "k_proj": 192, "v_proj": 192})`.
        bias: whether the checkpoint has one for every projection.
        exact: never quantised, because choices depend on it (a router's).
        parallel: how `divide` divides it; None: every rank has it whole.
        num_blocks: projections of one width that the checkpoint has in one tensor (GPT-2's q, k and
            v); each is divided.

    Shapes: x [num_tokens, in_features], y [num_tokens, sum of widths], x's dtype.
    Attributes:
        weight: [out_features, in_features]; after `hold` or `quantize_int8`, in the layout of our
            own CPU kernels, with more dimensions. On one of several ranks all sizes are its own.
        scales: of a held weight, or of one in fp8, [out_features, 1].
        reuses_output: whether y of a held weight is the same memory at every call. For an output
            head, whose logits are used up before the next: memory of their size is given back to
            the system and taken again, a page at a time, if nobody keeps it.

    Level bits when packed, in int8 or not: a row of y does not depend on the other rows (contract
    1). torch's own products, which compute all others, do not promise that.
    """

    def __init__(
        self,
        in_features: int,
        outputs: int | Mapping[str, int],
        *,
        bias: bool = False,
        exact: bool = False,
        parallel: Parallel | None = None,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        self.exact = exact
        self.parallel = parallel
        self.num_blocks = num_blocks
        self.ranks: Ranks | None = None
        self._combine: Combine | None = None
        self.parts = dict(outputs) if isinstance(outputs, Mapping) else {}
        self.in_features = in_features
        self.out_features = sum(outputs.values()) if isinstance(outputs, Mapping) else outputs
        weight = torch.empty(self.out_features, in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None
        )
        self.scales = NO_SCALES
        self._held: tuple[Any, Any, Any] | None = None  # weight, scales and bias as arrays
        self.reuses_output = False
        self._output = np.empty((0, 0), np.float32)
        self._channels = _NOTHING  # scales and bias of an int8 weight

    def hold(self, weight: PackedWeight) -> None:
        """Take a weight that is laid out for our own kernel, for fp32 products on the CPU.

        The bias is the one there is now.
        """
        self.weight = nn.Parameter(weight.values, requires_grad=False)
        self.scales = weight.scales
        bias = _NOTHING if self.bias is None else self.bias
        self._held = weight.values.numpy(), weight.scales.numpy(), bias.numpy()

    def divide(self, ranks: Ranks) -> None:
        """Become this rank's part, before there are weights; see `share` for those."""
        if self.parallel is None:
            return
        self.ranks = ranks
        if self.parallel is Parallel.VOCABULARY:
            num_columns = self.out_features
            self._combine = lambda part: ranks.gather_columns(part, num_columns)
            start, end = ranks.span(num_columns)
            self.out_features = end - start
        elif self.parallel is Parallel.COLUMN:
            self.parts = {name: width // ranks.size for name, width in self.parts.items()}
            self.out_features //= ranks.size
        else:
            self.in_features //= ranks.size
            self._combine = ranks.sum if self.parallel is Parallel.ROW else None
            if ranks.rank:
                self.bias = None
        self.weight = _blank(self.weight, self.out_features, self.in_features)
        if self.bias is not None:
            self.bias = _blank(self.bias, self.out_features)

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a projection's whole weight or bias, if possible as a view."""
        if self.ranks is None:
            return whole
        if self.parallel is Parallel.VOCABULARY:
            return _part(whole, self.ranks)
        if self.parallel is Parallel.COLUMN:
            blocks = whole.unflatten(0, (self.num_blocks, -1))
            start, end = self.ranks.span(blocks.shape[1])
            return blocks[:, start:end].flatten(0, 1)
        if whole.ndim == 1:
            return whole
        start, end = self.ranks.span(whole.shape[1])
        return whole[:, start:end]

    def quantize_fp8(self) -> None:
        """Make the weight e4m3, for good; lossy (`kernels/fp8_linear`). An exact one stays.

        On a GPU sizes must be multiples of 16, which exec/device/formats.py sees to beforehand.
        """
        if self.exact:
            return
        values, self.scales = fp8_naive.quantize_rows(self.weight)
        self.weight = nn.Parameter(values, requires_grad=False)

    def quantize_int8(self) -> None:
        """Make the weight int8, for good; lossy (`kernels/int8_linear`). An exact one is packed.

        Raises:
            ConfigError: it is not fp32 on the CPU.
        """
        weight = self.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ConfigError(
                f'quantize "int8" needs fp32 weights on the CPU, not {weight.dtype} on '
                f'{weight.device.type}; leave it out or set dtype="float32"'
            )
        if self.exact:
            self.hold(pack(weight))
        else:
            self.hold_int8(int8_packing.pack(*int8_packing.quantize_weight(weight)))

    def hold_int8(self, weight: int8_packing.Int8Weight) -> None:
        """Take a quantised weight; the bias is the one there is now."""
        self.weight = nn.Parameter(weight.values, requires_grad=False)
        self._channels = torch.zeros(2, len(weight.scales))
        self._channels[0] = weight.scales
        if self.bias is not None:
            self._channels[1, : self.out_features] = self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x)
        return y if self._combine is None else self._combine(y)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == fp8_naive.FP8:
            return fp8_linear(x, self.weight, self.scales, self.bias)
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        out = self._empty(x.shape[0])
        if self.weight.ndim == INT8_NDIM:
            int8_kernel.int8_linear(
                x.contiguous().numpy(), self.weight.numpy(), self._channels.numpy(), out
            )
        else:
            assert self._held is not None
            linear_kernel.linear(x.contiguous().numpy(), *self._held, out)
        return torch.from_numpy(out)

    def _empty(self, num_rows: int) -> npt.NDArray[np.float32]:
        if not self.reuses_output:
            return scratch((num_rows, self.out_features), np.float32)
        if len(self._output) < num_rows:
            self._output = np.empty((num_rows, self.out_features), np.float32)
        return self._output[:num_rows]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight [num] int64 -> [num, in_features], if it is not quantised."""
        return _rows(self.weight, self.scales, ids)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """forward(x) cut into the merged projections, as views."""
        return self(x).split(list(self.parts.values()), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467); `unit_offset` multiplies by 1 + weight (Gemma)."""

    def __init__(self, hidden_size: int, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> the same shape and dtype; the mean is taken in fp32."""
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def after_sum(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(forward(residual + x), residual + x); `residual` may be overwritten."""
        assert not self.unit_offset
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450), with weight and bias unless `affine` is False."""

    def __init__(self, hidden_size: int, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = self.bias = None
        if affine:
            self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Rows of a table by id, times `scale` (Gemma), which is first rounded to the rows' dtype.

    Args:
        parallel: the ids may be divided over ranks, as the output head's are: a rank looks up its
            own, and the sum has them all. Only one summand is not zero, so no bit is lost.
    Attributes:
        weight: [num_embeddings, hidden_size], of `rows_dtype` or narrower; or packed, such as that
            of an output head whose values it shares.
        scales: of a packed weight.
        rows_dtype: None: the table's.
    """

    def __init__(
        self,
        num_embeddings: int,
        hidden_size: int,
        *,
        scale: float | None = None,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.hidden_size = num_embeddings, hidden_size
        self.parallel = parallel
        self.ranks: Ranks | None = None
        self._first_id = 0
        self.weight = nn.Parameter(torch.empty(num_embeddings, hidden_size), requires_grad=False)
        self.scales = NO_SCALES
        self.scale = scale
        self.rows_dtype: torch.dtype | None = None

    def hold(self, weight: torch.Tensor | PackedWeight) -> None:
        """Take a table that may be narrower than the rows that it gives, which are fp32."""
        values, self.scales = weight if isinstance(weight, PackedWeight) else (weight, NO_SCALES)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.rows_dtype = torch.float32

    def divide(self, ranks: Ranks) -> None:
        """Become this rank's part, before there are weights."""
        if self.parallel:
            self.ranks = ranks
            self._first_id, end = ranks.span(self.num_embeddings)
            self.num_embeddings = end - self._first_id
            self.weight = _blank(self.weight, self.num_embeddings, self.hidden_size)

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole table, as a view."""
        return whole if self.ranks is None else _part(whole, self.ranks)

    def narrow(self) -> None:
        """Keep an fp32 table in 16 bits if that changes no value: most checkpoints have no more."""
        for dtype in (torch.bfloat16, torch.float16):
            table = self.weight.to(dtype)
            if torch.equal(table.float(), self.weight):
                self.hold(table)
                return

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [num_tokens] int64 -> [num_tokens, hidden_size]."""
        rows = self.rows(ids) if self.ranks is None else self._rows_together(ids, self.ranks)
        if self.scale is None:
            return rows
        return rows * float(torch.tensor(self.scale, dtype=rows.dtype))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of this rank's table, without the scale."""
        rows = _rows(self.weight, self.scales, ids)
        return rows.to(self.rows_dtype or rows.dtype)

    def _rows_together(self, ids: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        own = ids - self._first_id
        is_own = (own >= 0) & (own < self.num_embeddings)
        rows = self.rows(torch.where(is_own, own, 0))
        return ranks.sum(torch.where(is_own[:, None], rows, 0.0))


def _rows(weight: torch.Tensor, scales: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a weight that may be packed."""
    if weight.ndim == PACKED_NDIM:
        return packed_rows(PackedWeight(weight, scales), ids)
    return F.embedding(ids, weight)


def _blank(like: torch.Tensor, *shape: int) -> nn.Parameter:
    """A parameter of another shape, without values."""
    return nn.Parameter(like.new_empty(shape), requires_grad=False)


def _part(whole: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """A rank's rows."""
    start, end = ranks.span(len(whole))
    return whole[start:end]
