"""How many devices a job needs: the fewest whose predicted time meets a target.

The question of a deployer (UELLM, arXiv:2409.14961), answered for one kind of device: a layout is
so many replicas, each divided over so many devices (tensor parallel). Replicas run parts of the job
and do not talk; the devices of one replica do (`plan/exchange.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_DEVICES = 64
REPLICA_SIZES = (1, 2, 4, 8)
"""Devices of one replica; links are fast within a machine of eight."""


class Layout(NamedTuple):
    """Replicas, each divided over `replica_size` devices."""

    replica_size: int
    num_replicas: int

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.replica_size * self.num_replicas

    def __str__(self) -> str:
        devices = "1 device" if self.num_devices == 1 else f"{self.num_devices} devices"
        if self.num_devices == 1:
            return devices
        each = "one device" if self.replica_size == 1 else f"{self.replica_size} devices"
        replicas = "1 replica" if self.num_replicas == 1 else f"{self.num_replicas} replicas"
        return f"{devices}: {replicas} on {each} each"


class LayoutTime(NamedTuple):
    """A layout and the seconds that the job is predicted to take on it."""

    layout: Layout
    seconds: float


def smallest_layout(
    seconds: Callable[[Layout], float | None], target_s: float, *, most: int = MAX_DEVICES
) -> tuple[LayoutTime | None, list[LayoutTime]]:
    """The fewest devices that meet a target, in the fastest layout of them.

    Numbers that would fall short even if more devices sped the best layout so far up in full are
    passed over. More memory can do better than that, so when one meets the target the numbers below
    it are tried from above, until one does not.

    Args:
        seconds: of a layout; None if the model does not fit on it.
        most: devices.
    Returns:
        The layout, or None if none meets the target; and all that were looked at.
    """
    tried: list[LayoutTime] = []
    found, low, number = None, 0, 1
    while found is None and number <= most:
        best = _fastest(number, seconds, tried)
        if best is not None and best.seconds <= target_s:
            found = best
        else:
            low, number = number, max(number + 1, _least(tried, target_s))
    while found is not None and found.layout.num_devices > low + 1:
        best = _fastest(found.layout.num_devices - 1, seconds, tried)
        if best is None or best.seconds > target_s:
            break
        found = best
    return found, tried


def _fastest(
    num_devices: int, seconds: Callable[[Layout], float | None], tried: list[LayoutTime]
) -> LayoutTime | None:
    """The fastest layout of so many devices; of equal ones that with the smallest replicas."""
    now = []
    for layout in _layouts(num_devices):
        time_s = seconds(layout)
        if time_s is not None:
            now.append(LayoutTime(layout, time_s))
    tried += now
    return min(now, key=lambda one: one.seconds, default=None)


def _layouts(num_devices: int) -> Iterator[Layout]:
    for replica_size in REPLICA_SIZES:
        if num_devices % replica_size == 0:
            yield Layout(replica_size, num_devices // replica_size)


def _least(tried: list[LayoutTime], target_s: float) -> int:
    """Devices below which no layout can meet the target."""
    if not tried:
        return 0
    work = min(one.seconds * one.layout.num_devices for one in tried)
    return math.ceil(work / target_s * (1 - 1e-9))
