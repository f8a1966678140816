"""The ceiling of the machine that ran a job: its fastest matrix products at the model's shapes.

Not the processor's peak, but what torch's own products reach when nothing else is to be done: the
speed that an engine built on them cannot pass (`exec/product_rates.py`). Measuring takes about two
seconds of all threads, so a run never does it; `batchwright report` does, after the job. The best
rates ever measured are kept per machine, model shape, number format and threads: noise only makes a
measurement lower.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from batchwright.errors import OutputError
from batchwright.job.durable import write_private
from batchwright.job.machine import Machine
from batchwright.job.metrics import RunStart
from batchwright.plan.shape import ModelShape
from batchwright.user_cache import user_cache_directory

_DTYPES = ("float32", "bfloat16")


class Ceiling(msgspec.Struct, frozen=True):
    """Best rates of products in FLOP/s, of the layers' shapes and of the output head's."""

    layers: float
    head: float

    def seconds(self, layer_flops: float, head_flops: float) -> float:
        """The least time that so much work can take."""
        return layer_flops / self.layers + head_flops / self.head


class _Key(msgspec.Struct, frozen=True):
    """What a ceiling was measured for."""

    machine: Machine
    shape: ModelShape
    dtype: str
    num_threads: int
    quantize: str | None = None


class _Entry(msgspec.Struct, frozen=True):
    key: _Key
    ceiling: Ceiling


def known_ceiling(start: RunStart) -> Ceiling | None:
    """The best rates measured so far where and as a run ran; None: there are none."""
    key = _key(start)
    if key is None:
        return None
    return next((entry.ceiling for entry in _entries() if entry.key == key), None)


def measure_ceiling(start: RunStart) -> Ceiling | None:
    """Measure now, and keep the best; the caller has seen that this is the run's machine."""
    key, known = _key(start), known_ceiling(start)
    if key is None:
        return None
    best = _measure(key)
    if known is not None:
        best = Ceiling(max(best.layers, known.layers), max(best.head, known.head))
    others = [entry for entry in _entries() if entry.key != key]
    if (path := _path()) is not None:
        with contextlib.suppress(OSError, OutputError):  # it can be measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_private(path, msgspec.json.encode([*others, _Entry(key, best)]))
    return best


def _key(start: RunStart) -> _Key | None:
    dtype, num_threads = start.settings.get("dtype"), start.settings.get("num_threads")
    if start.shape is None or dtype not in _DTYPES or not isinstance(num_threads, int):
        return None
    if start.settings.get("device") == "cuda":  # what is measured here are the CPU's products
        return None
    num_threads *= start.settings.get("data_parallel_size", 1)  # of all replicas
    quantize = start.settings.get("quantize")
    return _Key(start.machine, start.shape, dtype, num_threads, quantize)


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

    from batchwright.exec import product_rates

    torch.set_num_threads(key.num_threads)
    rates = product_rates.measure_ceiling(
        key.shape, getattr(torch, key.dtype), quantize=key.quantize
    )
    return Ceiling(rates.layers, rates.head)
