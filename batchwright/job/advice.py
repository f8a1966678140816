"""Advice: what was asked about a job, and what was found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from batchwright.job.plan_rows import RowCounts
from batchwright.plan.advise.batch_size import ProfilePoint
from batchwright.plan.advise.devices import LayoutTime
from batchwright.plan.advise.knobs import Trial
from batchwright.plan.advise.single_queue import ClippedQueue
from batchwright.plan.hardware import DeviceProfile
from batchwright.plan.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked besides the best settings.

    Attributes:
        slo_s: most seconds between two tokens of a sequence, on average.
        arrivals_per_s: requests like the job's rows come one by one at this rate.
        target_s: seconds in which the job must be done.
        target_tokens_per_s: prompt and output tokens of the job per second.
        device: the job is to run on such devices instead of on this machine.
        model_shape: the model has these sizes instead of its own; needs a device.
        replica_size: devices that one engine is divided over; None: as few as hold the weights.
        fixed: settings that are not to be searched.
    """

    slo_s: float = math.inf
    arrivals_per_s: float | None = None
    target_s: float | None = None
    target_tokens_per_s: float | None = None
    device: DeviceProfile | None = None
    model_shape: ModelShape | None = None
    replica_size: int | None = None
    fixed: frozenset[str] = frozenset()


class MemoryAdvice(NamedTuple):
    """Memory at the batch size where throughput flattens, and what the rest could do.

    Attributes:
        best: that batch size.
        kv_tokens: tokens of keys and values to reserve for it, with a margin; `kv_bytes` of them.
        weight_bytes, activation_bytes, memory_bytes: of one engine besides, and of the device.
        replicas: engines of that kind that fit; 0 if not even one does.
        gain_serial, gain_overlapped: throughput of these over that of one, if compute and memory
            traffic of different replicas never overlap, and if they do so in full.
    """

    best: ProfilePoint
    kv_tokens: int
    kv_bytes: int
    weight_bytes: int
    activation_bytes: int
    memory_bytes: int
    replicas: int
    gain_serial: float
    gain_overlapped: float


class QueueAdvice(NamedTuple):
    """A load of requests that come one by one.

    Attributes:
        limits: one request at a time, by token limit.
        limit: the one whose tokens are best worth their wait; None: there is none that keeps up.
        dynamic_s, elastic_s: bounds of the mean time from arrival to answer with such batches.
        fixed_size, fixed_s: the best fixed batch, approximately.
        simulated_s, simulated_p95_s: the engine's own continuous batching, simulated: the mean, and
            what 95 % stay below.
        busy_fraction: share of the time that it is busy.
    """

    arrivals_per_s: float
    limits: tuple[ClippedQueue, ...]
    limit: ClippedQueue | None
    dynamic_s: float
    elastic_s: float
    fixed_size: int
    fixed_s: float
    simulated_s: float
    simulated_p95_s: float
    busy_fraction: float


class DeviceAdvice(NamedTuple):
    """How many devices meet a target.

    Attributes:
        found: None if none of the layouts does.
        tried: by number of devices.
    """

    target_s: float
    found: LayoutTime | None
    tried: tuple[LayoutTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What was found.

    Attributes:
        hardware: what the numbers hold for: this processor, or the devices of one engine.
        device: one of these.
        trials: settings that were simulated; the first are those one has.
        pick: of these, the one that is advised.
        contenders: the best few that are faster than the first.
        output_share: of the allowed output tokens, that rows are expected to use.
    """

    counts: RowCounts
    hardware: str
    device: str
    num_tokens: int
    output_share: float
    trials: tuple[Trial, ...]
    pick: Trial
    contenders: tuple[Trial, ...]
    profile: tuple[ProfilePoint, ...]
    memory: MemoryAdvice
    queue: QueueAdvice | None
    devices: DeviceAdvice | None

    @property
    def own(self) -> Trial:
        """The settings one has."""
        return self.trials[0]
