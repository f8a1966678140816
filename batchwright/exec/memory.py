"""How much host memory a process may still take, and whether an exception says there is none."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from batchwright.errors import ConfigError

_OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|failed to) allocate|bad_alloc|ALLOC_FAILED", re.I
)


def available_memory_bytes() -> int:
    """Memory the machine can give without swapping, within a container's limit if there is one."""
    available = _meminfo_available()
    limit, used = (_read_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def check_room_on_host(num_bytes: int) -> None:
    """Refuse to keep more keys and values on the host than it has memory.

    Raises:
        ConfigError: it has less.
    """
    available = available_memory_bytes()
    if num_bytes > available:
        raise ConfigError(
            f"the swap space is {num_bytes} bytes in all, but the host has {available} free; lower "
            "it (--swap-space) or leave it out"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the host or of a device, ran out. Torch says so in several ways."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of what is installed is a cautious guess
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _read_number(path: str) -> int | None:
    """The number in a cgroup file; None if there is no file or no limit."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
