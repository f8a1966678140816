"""How many copies of an engine fit in a device's memory, and what they gain together.

Replicas share the device. One computes while another waits for memory, or for its scheduler, and
that is all they can gain: they are modelled as overlap, never as doubling.
Source: replication in arXiv:2503.08311; the overlap is the omega of arXiv:2411.16102.
"""

from __future__ import annotations

from typing import NamedTuple


class StepMix(NamedTuple):
    """What a step needs of a device, in seconds of each of its parts.

    Attributes:
        fixed_s: neither computes nor reads: scheduling, launches.
        busy_s: the device works.
        compute_s, memory_s: arithmetic alone, and memory traffic alone; at most busy_s.
    """

    fixed_s: float
    busy_s: float
    compute_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        """A step of one replica that has the device for itself."""
        return self.fixed_s + self.busy_s


def num_replicas(
    memory_bytes: float, *, weight_bytes: float, activation_bytes: float, kv_bytes: float
) -> int:
    """R = floor(M / (W + A + KV)); 0 if not even one fits."""
    return max(int(memory_bytes // (weight_bytes + activation_bytes + kv_bytes)), 0)


def replica_gain(step: StepMix, replicas: int, overlap: float) -> float:
    """Throughput of so many replicas over that of one.

    In the time in which each makes one step the device is busy for all of them, less what overlaps;
    no step takes less than it does alone.

    Args:
        overlap: share of what compute and memory could hide of each other, that they do: 0 to 1.
    """
    least_s = max(step.compute_s, step.memory_s)
    busy_s = step.busy_s - overlap * (step.busy_s - least_s)
    return replicas * step.total_s / max(step.total_s, replicas * busy_s)
