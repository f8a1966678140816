"""The first layers of a model, to learn what a step takes in all of them.

Products of these layers are real, with weights that mean nothing, and are timed as they run:
between other kernels, which drive each other's data from the caches, they take longer than one
after another. The rest of the model is hollow (`hollow.py`). Times are those of the calling thread,
see `usual_time_s`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from batchwright.exec.hollow import hollow_model
from batchwright.exec.product_rates import make_real
from batchwright.exec.step_programs import PRODUCTS, StepPrograms
from batchwright.kernels.linear.packing import PackedWeight
from batchwright.models.layers import PACKED_NDIM, Linear

NUM_LAYERS = 4

POOL_BYTES = 256 * 2**20
"""Weights take turns within as much memory as all layers' take, or so much: what a step reads was
not read by the step before."""


class SliceSeconds(NamedTuple):
    """What a step would take in all layers of the model: their products, and everything else."""

    products: float
    rest: float


class LayerSlice:
    """A hollow model of few layers, whose products are real.

    Args:
        config: the model's config.json.
        max_tokens: most tokens of a step.
        num_layers: those of the slice, if the model has as many.
        quantize: as in EngineConfig.
        form: how fp32 weights of the layers are stored, a key of FORM_BYTES.
    Attributes:
        num_turns: steps until weights are used again, at least 1.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        max_positions: int,
        max_tokens: int,
        num_layers: int = NUM_LAYERS,
        quantize: str | None = None,
        form: str = "fp32",
    ) -> None:
        self.model = hollow_model(
            config, dtype=dtype, max_positions=max_positions, max_tokens=max_tokens
        )
        specs = self.model.attention_specs
        layers = next(
            module
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList) and len(module) == len(specs)
        )
        self._num_layers = len(layers)
        del layers[num_layers:]
        self.model.attention_specs = specs[:num_layers]
        self._layer_s = [0.0] * len(layers)
        self._product_s = [0.0] * len(layers)
        linears = [m for m in layers.modules() if isinstance(m, Linear)]
        for linear in linears:
            make_real(linear, dtype, quantize, form)
        # A router's weights, fp32 among int8, are few and stay.
        self._linears = [m for m in linears if not (quantize and m.exact)]
        weights = [linear.weight for linear in self._linears]
        self._weights = {
            dtype: self._pool([weight for weight in weights if weight.dtype == dtype])
            for dtype in {weight.dtype for weight in weights}
        }
        self._scales = self._pool([linear.scales for linear in self._linears])
        num_elements = sum(len(pool.memory) for pool in self._weights.values())
        self.num_turns = max(1, num_elements // sum(weight.numel() for weight in weights))
        self._take_weights()
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if isinstance(module, Linear):
                    _time(module, self._product_s, index)
            _time(layer, self._layer_s, index)

    def seconds(
        self, execute: Callable[[], object], programs: StepPrograms | None = None
    ) -> SliceSeconds:
        """Run a step, and tell what it would take in all layers.

        Args:
            programs: those of the executor. A step that is one of them has the weights that it was
                recorded with.

        The first layer also plans attention for the others: what it takes more is taken once.
        """
        self._take_weights()
        self._layer_s[:] = self._product_s[:] = [0.0] * len(self._layer_s)
        before = programs.seconds_by_kernel() if programs else Counter()
        start, clock_start = time.thread_time(), time.perf_counter()
        execute()
        total, clock_total = time.thread_time() - start, time.perf_counter() - clock_start
        kernels = programs.seconds_by_kernel() if programs else Counter()
        kernels.subtract(before)
        if any(kernels.values()):  # by the clock, of which the thread had a part
            layers_s = sum(kernels.values()) * total / clock_total
            products_s = sum(kernels[one] for one in PRODUCTS) * total / clock_total
            scale = self._num_layers / len(self._layer_s)
            return SliceSeconds(
                products=scale * products_s,
                rest=total - layers_s + scale * (layers_s - products_s),
            )
        others = slice(1, None) if len(self._layer_s) > 1 else slice(None)
        layer_s, product_s = _mean(self._layer_s[others]), _mean(self._product_s[others])
        once = total - len(self._layer_s) * layer_s
        return SliceSeconds(
            products=self._num_layers * product_s,
            rest=once + self._num_layers * (layer_s - product_s),
        )

    def _pool(self, tensors: list[torch.Tensor]) -> _Pool:
        """Memory in which such tensors of all layers take turns."""
        sizes = [tensor.numel() for tensor in tensors]
        first = tensors[0]
        wanted = sum(sizes) * self._num_layers // len(self._layer_s)
        size = max(min(wanted, POOL_BYTES // first.itemsize), *sizes)
        return _Pool(size, first.flatten()[0] if size else first.new_zeros(()))

    def close(self) -> None:
        """Give the memory back: modules that are timed refer to themselves."""
        for module in self.model.modules():
            vars(module).pop("forward", None)

    def _take_weights(self) -> None:
        for linear in self._linears:
            values = self._weights[linear.weight.dtype].take(linear.weight.shape)
            if values.ndim == PACKED_NDIM:
                linear.hold(PackedWeight(values, self._scales.take(linear.scales.shape)))
            else:
                linear.weight.data = values


class _Pool:
    """Weights are cut from one piece of memory, one after another, and from its beginning again."""

    def __init__(self, num_elements: int, value: torch.Tensor) -> None:
        self.memory = value.repeat(num_elements)
        self._next = 0

    def take(self, shape: torch.Size) -> torch.Tensor:
        if self._next + shape.numel() > len(self.memory):
            self._next = 0
        start, self._next = self._next, self._next + shape.numel()
        return self.memory[start : self._next].view(shape)


def _time(module: nn.Module, into: list[float], index: int) -> None:
    """Let every call of a module add what it takes to into[index]."""
    forward = type(module).forward

    def timed(*args: Any) -> Any:
        start = time.thread_time()
        result = forward(module, *args)
        into[index] += time.thread_time() - start
        return result

    module.forward = timed  # type: ignore[method-assign]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
