"""Ceiling: the fastest matrix products this machine makes at a model's shapes.

Not the processor's peak, but what torch's own products reach when nothing else is to be done: the
speed that an engine built on them cannot pass. Measuring takes about two seconds of all threads, so
a run never does it; `batchwright report` does, after the job. The best rates ever measured are kept
per machine, model shape, number format and threads: noise only makes a measurement lower.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchwright.job.durable import write_private
from batchwright.job.machine import Machine
from batchwright.job.metrics import RunStart
from batchwright.plan.flops import ModelFlops
from batchwright.user_cache import user_cache_directory

ROWS = (128, 256, 512)
S_PER_PRODUCT = 0.25
MAX_LAYER_PRODUCTS = 4


class Ceiling(msgspec.Struct, frozen=True):
    """Rates of products x W^T in FLOP/s.

    Attributes:
        layers: the best at the shapes of the model's layers.
        logits: the output head's.
    """

    layers: float
    logits: float

    def seconds(self, layer_flops: float, logits_flops: float) -> float:
        """The least time that so much work can take."""
        return layer_flops / self.layers + logits_flops / self.logits


class _Key(msgspec.Struct, frozen=True):
    """What a ceiling was measured for."""

    machine: Machine
    flops: ModelFlops
    dtype: str
    num_threads: int


class _Entry(msgspec.Struct, frozen=True):
    key: _Key
    ceiling: Ceiling


def known_ceiling(start: RunStart) -> Ceiling | None:
    """The best rates measured so far where and as a run ran; None: there are none."""
    key = _key(start)
    if key is None:
        return None
    return next((entry.ceiling for entry in _entries() if entry.key == key), None)


def measured_ceiling(start: RunStart) -> Ceiling | None:
    """The same after measuring now; the caller has seen that this is the run's machine."""
    key, known = _key(start), known_ceiling(start)
    if key is None:
        return None
    best = _measure(key)
    if known is not None:
        best = Ceiling(max(best.layers, known.layers), max(best.logits, known.logits))
    others = [entry for entry in _entries() if entry.key != key]
    if (path := _path()) is not None:
        with contextlib.suppress(OSError):  # it can be measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_private(path, msgspec.json.encode([*others, _Entry(key, best)]))
    return best


def _key(start: RunStart) -> _Key | None:
    dtype, num_threads = start.settings.get("dtype"), start.settings.get("num_threads")
    if start.flops is None or not isinstance(dtype, str) or not isinstance(num_threads, int):
        return None
    return _Key(start.machine, start.flops, dtype, num_threads)


def _path() -> Path | None:
    folder = user_cache_directory("ceiling")
    return None if folder is None else folder / "ceiling.json"


def _entries() -> list[_Entry]:
    path = _path()
    try:
        return [] if path is None else msgspec.json.decode(path.read_bytes(), type=list[_Entry])
    except (OSError, msgspec.MsgspecError):
        return []


def _measure(key: _Key) -> Ceiling:
    import torch

    torch.set_num_threads(key.num_threads)
    largest = sorted(key.flops.layer_products, key=lambda widths: widths[0] * widths[1])
    return Ceiling(
        layers=max(_rate(widths, key.dtype) for widths in largest[-MAX_LAYER_PRODUCTS:]),
        logits=_rate(key.flops.logits_product, key.dtype),
    )


def _rate(widths: tuple[int, int], dtype: str) -> float:
    """Best FLOP/s over ROWS."""
    import torch

    inputs, outputs = widths
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(kind)
    best = 0.0
    with torch.inference_mode():
        for num_rows in ROWS:
            x = torch.randn(num_rows, inputs, generator=generator).to(kind)
            seconds = _seconds(lambda x=x: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
            best = max(best, 2 * num_rows * inputs * outputs / seconds)
    return best


def _seconds(call: Callable[[], object]) -> float:
    """First quartile of the times of as many calls as fit (at least five): noise only adds."""
    call()
    times_s: list[float] = []
    end_s = time.perf_counter() + S_PER_PRODUCT / len(ROWS)
    while len(times_s) < 5 or (time.perf_counter() < end_s and len(times_s) < 200):
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return sorted(times_s)[len(times_s) // 4]
