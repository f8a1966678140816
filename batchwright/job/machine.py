"""The machine a job runs on, as far as it explains the job's speed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Equal machines have equal speed, load aside. No name that would identify one.

    Attributes:
        processor: the model of the processor.
        num_cpus: processors that this process may use.
        memory_bytes: memory of the machine.
        system: operating system.
    """

    processor: str = ""
    num_cpus: int = 0
    memory_bytes: int = 0
    system: str = ""


def this_machine() -> Machine:
    """The machine this process runs on."""
    return Machine(
        processor=_processor(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.machine()}",
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
